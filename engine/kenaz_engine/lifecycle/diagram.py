"""Pictures of a lifecycle: for Mermaid, for Graphviz, and for a terminal. Pure and deterministic.

Arrows with the same ends are one arrow. What spoils the session is told from what only warns.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from kenaz_engine.lifecycle.findings import json_like
from kenaz_engine.lifecycle.model import Arm, Guard, Lifecycle, State

_RESET = "\x1b[0m"
_STYLES = {
    "name": "\x1b[1m",
    "goal": "\x1b[1;32m",
    "success": "\x1b[1;32m",
    "failure": "\x1b[1;31m",
    "fails": "\x1b[31m",
    "warns": "\x1b[33m",
    "dim": "\x1b[2m",
}

_SAFE = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_MERMAID_WORDS = frozenset({"state", "end", "note", "direction", "class", "classDef", "style", "click", "as"})


@dataclass(frozen=True, slots=True)
class _Arrow:
    """All transitions from one place to one target with the same tone (`fails`, `warns` or empty)."""

    target: str
    tone: str
    labels: tuple[str, ...]


def mermaid(lifecycle: Lifecycle) -> str:
    """A `stateDiagram-v2`, as it goes into a fenced block of Markdown."""
    ids = {name: _mermaid_id(name, i) for i, name in enumerate(lifecycle.states)}
    lines = ["stateDiagram-v2", f"    [*] --> {ids[lifecycle.initial]}"]
    for state in lifecycle.states.values():
        lines.append(f'    state "{_mermaid_text(state.name)}" as {ids[state.name]}')
        if facts := _facts(state):
            lines.append(f"    {ids[state.name]}: {_mermaid_text(', '.join(facts))}")
    if lifecycle.any:
        lines.append('    state "any state" as ANY')
    for source, arrows in _all_arrows(lifecycle):
        for arrow in arrows:
            label = _mermaid_text(", ".join(arrow.labels)) + (f" ({arrow.tone})" if arrow.tone else "")
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
    return "\n".join(lines) + "\n"


def dot(lifecycle: Lifecycle) -> str:
    """A digraph for Graphviz. Dashed arrows fail, dotted ones warn."""
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
        label = "\n".join([state.name, *_facts(state)])
        lines.append(f"    {_quoted(state.name)} [label={_quoted(label)}{looks[_kind(state)]}];")
    if lifecycle.any:
        lines.append('    " any" [label="any state", style="rounded,dashed"];')
    tones = {"fails": ', style=dashed, color="#cc3333"', "warns": ", style=dotted", "": ""}
    for source, arrows in _all_arrows(lifecycle):
        for arrow in arrows:
            ends = f"{_quoted(source or ' any')} -> {_quoted(arrow.target)}"
            label = _quoted("\n".join(arrow.labels))
            lines.append(f"    {ends} [label={label}{tones[arrow.tone]}];")
    return "\n".join([*lines, "}"]) + "\n"


def text(lifecycle: Lifecycle, *, width: int, colour: bool = False) -> str:
    """For a terminal of `width` columns: the states in the file's order, each with what it does, how long it
    may take, and where its events lead. `colour` adds ANSI sequences and changes nothing else."""
    paint = _paint if colour else _plain
    width = max(width, 40)
    sources = dict(_all_arrows(lifecycle))
    targets = max(len(name) for name in lifecycle.states)
    longest = max((len(", ".join(a.labels)) for arrows in sources.values() for a in arrows), default=0)
    column = max(12, min(longest, width - targets - 15))
    head = f"{lifecycle.name}: {lifecycle.description}" if lifecycle.description else lifecycle.name
    lines = textwrap.wrap(head, width)
    for state in lifecycle.states.values():
        mark = ">" if state.name == lifecycle.initial else " "
        kind = _kind(state)
        title = [*([kind] if kind else []), *_facts(state)]
        name = paint(f"{state.name:<{targets}}", kind or "name")
        lines += ["", f"{mark} {name}  {', '.join(title)}".rstrip()]
        lines += _text_arrows(sources[state.name], column, paint)
        if state.ignore:
            ignored = textwrap.wrap(f"ignores {', '.join(sorted(state.ignore))}", width - 4)
            lines += [f"    {paint(line, 'dim')}" for line in ignored]
    if lifecycle.any:
        lines += ["", f"  {paint('any other state', 'name')}", *_text_arrows(sources[""], column, paint)]
    return "\n".join(lines) + "\n"


def _text_arrows(arrows: Iterable[_Arrow], column: int, paint: _Painter) -> Iterator[str]:
    for arrow in arrows:
        *above, last = textwrap.wrap(", ".join(arrow.labels), column)
        yield from (f"    {line}" for line in above)
        tone = f"  {paint(arrow.tone, arrow.tone)}" if arrow.tone else ""
        yield f"    {last:<{column}} -> {arrow.target}{tone}"


def _all_arrows(lifecycle: Lifecycle) -> Iterator[tuple[str, list[_Arrow]]]:
    """The arrows from each state in the file's order, then from `any` (no name)."""
    for state in lifecycle.states.values():
        yield state.name, _arrows(state.on)
    if lifecycle.any:
        yield "", _arrows(lifecycle.any)


def _arrows(table: Mapping[str, tuple[Arm, ...]]) -> list[_Arrow]:
    labels: dict[tuple[str, str], list[str]] = {}
    for event, arms in table.items():
        for arm in arms:
            tone = "fails" if arm.fail else "warns" if arm.warn else ""
            label = _label(event, arm, alone=len(arms) == 1)
            labels.setdefault((arm.target, tone), []).append(label)
    return [_Arrow(target, tone, tuple(found)) for (target, tone), found in labels.items()]


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
