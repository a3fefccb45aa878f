"""Pictures of a lifecycle: for Mermaid, for Graphviz, and for a terminal. Pure and deterministic.

Arrows with the same ends are one arrow. What spoils the session is told from what only warns. With the `path`
that a session took, states show when they were entered and for how long, and arrows the numbers of the steps.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kenaz_engine.lifecycle.findings import json_like
from kenaz_engine.lifecycle.model import Arm, Guard, Lifecycle, State
from kenaz_engine.lifecycle.visits import Visit

_RESET = "\x1b[0m"
_STYLES = {
    "name": "\x1b[1m",
    "goal": "\x1b[1;32m",
    "success": "\x1b[1;32m",
    "failure": "\x1b[1;31m",
    "fails": "\x1b[31m",
    "warns": "\x1b[33m",
    "dim": "\x1b[2m",
    "taken": "\x1b[36m",
}

_SAFE = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_MERMAID_WORDS = frozenset({"state", "end", "note", "direction", "class", "classDef", "style", "click", "as"})


@dataclass(frozen=True, slots=True)
class _Arrow:
    """All transitions from one place to one target with the same tone (`fails`, `warns` or empty).

    `steps` are the numbers of the visits that ended by one of them.
    """

    target: str
    tone: str
    labels: tuple[str, ...]
    steps: tuple[int, ...]

    @property
    def numbers(self) -> str:
        """The steps, as they stand before a label; empty where there are none."""
        return f"({', '.join(map(str, self.steps))}) " if self.steps else ""


Path = Sequence[Visit]


def mermaid(lifecycle: Lifecycle, path: Path = ()) -> str:
    """A `stateDiagram-v2`, as it goes into a fenced block of Markdown."""
    ids = {name: _mermaid_id(name, i) for i, name in enumerate(lifecycle.states)}
    lines = ["stateDiagram-v2", f"    [*] --> {ids[lifecycle.initial]}"]
    for state in lifecycle.states.values():
        lines.append(f'    state "{_mermaid_text(state.name)}" as {ids[state.name]}')
        if facts := _facts(state):
            lines.append(f"    {ids[state.name]}: {_mermaid_text(', '.join(facts))}")
        lines += [f"    {ids[state.name]}: {_mermaid_text(stay)}" for stay in _stays(state.name, path)]
    if lifecycle.any:
        lines.append('    state "any state" as ANY')
    for source, arrows in _all_arrows(lifecycle, path):
        for arrow in arrows:
            label = _mermaid_text(arrow.numbers + ", ".join(arrow.labels)) + (
                f" ({arrow.tone})" if arrow.tone else ""
            )
            lines.append(f"    {ids.get(source, 'ANY')} --> {ids[arrow.target]}: {label}")
    lines += [f"    {ids[state.name]} --> [*]" for state in lifecycle.states.values() if state.final]
    lines += [
        "    classDef goal stroke-width:3px",
        "    classDef success stroke:#2a7,stroke-width:3px",
        "    classDef failure stroke:#c33,stroke-width:3px",
    ]
    for state in lifecycle.states.values():
        if kind := _kind(state):
            lines.append(f"    class {ids[state.name]} {kind}")
    if path:
        lines.append("    classDef taken fill:#cde,color:#000")
        lines += [f"    class {ids[name]} taken" for name in ids if _stays(name, path)]
    return "\n".join(lines) + "\n"


def dot(lifecycle: Lifecycle, path: Path = ()) -> str:
    """A digraph for Graphviz. Dashed arrows fail, dotted ones warn; what was taken is thick, or filled."""
    lines = [
        f"digraph {_quoted(lifecycle.name)} {{",
        '    node [shape=box, style=rounded, fontname="sans-serif"];',
        '    edge [fontname="sans-serif", fontsize=10];',
        '    "" [shape=point];',
        f'    "" -> {_quoted(lifecycle.initial)};',
    ]
    looks = {
        "goal": ", penwidth=3",
        "success": ', peripheries=2, color="#22aa77"',
        "failure": ', peripheries=2, color="#cc3333"',
        "": "",
    }
    for state in lifecycle.states.values():
        stays = _stays(state.name, path)
        label = _quoted("\n".join([state.name, *_facts(state), *stays]))
        taken = ', style="rounded,filled", fillcolor="#ccddee"' if stays else ""
        lines.append(f"    {_quoted(state.name)} [label={label}{looks[_kind(state)]}{taken}];")
    if lifecycle.any:
        lines.append('    " any" [label="any state", style="rounded,dashed"];')
    tones = {"fails": ', style=dashed, color="#cc3333"', "warns": ", style=dotted", "": ""}
    for source, arrows in _all_arrows(lifecycle, path):
        for arrow in arrows:
            ends = f"{_quoted(source or ' any')} -> {_quoted(arrow.target)}"
            label = _quoted(arrow.numbers + "\n".join(arrow.labels))
            taken = ", penwidth=3" if arrow.steps else ""
            lines.append(f"    {ends} [label={label}{tones[arrow.tone]}{taken}];")
    return "\n".join([*lines, "}"]) + "\n"


def text(lifecycle: Lifecycle, path: Path = (), *, width: int, colour: bool = False) -> str:
    """For a terminal of `width` columns: the states in the file's order, each with what it does, how long it
    may take, and where its events lead. `colour` adds ANSI sequences and changes nothing else."""
    paint = _paint if colour else _plain
    width = max(width, 40)
    sources = dict(_all_arrows(lifecycle, path))
    targets = max(len(name) for name in lifecycle.states)
    longest = max((len(", ".join(a.labels)) for arrows in sources.values() for a in arrows), default=0)
    steps = max((len(arrow.numbers) for arrows in sources.values() for arrow in arrows), default=0)
    column = max(12, min(longest, width - targets - 15 - steps))
    head = f"{lifecycle.name}: {lifecycle.description}" if lifecycle.description else lifecycle.name
    lines = textwrap.wrap(head, width)
    for state in lifecycle.states.values():
        mark = ">" if state.name == lifecycle.initial else " "
        kind = _kind(state)
        title = [*([kind] if kind else []), *_facts(state)]
        stays = _stays(state.name, path)
        name = paint(f"{state.name:<{targets}}", kind or "name" if stays or not path else "dim")
        lines += ["", f"{mark} {name}  {', '.join(title)}".rstrip()]
        lines += [f"    {paint(stay, 'taken')}" for stay in stays]
        lines += _text_arrows(sources[state.name], column, paint)
        if state.ignore:
            ignored = textwrap.wrap(f"ignores {', '.join(sorted(state.ignore))}", width - 4)
            lines += [f"    {paint(line, 'dim')}" for line in ignored]
    if lifecycle.any:
        lines += ["", f"  {paint('any other state', 'name')}", *_text_arrows(sources[""], column, paint)]
    if path:
        lines += ["", *_way(path)]
    return "\n".join(lines) + "\n"


def _text_arrows(arrows: Iterable[_Arrow], column: int, paint: _Painter) -> Iterator[str]:
    for arrow in arrows:
        *above, last = textwrap.wrap(", ".join(arrow.labels), column)
        yield from (f"    {line}" for line in above)
        tone = f"  {paint(arrow.tone, arrow.tone)}" if arrow.tone else ""
        steps = f"  {paint(arrow.numbers.rstrip(), 'taken')}" if arrow.steps else ""
        yield f"    {last:<{column}} -> {arrow.target}{tone}{steps}"


def _way(path: Path) -> Iterator[str]:
    """The path as a table: number, moment, state, how long, and what led on."""
    width = max(len(visit.state) for visit in path)
    yield "the way taken"
    for visit in path:
        seconds = "" if visit.seconds is None else f"{visit.seconds:.3f} s"
        line = f" (line {visit.line})" if visit.line else ""
        event = f"  {visit.event}{line}" if visit.event else ""
        where = f"{visit.number:>3}  {visit.at:>9.3f} s  {visit.state:<{width}}"
        yield f"  {where}  {seconds:>11}{event}".rstrip()


def _stays(state: str, path: Path) -> list[str]:
    """When the state was entered, and for how long, each time."""
    return [
        f"({v.number}) at {v.at:.3f} s" + (f", for {v.seconds:.3f} s" if v.seconds is not None else "")
        for v in path
        if v.state == state
    ]


def _all_arrows(lifecycle: Lifecycle, path: Path) -> Iterator[tuple[str, list[_Arrow]]]:
    """The arrows from each state in the file's order, then from `any` (no name)."""
    states = lifecycle.states
    for state in states.values():
        yield state.name, _arrows(state.on, [visit for visit in path if visit.state == state.name])
    if lifecycle.any:
        own = {state.name: state.on.keys() for state in states.values()}
        yield "", _arrows(lifecycle.any, [v for v in path if v.event not in own.get(v.state, ())])


