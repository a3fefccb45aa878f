"""What an event would lead to in a state, by which line, and why not by another one. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kenaz_engine.lifecycle.findings import json_like
from kenaz_engine.lifecycle.machine import (
    Enter,
    Event,
    Finish,
    Restart,
    Snapshot,
    Table,
    UnexpectedEvent,
    Wait,
    holds,
)
from kenaz_engine.lifecycle.model import OUTCOMES, REQUESTS, TIMERS, Arm, Guard, Lifecycle, State
from kenaz_engine.lifecycle.vocabulary import Vocabulary
from kenaz_engine.session.vocabulary import VOCABULARY
from kenaz_engine.spec.schema import suggestion
from kenaz_engine.spec.units import format_duration

_VERDICT = "something failed before"


@dataclass(frozen=True, slots=True)
class Considered:
    """A transition that the event has, there or under `any`: its line, what it says, whether it is taken, and
    why it is, or is not."""

    line: int
    says: str
    taken: bool
    why: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `event` leads to in `state`. `leads_to` is empty where the session stays; `reason` is why nothing
    follows, as a journal says it; `line` is that of the transition taken (0: none)."""

    file: str
    state: str
    state_line: int
    event: str
    result: str
    leads_to: str
    reason: str
    line: int
    considered: tuple[Considered, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.file}:{self.line or self.state_line}: `{self.event}` in `{self.state}` {self.result}"
        ]
        if self.considered:
            width = max(len(arm.says) for arm in self.considered)
            lines += ["", *(f"  {_row(arm, width)}" for arm in self.considered)]
        if self.notes:
            lines += ["", *(f"  {note}" for note in self.notes)]
        return "\n".join(lines)

    def as_data(self) -> dict[str, Any]:
        """The explanation as plain JSON data."""
        return {
            "file": self.file,
            "state": self.state,
            "event": self.event,
            "result": self.result,
            "leadsTo": self.leads_to or None,
            "reason": self.reason or None,
            "line": self.line or None,
            "considered": [
                {"line": arm.line, "says": arm.says, "taken": arm.taken, "why": arm.why}
                for arm in self.considered
            ],
            "notes": list(self.notes),
        }


def _row(arm: Considered, width: int) -> str:
    mark = ">" if arm.taken else " "
    return (
        f"{mark} line {arm.line:<4} {arm.says:<{width}}  {'taken: ' if arm.taken else 'not taken: '}{arm.why}"
    )


def explain(
    lifecycle: Lifecycle,
    state: str,
    event: str,
    *,
    data: Mapping[str, Any] | None = None,
    failed: bool = False,
    counters: Mapping[str, int] | None = None,
    vocabulary: Vocabulary = VOCABULARY,
) -> Explanation:
    """What `event` with `data` would lead to in `state`, on its first attempt.

    `failed` says that something failed before, `counters` how often each was counted. The event is taken to
    be current: of this entry, of this state's activity, of a resource that is held. The state must exist.
    """
    at = lifecycle.states[state]
    snapshot = Snapshot(
        state,
        waiting=event == "retry.due" and at.retry is not None,
        attempt=2 if event == "retry.due" and at.retry is not None else 1,
        verdict=_VERDICT if failed else "",
        counters=counters or {},
    )
    given = Event(event, data or {})
    table = Table(lifecycle, vocabulary)
    try:
        decision = table.decide(snapshot, given)
    except UnexpectedEvent:
        result, leads_to, reason, line = "is a defect: the lifecycle is strict", "", "unexpected", 0
        waits = False
    else:
        reason, line = decision.reason, decision.arm
        effect = decision.effects[0] if decision.effects else None
        waits = isinstance(effect, Wait)
        leads_to = effect.state if isinstance(effect, Enter | Finish) else ""
        result = _result(lifecycle, at, event, reason, effect)
    considered = tuple(_considered(lifecycle, at, snapshot, given, waits=waits))
    notes = tuple(_notes(lifecycle, at, event, vocabulary, waits=waits))
    return Explanation(
        lifecycle.file, state, at.line, event, result, leads_to, reason, line, considered, notes
    )


