"""The pure core: what each rule of the lifecycle's semantics means for `decide`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kenaz_engine.lifecycle.machine import (
    Enter,
    Event,
    Finish,
    Machine,
    Restart,
    Snapshot,
    UnexpectedEvent,
    Wait,
)
from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.lifecycle.recorded import decision_fields, event_fields, event_from
from kenaz_engine.lifecycle.vocabulary import Resource, Vocabulary

WITHIN = Vocabulary(
    {},
    {
        "thing": Resource(
            "thing", raises=frozenset({"thing.lost", "thing.alarm"}), loses=frozenset({"thing.lost"})
        ),
        "part": Resource(
            "part", raises=frozenset({"part.lost"}), loses=frozenset({"part.lost"}), within="thing"
        ),
        "crumb": Resource("crumb", raises=frozenset({"crumb.bye"}), within="part"),
    },
)

LOOP = """
    initial: a
    states:
      a:
        invoke: work
        timeout: 10s
        retry: {attempts: 3, when: {data: {transient: true}}, backoff: {first: 1s, factor: 2, max: 3s}}
        ignore: [thing.alarm]
        on:
          done: b
          error: {target: b, fail: a failed}
          timeout: {target: b, fail: a was slow}
          part.lost: {target: b, warn: part gone}
          go: [{target: b, when: {below: {rounds: 2}}, count: rounds}, {target: ended}]
      b:
        invoke: work
        timeout: 10s
        on:
          done: a
          error: {target: a, fail: b failed}
          timeout: {target: a, fail: b was slow}
          check: [{target: ended, when: {verdict: success}}, {target: failed, when: {verdict: failure}}]
          ask: [{target: ended, when: {data: {answer: true}}}, {target: failed, when: {data: {answer: 1}}}]
          thing.lost: {target: a, fail: thing gone}
      ended: {final: success}
      failed: {final: failure}
    any:
      thing.lost: {target: b, warn: lost}
      thing.alarm: {target: b, fail: alarm}
      abort: {target: failed, fail: aborted}
"""

Build = Callable[[str], Lifecycle]


@pytest.fixture
def machine(lifecycle: Build) -> Machine:
    return Machine(lifecycle(LOOP), WITHIN)


def outcome(kind: str, snapshot: Snapshot, **data: Any) -> Event:
    return Event(kind, data, entry=snapshot.entry, activity="work")


def test_start_enters_the_initial_state(machine: Machine) -> None:
    assert machine.start().snapshot == Snapshot("a")
    assert machine.start().effects == (Enter("a", 1),)


def test_entries_are_numbered(machine: Machine) -> None:
    """Each entry into a state has a number, one more than the last, also for the same state again."""
    at = machine.start().snapshot
    for entry in (2, 3, 4):
        decision = machine.decide(at, outcome("done", at))
        at = decision.snapshot
        assert at.entry == entry
        assert decision.effects == (Enter(at.state, entry),)


@pytest.mark.parametrize("kind", ["done", "error", "timeout", "idle", "retry.due"])
@pytest.mark.parametrize("entry", [1, 3])
def test_outcomes_and_timers_of_another_entry_are_stale(machine: Machine, kind: str, entry: int) -> None:
    """They carry the entry that they belong to, and lead to nothing in any other."""
    at = Snapshot("a", entry=2)
    decision = machine.decide(at, Event(kind, entry=entry, activity="work" if kind == "done" else ""))
    assert decision.reason == "stale"
    assert decision.ignored
    assert decision.snapshot is at
    assert decision.effects == ()


def test_outcome_of_another_activity_is_foreign(machine: Machine) -> None:
    """On a replay with another lifecycle the entry may fit although the activity does not."""
    at = machine.start().snapshot
    assert machine.decide(at, Event("done", entry=1, activity="other")).reason == "foreign"


def test_final_states_take_nothing(machine: Machine) -> None:
    assert machine.decide(Snapshot("ended"), Event("abort")).reason == "finished"


def test_unhandled_event_leads_to_nothing(machine: Machine) -> None:
    assert machine.decide(Snapshot("a"), Event("zork")).reason == "unhandled"


def test_strict_lifecycle_raises_for_an_unhandled_event(lifecycle: Build) -> None:
    strict = Machine(replace(lifecycle(LOOP), strict=True), WITHIN)
    with pytest.raises(UnexpectedEvent, match=r"'a'.*'zork'"):
        strict.decide(Snapshot("a"), Event("zork"))
    assert strict.decide(Snapshot("a"), Event("thing.alarm")).reason == "declared"


def test_ignore_opts_out_of_any(machine: Machine) -> None:
    assert machine.decide(Snapshot("a"), Event("thing.alarm")).reason == "declared"
    assert machine.decide(Snapshot("b"), Event("thing.alarm")).snapshot.verdict == "alarm"


def test_own_transitions_hide_any(machine: Machine) -> None:
    """A state's own entry for an event hides that of `any` entirely."""
    assert machine.decide(Snapshot("a"), Event("thing.lost")).snapshot.warnings == ("lost",)
    own = machine.decide(Snapshot("b"), Event("thing.lost")).snapshot
    assert (own.state, own.verdict, own.warnings) == ("a", "thing gone", ())


