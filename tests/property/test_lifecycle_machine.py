"""The pure core on random lifecycles and random events, against a reference that is nothing but a loop."""

from __future__ import annotations

import copy
import json
from importlib import resources
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kenaz_engine.lifecycle.loader import load_lifecycle
from kenaz_engine.lifecycle.machine import (
    Decision,
    Enter,
    Event,
    Finish,
    Machine,
    Restart,
    Snapshot,
    Table,
    Wait,
)
from kenaz_engine.lifecycle.model import Arm, Backoff, Guard, Lifecycle, Retry, State
from kenaz_engine.lifecycle.recorded import decision_fields, event_fields, event_from
from kenaz_engine.session.vocabulary import VOCABULARY

STATES = ("a", "b", "c")
FINALS = ("good", "bad")
EVENTS = (
    "done",
    "error",
    "timeout",
    "idle",
    "end",
    "abort",
    "vm.exited",
    "guest.panic",
    "channel.lost",
    "zork",
)

GUARDS = st.one_of(
    st.builds(
        Guard, st.just("data"), st.sampled_from(["clean", "transient"]), st.sampled_from([True, False, 1])
    ),
    st.builds(Guard, st.just("verdict"), st.just(""), st.sampled_from(["success", "failure"])),
    st.builds(Guard, st.just("below"), st.sampled_from(["n", "m"]), st.integers(1, 3)),
)
ARMS = st.builds(
    Arm,
    target=st.sampled_from((*STATES, *STATES, *FINALS)),
    when=st.none() | GUARDS,
    fail=st.sampled_from(["", "", "broke"]),
    warn=st.sampled_from(["", "odd"]),
    count=st.sampled_from(["", "n", "m"]),
    line=st.integers(1, 999),
)
TABLES = st.dictionaries(
    st.sampled_from(EVENTS), st.lists(ARMS, min_size=1, max_size=3).map(tuple), max_size=len(EVENTS)
)
RETRIES = st.builds(Retry, st.integers(1, 3), st.none() | GUARDS, st.just(Backoff()))


@st.composite
def lifecycles(draw: st.DrawFn) -> Lifecycle:
    states = {
        name: State(
            name,
            invoke=draw(st.sampled_from(["work", "play"])),
            on=draw(TABLES),
            ignore=frozenset(draw(st.sets(st.sampled_from(EVENTS), max_size=2))),
            retry=draw(st.none() | RETRIES),
        )
        for name in STATES
    }
    states |= {"good": State("good", final="success"), "bad": State("bad", final="failure")}
    return Lifecycle("random", "a", states, any=draw(TABLES))


DATA = st.fixed_dictionaries(
    {},
    optional={
        "clean": st.sampled_from([True, False, 1]),
        "transient": st.booleans(),
        "message": st.sampled_from(["", "why"]),
        "acquired": st.dictionaries(st.sampled_from(["vm", "channel"]), st.integers(1, 5), max_size=2),
        "left": st.sampled_from([[], ["disk"]]),
    },
)
SKETCHES = st.tuples(
    st.sampled_from((*EVENTS, "retry.due", "guest.bye")),
    DATA,
    st.sampled_from([None, None, 0, 0, -1, 1]),
    st.sampled_from(["", "", "work", "vm.start"]),
    st.none() | st.integers(1, 5),
)
"""An event but for its entry, which is told relative to the current one."""


def standard() -> Lifecycle:
    source = resources.files("kenaz_specs") / "lifecycles" / "standard.yaml"
    return load_lifecycle(source.read_text("utf-8"), "standard.yaml")


STANDARD = Machine(standard(), VOCABULARY)


def event_of(sketch: tuple[Any, ...], at: Snapshot) -> Event:
    kind, data, offset, activity, ledger_id = sketch
    return Event(kind, data, None if offset is None else at.entry + offset, activity, ledger_id)