def _result(
    lifecycle: Lifecycle, at: State, event: str, reason: str, effect: Enter | Wait | Restart | Finish | None
) -> str:
    match effect:
        case Enter():
            target = lifecycle.states[effect.state]
            again = ", entered anew" if target.name == at.name else ""
            return f"leads to `{target.name}`, which invokes {target.invoke}{again}"
        case Finish():
            return f"leads to `{effect.state}`, the end: {'success' if effect.success else 'failure'}"
        case Wait():
            assert at.retry is not None
            spread = f", give or take {at.retry.backoff.jitter:.0%}" if at.retry.backoff.jitter else ""
            wait = format_duration(effect.seconds)
            return f"stays: attempt 2 of {at.retry.attempts} comes after {wait}{spread}"
        case Restart():
            return f"stays: {at.invoke} is started again"
    return {
        "declared": "leads to nothing: the state ignores it",
        "finished": "leads to nothing: the state is final",
        "stale": "leads to nothing: the state has no `retry`, so that nothing is due",
        "unhandled": "leads to nothing: no transition is for it"
        if not lifecycle.arms(at, event)
        else "leads to nothing: no guard holds",
    }[reason]


def _considered(
    lifecycle: Lifecycle, at: State, snapshot: Snapshot, event: Event, *, waits: bool
) -> Iterator[Considered]:
    """The transitions in the order in which they are looked at, then those that are not even looked at."""
    taken: Arm | None = None
    settled = "retry admits the error, which comes first" if waits else ""
    for arm in lifecycle.arms(at, event.type):
        if settled:
            yield Considered(arm.line, _says(arm), False, settled)
        elif taken is not None:
            yield Considered(arm.line, _says(arm), False, f"line {taken.line} came first")
        elif arm.when is None:
            taken = arm
            yield Considered(arm.line, _says(arm), True, "it has no guard")
        else:
            if holds(arm.when, snapshot, event):
                taken = arm
            yield Considered(arm.line, _says(arm), taken is arm, _seen(arm.when, snapshot, event))
    hidden = "`on`" if event.type in at.on else "`ignore`" if event.type in at.ignore else ""
    why = f"the state's own entry under {hidden} hides `any`" if hidden else "the state is final"
    if hidden or at.final:
        for arm in lifecycle.any.get(event.type, ()):
            yield Considered(arm.line, f"any: {_says(arm)}", False, why)


def _says(arm: Arm) -> str:
    parts = [f"to `{arm.target}`"]
    if arm.when is not None:
        parts.append(f"when {_condition(arm.when)}")
    parts += [f'fail "{arm.fail}"'] if arm.fail else []
    parts += [f'warn "{arm.warn}"'] if arm.warn else []
    parts += [f"count {arm.count}"] if arm.count else []
    return ", ".join(parts)


def _condition(guard: Guard) -> str:
    match guard.kind:
        case "data":
            return f"data.{guard.key} is {json_like(guard.value)}"
        case "verdict":
            return f"the verdict is {guard.value}"
        case "below":
            return f"{guard.key} is below {guard.value}"


def _seen(guard: Guard, snapshot: Snapshot, event: Event) -> str:
    """What the guard looked at, as it was found."""
    match guard.kind:
        case "data" if guard.key not in event.data:
            return f"the event has no {guard.key}"
        case "data":
            value = event.data[guard.key]
            return (
                f"data.{guard.key} is {value!r}"
                if isinstance(value, str)
                else f"data.{guard.key} is {json_like(value)}"
            )
        case "verdict":
            return f"the verdict is {'failure' if snapshot.verdict else 'success'} so far"
        case "below":
            return f"{guard.key} is {snapshot.counters.get(guard.key, 0)}"


def _notes(
    lifecycle: Lifecycle, at: State, event: str, vocabulary: Vocabulary, *, waits: bool
) -> Iterator[str]:
    if waits:
        assert at.retry is not None
        yield f"After attempt {at.retry.attempts}, or when `retry.when` does not hold, these count."
    elif event == "error" and at.retry is not None and at.retry.when is not None:
        yield f"`retry` admits an error when {_condition(at.retry.when)}: --data says so."
    raiser = vocabulary.raiser(event)
    known = {*OUTCOMES, *TIMERS, *REQUESTS, "internal.error"}
    known |= {name for resource in vocabulary.resources.values() for name in resource.raises}
    if raiser is not None:
        yield f"`{event}` arises only while {raiser.name} is held, or may be."
    elif event not in known:
        hint = suggestion(event, known)
        yield f"Nothing raises `{event}`" + (f" ({hint})." if hint else ".")
    elif event == "timeout" and at.timeout is None and not at.final:
        yield "The state has no timeout, so that this event cannot arise there."
    elif event == "idle" and at.idle is None:
        yield "The state has no `idle`, so that this event cannot arise there."
