"""Runs scenarios, and says what came out otherwise than expected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from kenaz_engine import __version__
from kenaz_engine.journal.records import FORMAT, GENESIS, encode
from kenaz_engine.lifecycle.recorded import lifecycle_fields
from kenaz_engine.replay.laws import LAWS, Breach
from kenaz_engine.replay.scenario import Scenario
from kenaz_engine.replay.stage import Played, Stage
from kenaz_engine.session.runner import Outcome
from kenaz_engine.spec.units import format_duration


@dataclass(frozen=True, slots=True)
class Step:
    """A state that was entered: when (virtual seconds), by which event, by which line of the lifecycle."""

    state: str
    t: float
    event: str = ""
    line: int = 0


@dataclass(frozen=True, slots=True)
class ScenarioResult:
    """What came of a scenario. `failures` are readable, each of one or more lines; empty when all is well.

    `records` are those of the session's journal, without its header.
    """

    scenario: Scenario
    outcome: Outcome
    path: tuple[Step, ...]
    failures: tuple[str, ...]
    breaches: tuple[Breach, ...]
    records: tuple[dict[str, Any], ...]

    @property
    def ok(self) -> bool:
        """True when everything came as expected and no law was broken."""
        return not self.failures

    def journal(self) -> bytes:
        """The session's journal, as a file that `replay` reads. It is the same whenever and wherever it is
        made."""
        header = {
            "seq": 0,
            "t": 0.0,
            "wall": 0.0,
            "kind": "header",
            "format": FORMAT,
            "session": self.scenario.name,
            "launcher": __version__,
            "spec": {"metadata": {"name": self.scenario.name}},
            **lifecycle_fields(self.scenario.lifecycle),
            "driver": "simulated",
        }
        lines, prev = [], GENESIS
        for record in (header, *({**record, "seq": record["seq"] + 1} for record in self.records)):
            line, prev = encode(record, prev)
            lines.append(line)
        return b"".join(lines)


def run_scenario(scenario: Scenario) -> ScenarioResult:
    """Runs a scenario in virtual time: the real runner, inbox and ledger, in a made-up world."""
    played = Stage(scenario.lifecycle, scenario.vocabulary).play(scenario.script)
    path = tuple(_steps(played))
    excused = scenario.expect.left is not None
    broken = [breach for breach in played.breaches if not (excused and breach.law == "left")]
    failures = [
        *_unexpected(scenario, played.outcome, path),
        *(f"{LAWS[breach.law]}: {breach.message} (at {clock(breach.t)})" for breach in broken),
    ]
    return ScenarioResult(
        scenario, played.outcome, path, tuple(failures), tuple(broken), tuple(played.records)
    )


def clock(seconds: float) -> str:
    """A moment of virtual time, to the millisecond."""
    return format_duration(seconds)


def _steps(played: Played) -> Iterator[Step]:
    times = iter(played.path)
    state, t = next(times)
    yield Step(state, t)
    event, entry = "", 1
    for record in played.records:
        if record["kind"] == "event":
            event = record["type"]
        elif record["kind"] == "decision" and record["entry"] != entry:
            entry = record["entry"]
            state, t = next(times, (record["state"], record["t"]))
            yield Step(state, t, event, record.get("arm", 0))


def _unexpected(scenario: Scenario, outcome: Outcome, path: tuple[Step, ...]) -> Iterator[str]:
    expect = scenario.expect
    if expect.path is not None and expect.path != tuple(step.state for step in path):
        yield "\n".join(["the path is another:", *_diff(expect.path, path)])
    for name, wanted, got in (
        ("final state", expect.state, outcome.state),
        ("verdict", expect.verdict, outcome.verdict),
        ("later failures", expect.also, outcome.also),
        ("warnings", expect.warnings, outcome.warnings),
    ):
        if wanted is not None and wanted != got:
            yield f"the {name}: expected {_shown(wanted)}, got {_shown(got)}"
    if expect.at_least is not None and outcome.seconds < expect.at_least:
        yield f"it lasts {clock(outcome.seconds)}, expected at least {clock(expect.at_least)}"
    if expect.at_most is not None and outcome.seconds > expect.at_most:
        yield f"it lasts {clock(outcome.seconds)}, expected at most {clock(expect.at_most)}"
    left = sorted(entry.resource for entry in outcome.left)
    if expect.left is not None and sorted(expect.left) != left:
        yield f"what is left: expected {_shown(tuple(sorted(expect.left)))}, got {_shown(tuple(left))}"


def _shown(value: str | tuple[str, ...]) -> str:
    if isinstance(value, str):
        return f'"{value}"' if value else "none"
    return "; ".join(f'"{text}"' for text in value) or "none"


def _diff(expected: tuple[str, ...], path: tuple[Step, ...]) -> Iterator[str]:
    """The two paths beside each other, with the times of what happened."""
    got = [step.state for step in path]
    width = max(map(len, (*expected, *got)))
    times = [clock(step.t) for step in path]
    column = max(map(len, times))

    def happened(index: int, mark: str) -> str:
        step = path[index]
        why = f"by {step.event}" if step.event else ""
        line = f", line {step.line}" if step.line else ""
        return f"  {mark} {times[index]:>{column}}  {step.state:<{width}}  {why}{line}".rstrip()

    for kind, a1, a2, b1, b2 in SequenceMatcher(None, expected, got, autojunk=False).get_opcodes():
        if kind == "equal":
            yield from (happened(index, " ") for index in range(b1, b2))
            continue
        yield from (f"  - {'':>{column}}  {state:<{width}}  was expected" for state in expected[a1:a2])
        yield from (happened(index, "+") for index in range(b1, b2))