def test_a_list_that_ends_in_no_transition_leads_to_nothing(machine: Machine) -> None:
    """Analysis refuses such lists; the machine does not fall through to anything else."""
    assert machine.decide(Snapshot("b"), Event("ask", {"answer": "no"})).reason == "unhandled"


def test_data_guards_tell_true_from_one(machine: Machine) -> None:
    assert machine.decide(Snapshot("b"), Event("ask", {"answer": True})).snapshot.state == "ended"
    assert machine.decide(Snapshot("b"), Event("ask", {"answer": 1})).snapshot.state == "failed"
    assert machine.decide(Snapshot("b"), Event("ask")).reason == "unhandled"


def test_verdict_guards(machine: Machine) -> None:
    good = machine.decide(Snapshot("b"), Event("check"))
    assert good.effects == (Finish("ended", True),)
    bad = machine.decide(Snapshot("b", verdict="it broke"), Event("check"))
    assert bad.effects == (Finish("failed", False),)


def test_counters_bound_a_loop_and_are_never_reset(machine: Machine) -> None:
    """`below` sees the counter as it was before this transition's own `count`."""
    at = machine.start().snapshot
    for rounds in (1, 2):
        at = machine.decide(at, Event("go")).snapshot
        assert (at.state, dict(at.counters)) == ("b", {"rounds": rounds})
        at = machine.decide(at, outcome("done", at)).snapshot
    assert machine.decide(at, Event("go")).snapshot.state == "ended"


def test_guards_see_the_verdict_from_before_the_transition(lifecycle: Build) -> None:
    text = """
        initial: a
        states:
          a: {invoke: work, timeout: 1s, on: {
               error: [{target: ended, when: {verdict: success}, fail: now it failed}, {target: failed}]}}
          ended: {final: success}
          failed: {final: failure}
    """
    decision = Machine(lifecycle(text), WITHIN).decide(Snapshot("a"), Event("error"))
    assert (decision.snapshot.state, decision.snapshot.verdict) == ("ended", "now it failed")


def test_the_first_failure_is_the_verdict_and_later_ones_are_kept(machine: Machine) -> None:
    at = machine.start().snapshot
    at = machine.decide(at, outcome("error", at, message="no disk")).snapshot
    assert (at.verdict, at.also) == ("a failed: no disk", ())
    at = machine.decide(at, outcome("error", at)).snapshot
    assert (at.verdict, at.also) == ("a failed: no disk", ("b failed",))


def test_warnings_leave_the_verdict_alone(machine: Machine) -> None:
    at = machine.decide(Snapshot("a"), Event("part.lost", {"message": "EOF"}, id=4)).snapshot
    assert (at.verdict, at.warnings) == ("", ("part gone: EOF",))


def test_decisions_name_the_line_taken(machine: Machine, lifecycle: Build) -> None:
    at = machine.start().snapshot
    arms = machine.lifecycle.states["a"].on["go"]
    assert machine.decide(at, Event("go")).arm == arms[0].line > 0
    assert machine.decide(replace(at, counters={"rounds": 2}), Event("go")).arm == arms[1].line
    assert machine.decide(at, Event("zork")).arm == 0


class TestResources:
    """Events of a resource carry its ledger id; only the current incarnation is heard."""

    def test_done_brings_the_ids_acquired(self, machine: Machine) -> None:
        at = machine.start().snapshot
        at = machine.decide(at, outcome("done", at, acquired={"thing": 3, "part": 4})).snapshot
        assert at.ids == {"thing": 3, "part": 4}
        at = machine.decide(at, outcome("done", at, acquired={"part": 9})).snapshot
        assert at.ids == {"thing": 3, "part": 9}

    def test_an_older_incarnation_is_stale(self, machine: Machine) -> None:
        at = Snapshot("a", ids={"part": 9})
        assert machine.decide(at, Event("part.lost", id=8)).reason == "stale"
        assert machine.decide(at, Event("part.lost", id=9)).snapshot.state == "b"

    def test_a_newer_incarnation_is_heard_before_its_done(self, machine: Machine) -> None:
        at = machine.decide(Snapshot("a", ids={"part": 2}), Event("part.lost", id=9)).snapshot
        assert at.ids == at.lost == {"part": 9}

    def test_a_loss_is_reported_once(self, machine: Machine) -> None:
        at = machine.decide(Snapshot("b"), Event("thing.lost", id=3)).snapshot
        assert machine.decide(at, Event("thing.lost", id=3)).reason == "stale"
        assert machine.decide(at, Event("thing.alarm", id=3)).reason == "stale"

    def test_a_loss_counts_also_where_it_leads_to_nothing(self, lifecycle: Build, machine: Machine) -> None:
        once = machine.decide(Snapshot("b"), Event("part.lost", id=3))
        assert once.reason == "unhandled"
        assert machine.decide(once.snapshot, Event("part.lost", id=3)).reason == "stale"

    def test_what_lies_within_a_lost_resource_is_lost_too(self, machine: Machine) -> None:
        at = Snapshot("a", ids={"thing": 3, "part": 4, "crumb": 5})
        gone = machine.decide(at, Event("thing.lost", id=3)).snapshot
        assert machine.decide(replace(gone, state="a"), Event("part.lost", id=4)).reason == "stale"
        assert machine.decide(gone, Event("crumb.bye", id=5)).reason == "stale"

    def test_what_lies_within_a_new_incarnation_is_heard(self, machine: Machine) -> None:
        at = Snapshot("a", ids={"thing": 6, "part": 7}, lost={"thing": 3})
        assert machine.decide(at, Event("part.lost", id=7)).snapshot.state == "b"