def _arrows(table: Mapping[str, tuple[Arm, ...]], path: Path) -> list[_Arrow]:
    labels: dict[tuple[str, str], list[str]] = {}
    steps: dict[tuple[str, str], list[int]] = {}
    for event, arms in table.items():
        for arm in arms:
            key = arm.target, "fails" if arm.fail else "warns" if arm.warn else ""
            labels.setdefault(key, []).append(_label(event, arm, alone=len(arms) == 1))
            steps.setdefault(key, []).extend(visit.number for visit in path if _took(visit, event, arm))
    return [_Arrow(*key, tuple(found), tuple(sorted(steps[key]))) for key, found in labels.items()]


def _took(visit: Visit, event: str, arm: Arm) -> bool:
    return (visit.event, visit.target) == (event, arm.target) and visit.line in (0, arm.line)


def _label(event: str, arm: Arm, *, alone: bool) -> str:
    condition = "otherwise" if arm.when is None else _condition(arm.when)
    label = event if alone and arm.when is None else f"{event} [{condition}]"
    return f"{label} +{arm.count}" if arm.count else label


def _condition(guard: Guard) -> str:
    match guard.kind:
        case "data":
            return f"{guard.key} is {json_like(guard.value)}"
        case "verdict":
            return f"{guard.value} so far"
        case "below":
            return f"{guard.key} below {guard.value}"


