"""What must hold of every session, whatever goes wrong in it.

The lifecycle is not asked what it thinks of itself: each law looks at the records of a run, and at what
really exists in its world. docs/reference/scenario.md lists the laws.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from kenaz_engine.lifecycle.analysis import abort_bound
from kenaz_engine.lifecycle.analysis.bound import SWEEP
from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.lifecycle.vocabulary import Vocabulary
from kenaz_engine.replay.script import activity_of

LAWS: Final[Mapping[str, str]] = {
    "final": "a session comes to a final state",
    "deadline": "no state lasts longer than its deadline and its clean-up",
    "abort": "an abort ends the session within the bound that `validate` prints",
    "needs": "what an activity needs is held, and not lost, when it starts",
    "heard": "every event that arises is handled or ignored",
    "told": "no error, timeout, alarm or loss passes without a verdict or a warning",
    "order": "what is acquired last is released first, and nothing while it is used",
    "released": "the lifecycle itself gives everything back before its final state",
    "left": "nothing is left that could have been released",
    "forgotten": "nothing exists that the ledger does not hold",
    "goal": "a success passes a goal",
    "verdict": "the final state agrees with the verdict",
    "internal": "the launcher itself makes no mistake",
}
"""Every law, by the name under which a breach of it is told."""

TOLERANCE: Final = 1e-3
"""Seconds by which a time may be off: records are rounded."""


@dataclass(frozen=True, slots=True, order=True)
class Breach:
    """A law that a session broke: in which state, after which event, when (virtual seconds), and how."""

    law: str
    state: str
    event: str
    t: float
    message: str

    def __str__(self) -> str:
        return f"{self.law}: {self.message}"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a run's records do not tell. `things` are the resources that still exist, `hampered` the ledger
    ids whose release the script spoiled in the sweep, `aborted` the moment of the first abort."""

    endless: str
    things: frozenset[str]
    hampered: frozenset[int]
    aborted: float


class Laws:
    """The laws for sessions on one lifecycle.

    `bound` is that of an abort (seconds), `hopeful` are the states from which a goal can still be reached,
    and a session with more than `most_events` goes round for ever.
    """

    def __init__(self, lifecycle: Lifecycle, vocabulary: Vocabulary) -> None:
        self.lifecycle = lifecycle
        self.vocabulary = vocabulary
        self.bound = abort_bound(lifecycle, vocabulary).seconds
        resources = vocabulary.resources.values()
        self.losses = {event: r.name for r in resources for event in r.loses}
        self.grave = {"error", "timeout", "internal.error", *(event for r in resources for event in r.alarms)}
        self.activities = {
            state.name: activity_of(lifecycle, vocabulary, state.name)
            for state in lifecycle.states.values()
            if not state.final
        }
        self.hopeful = _hopeful(lifecycle)
        self.most_events = 500 + 20 * _rounds(lifecycle)

    def check(self, records: list[dict[str, Any]], facts: Facts) -> list[Breach]:
        """Every breach, in order of time. The last record is the session's `end`."""
        breaches = [*_Reading(self, facts).read(records)]
        # Whoever breaks off a session that does not end breaks other laws thereby.
        return [breach for breach in breaches if breach.law == "final"] or breaches


def _hopeful(lifecycle: Lifecycle) -> frozenset[str]:
    """The states from which a goal can still be reached, goals included."""
    leading = {state.name for state in lifecycle.states.values() if state.goal}
    while more := {
        state.name
        for state in lifecycle.states.values()
        if state.name not in leading
        for event in {*state.on, *lifecycle.any}
        for arm in lifecycle.arms(state, event)
        if arm.target in leading
    }:
        leading |= more
    return frozenset(leading)


def _rounds(lifecycle: Lifecycle) -> int:
    """How often a session may go round, at most: attempts, and what counters bound."""
    tables = [lifecycle.any, *(state.on for state in lifecycle.states.values())]
    guards = [arm.when for table in tables for arms in table.values() for arm in arms]
    counted = sum(int(guard.value) for guard in guards if guard and guard.kind == "below")
    return counted + sum(state.retry.attempts for state in lifecycle.states.values() if state.retry)


@dataclass(slots=True)
class _Held:
    """What the records say of a ledger entry."""

    resource: str
    uses: frozenset[int]
    acquired: bool = False
    failed: bool = False
    lost: bool = False