def check(machine: Machine, sketches: list[tuple[Any, ...]]) -> list[tuple[Event, Decision]]:
    """Decides them all, and asserts of each decision what must always hold."""
    at = machine.start().snapshot
    made = []
    for sketch in sketches:
        event = event_of(sketch, at)
        before = copy.deepcopy((at, event))
        decision = machine.decide(at, event)
        assert (at, event) == before, "a snapshot or an event was changed"
        after = decision.snapshot
        moved = any(isinstance(effect, Enter | Finish) for effect in decision.effects)
        assert after.entry == at.entry + moved
        assert len(decision.effects) <= 1
        assert decision.ignored == (not decision.effects)
        match decision.effects:
            case (Enter(state, entry),):
                assert (state, entry, after.attempt, after.waiting) == (after.state, after.entry, 1, False)
                assert not machine.lifecycle.states[state].final
            case (Finish(state, success),):
                assert machine.lifecycle.states[state].final == ("success" if success else "failure")
            case (Wait(),):
                assert (after.attempt, after.waiting) == (at.attempt + 1, True)
            case (Restart(attempt),):
                assert (attempt, at.waiting, after.waiting) == (at.attempt, True, False)
            case _:
                assert (after.state, after.verdict, after.counters) == (at.state, at.verdict, at.counters)
        assert not at.verdict or after.verdict == at.verdict, "the first failure is the verdict"
        assert after.also[: len(at.also)] == at.also
        assert all(after.counters[name] >= count for name, count in at.counters.items())
        made.append((event, decision))
        at = after
    return made


@given(st.lists(SKETCHES, max_size=40))
def test_any_events_on_standard(sketches: list[tuple[Any, ...]]) -> None:
    check(STANDARD, sketches)


@given(lifecycles(), st.lists(SKETCHES, max_size=20))
def test_any_events_on_any_lifecycle(lifecycle: Lifecycle, sketches: list[tuple[Any, ...]]) -> None:
    check(Machine(lifecycle, VOCABULARY), sketches)


@given(lifecycles(), st.lists(SKETCHES, max_size=20))
def test_recorded_events_lead_to_the_same_decisions(
    lifecycle: Lifecycle, sketches: list[tuple[Any, ...]]
) -> None:
    """A replay stands on this: an event survives the journal's form, and its table decides the same."""
    made = check(Machine(lifecycle, VOCABULARY), sketches)
    again = Table(lifecycle, VOCABULARY)
    at = again.start().snapshot
    for event, decision in made:
        replayed = again.decide(at, event_from(json.loads(json.dumps(event_fields(event)))))
        assert decision_fields(replayed) == decision_fields(decision)
        assert replayed == decision
        at = replayed.snapshot


def holds(guard: Guard | None, at: Snapshot, event: Event) -> bool:
    if guard is None:
        return True
    if guard.kind == "data":
        found = event.data.get(guard.key)
        return found == guard.value and isinstance(found, bool) == isinstance(guard.value, bool)
    if guard.kind == "verdict":
        return (at.verdict == "") == (guard.value == "success")
    return at.counters.get(guard.key, 0) < int(guard.value)


@given(lifecycles(), st.lists(SKETCHES, max_size=20))
def test_the_first_transition_that_holds_is_taken(
    lifecycle: Lifecycle, sketches: list[tuple[Any, ...]]
) -> None:
    """From top to bottom; a state's own entry for an event hides that of `any`; finals have none."""
    machine = Machine(lifecycle, VOCABULARY)
    at = machine.start().snapshot
    for event, decision in check(machine, sketches):
        state = lifecycle.states[at.state]
        taken = decision.effects and isinstance(decision.effects[0], Enter | Finish)
        if taken or decision.reason in ("unhandled", "declared"):
            own = state.on.get(event.type, () if event.type in state.ignore else None)
            arms = lifecycle.any.get(event.type, ()) if own is None else own
            arm = next((arm for arm in arms if holds(arm.when, at, event)), None)
            assert bool(taken) == (arm is not None)
            if arm is not None:
                assert (decision.snapshot.state, decision.arm) == (arm.target, arm.line)
                assert decision.snapshot.counters.get(arm.count, 0) == (
                    at.counters.get(arm.count, 0) + 1 if arm.count else 0
                )
        at = decision.snapshot