def _facts(state: State) -> list[str]:
    """What a state does and how long that may take."""
    facts = [state.invoke] if state.invoke else []
    if state.timeout is not None:
        facts.append(f"at most {_duration(state.timeout)}")
    if state.idle is not None:
        facts.append(f"idle at most {_duration(state.idle)}")
    if state.retry is not None:
        facts.append(f"up to {state.retry.attempts} attempts")
    return facts


def _kind(state: State) -> str:
    return state.final or ("goal" if state.goal else "")


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("m", 60)):
        if seconds and seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds:g}s" if seconds >= 1 or not seconds else f"{seconds * 1000:g}ms"


def _mermaid_id(name: str, number: int) -> str:
    """The name where Mermaid can take it. No name of a state has capitals: the others cannot meet it."""
    return name if _SAFE.fullmatch(name) and name not in _MERMAID_WORDS else f"S{number}"


def _mermaid_text(words: str) -> str:
    """Mermaid ends a label at these; it reads `#58;` as the character of that number."""
    return re.sub(r'[#:;"\n]', lambda match: f"#{ord(match[0])};", words)


def _quoted(words: str) -> str:
    escaped = words.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


class _Painter(Protocol):
    def __call__(self, words: str, style: str) -> str: ...


def _paint(words: str, style: str) -> str:
    return f"{_STYLES[style]}{words}{_RESET}"


def _plain(words: str, style: str) -> str:
    return words