class TestRetry:
    """An error that `retry` admits stays in the state."""

    def test_admitted_error_waits_and_starts_again(self, machine: Machine) -> None:
        at = machine.start().snapshot
        for attempt, nominal in ((2, 1.0), (3, 2.0)):
            decision = machine.decide(at, outcome("error", at, transient=True))
            assert decision.effects == (Wait(nominal),)
            assert (decision.snapshot.attempt, decision.snapshot.waiting) == (attempt, True)
            assert (decision.snapshot.entry, decision.snapshot.verdict) == (1, "")
            decision = machine.decide(decision.snapshot, Event("retry.due", entry=1))
            assert decision.effects == (Restart(attempt),)
            at = decision.snapshot
        last = machine.decide(at, outcome("error", at, transient=True)).snapshot
        assert (last.state, last.attempt, last.verdict) == ("b", 1, "a failed")

    def test_nominal_wait_has_a_maximum(self, machine: Machine) -> None:
        retry = machine.lifecycle.states["a"].retry
        assert retry is not None
        assert [retry.backoff.nominal(n) for n in (1, 2, 3, 10_000)] == [1, 2, 3, 3]

    def test_error_outside_the_guard_is_not_admitted(self, machine: Machine) -> None:
        at = machine.start().snapshot
        assert machine.decide(at, outcome("error", at, transient=False)).snapshot.state == "b"

    def test_error_that_left_something_behind_is_not_admitted(self, machine: Machine) -> None:
        at = machine.start().snapshot
        assert machine.decide(at, outcome("error", at, transient=True, left=["disk"])).snapshot.state == "b"

    def test_retry_without_a_guard_admits_every_error(self, lifecycle: Build) -> None:
        text = LOOP.replace("when: {data: {transient: true}}, backoff", "backoff")
        at = Snapshot("a")
        assert Machine(lifecycle(text), WITHIN).decide(at, outcome("error", at)).effects == (Wait(1.0),)

    def test_due_is_stale_when_nothing_waits(self, machine: Machine) -> None:
        assert machine.decide(Snapshot("a"), Event("retry.due", entry=1)).reason == "stale"

    def test_timeout_leaves_a_waiting_state(self, machine: Machine) -> None:
        at = Snapshot("a", attempt=2, waiting=True)
        moved = machine.decide(at, Event("timeout", entry=1)).snapshot
        assert (moved.state, moved.attempt, moved.waiting) == ("b", 1, False)


class TestRecorded:
    """Events and decisions survive their journal records."""

    @pytest.mark.parametrize(
        "event",
        [
            Event("end"),
            Event("end", {"by": "signal"}),
            Event("done", {"acquired": {"vm": 3}}, entry=4, activity="vm.start"),
            Event("timeout", entry=1),
            Event("vm.exited", {"clean": False}, id=3),
        ],
    )
    def test_events_come_back_equal(self, event: Event) -> None:
        assert event_from(event_fields(event)) == event

    def test_events_carry_only_what_they_have(self) -> None:
        assert event_fields(Event("end")) == {"type": "end"}

    def test_decisions_hold_what_a_replay_compares(self, machine: Machine) -> None:
        at = Snapshot("a", entry=5, verdict="x", also=("y",), warnings=("w",), counters={"rounds": 1})
        assert decision_fields(machine.decide(at, Event("go"))) == {
            "state": "b",
            "entry": 6,
            "attempt": 1,
            "arm": machine.lifecycle.states["a"].on["go"][0].line,
            "verdict": "x",
            "also": ["y"],
            "warnings": ["w"],
            "counters": {"rounds": 2},
        }
        fields = decision_fields(machine.decide(Snapshot("a"), Event("zork")))
        assert fields == {"state": "a", "entry": 1, "attempt": 1, "reason": "unhandled"}
        waits = machine.decide(Snapshot("a"), outcome("error", Snapshot("a"), transient=True))
        assert decision_fields(waits) == {"state": "a", "entry": 1, "attempt": 2, "waiting": True}