@dataclass(slots=True)
class _Reading:
    laws: Laws
    facts: Facts
    state: str = ""
    entered: float = 0.0
    goal: bool = False
    last: int = 0
    discharged: int = 0
    event: Mapping[str, Any] = field(default_factory=dict)
    before: Mapping[str, Any] = field(default_factory=dict)
    held: dict[int, _Held] = field(default_factory=dict)

    def read(self, records: list[dict[str, Any]]) -> Iterator[Breach]:
        for record in records:
            match record["kind"]:
                case "entered":
                    yield from self._left(record["t"])
                    yield from self._enter(record)
                case "event":
                    self.event = record
                case "decision":
                    yield from self._decide(record)
                case "intent":
                    self.last = record["id"]
                    self.held[record["id"]] = _Held(record["resource"], frozenset(record["uses"]))
                case "acquired":
                    self.held[record["id"]].acquired = True
                case "note" if record["about"] == "release":
                    self.held[record["id"]].failed = True
                case "released":
                    yield from self._release(record)
                case "end":
                    yield from self._end(record)

    def _breach(self, law: str, t: float, message: str) -> Breach:
        return Breach(law, self.state, self.event.get("type", ""), t, message)

    def _left(self, t: float, more: float = 0.0) -> Iterator[Breach]:
        state = self.laws.lifecycle.states.get(self.state)
        if state is None or state.timeout is None:
            return
        if t > self.entered + state.timeout + state.cleanup + more + TOLERANCE:
            message = f"`{self.state}` lasts {t - self.entered:g} s, its deadline is {state.timeout:g} s"
            yield self._breach("deadline", t, message)

    def _enter(self, record: Mapping[str, Any]) -> Iterator[Breach]:
        self.state, self.entered = record["state"], record["t"]
        self.goal = self.goal or self.laws.lifecycle.states[self.state].goal
        for name in sorted(self.laws.activities[self.state].needs):
            newest = next((h for h in reversed(self.held.values()) if h.resource == name), None)
            if newest is None or not newest.acquired or newest.lost:
                how = "is lost" if newest and newest.lost else "is not held"
                activity = record["activity"]
                message = f"`{self.state}` starts {activity}, which needs the {name}, and that {how}"
                yield self._breach("needs", record["t"], message)

    def _decide(self, record: Mapping[str, Any]) -> Iterator[Breach]:
        event, before, laws, t = self.event, self.before, self.laws, record["t"]
        kind, reason = event["type"], record.get("reason", "")
        self.before = record
        if reason == "unhandled" and kind != "internal.error":
            yield self._breach("heard", t, f"`{self.state}` neither handles nor ignores `{kind}`")
        if reason in ("stale", "foreign"):
            return
        if (resource := laws.losses.get(kind)) is not None:
            lost = laws.vocabulary.lost_with(resource)
            for held in self.held.values():
                held.lost = held.lost or held.resource in lost
        if record["entry"] == before.get("entry", 1):
            return
        grave = kind in laws.grave or (kind in laws.losses and self.state in laws.hopeful)
        told = ("verdict", "also", "warnings")
        if grave and all(record.get(name) == before.get(name) for name in told):
            target = record["state"]
            yield self._breach("told", t, f"`{kind}` leads from `{self.state}` to `{target}` untold")
        if laws.activities[self.state].releases_all and kind in ("done", "error", "timeout"):
            self.discharged = self.last
        if laws.lifecycle.states[record["state"]].final:
            for number, held in self.held.items():
                if not held.failed and number > self.discharged:
                    message = f"the {held.resource} is still held when `{record['state']}` is reached"
                    yield self._breach("released", t, message)

    def _release(self, record: Mapping[str, Any]) -> Iterator[Breach]:
        number, t = record["id"], record["t"]
        released = self.held.pop(number)
        for other, held in self.held.items():
            if number in held.uses:
                message = f"the {released.resource} is released while the {held.resource} uses it"
                yield self._breach("order", t, message)
            elif other > number and not held.failed and not self._replaces():
                message = f"the {released.resource} is released before the {held.resource}"
                yield self._breach("order", t, message)

    def _replaces(self) -> bool:
        activity = self.laws.activities.get(self.state)
        return activity is not None and bool(activity.replaces)

    def _end(self, record: Mapping[str, Any]) -> Iterator[Breach]:
        facts, t = self.facts, record["t"]
        final = self.laws.lifecycle.states[record["state"]].final
        verdict = record.get("verdict", "")
        yield from self._left(t, SWEEP)
        if facts.endless or final is None:
            yield self._breach("final", t, f"the session {facts.endless or 'stops'} in `{record['state']}`")
        elif internal := record.get("internal"):
            yield self._breach("internal", t, internal)
        if final == "success" and not self.goal:
            yield self._breach("goal", t, f"`{record['state']}` is a success, and no goal was passed")
        if final == "success" and verdict:
            yield self._breach("verdict", t, f"`{record['state']}` is a success, and yet: {verdict}")
        if final == "failure" and not verdict:
            yield self._breach("verdict", t, f"`{record['state']}` is a failure, and nothing failed")
        if t > facts.aborted + self.laws.bound + TOLERANCE:
            message = f"{t - facts.aborted:g} s from abort to end, {self.laws.bound:g} s are promised"
            yield self._breach("abort", t, message)
        yield from self._remains(record)

    def _remains(self, record: Mapping[str, Any]) -> Iterator[Breach]:
        left = {entry["id"]: entry for entry in record["left"]}
        excused = set(self.facts.hampered)
        # What something unreleased uses is newer than none that uses it: one pass, newest first, is enough.
        for number in sorted(left, reverse=True):
            if number in excused and number in self.held:
                excused |= self.held[number].uses
        for number, entry in left.items():
            if number not in excused:
                message = f"the {entry['resource']} is left: {entry['error']}"
                yield self._breach("left", record["t"], message)
        for name in sorted(self.facts.things - {entry["resource"] for entry in left.values()}):
            yield self._breach(
                "forgotten", record["t"], f"the {name} exists, and the ledger does not hold it"
            )
