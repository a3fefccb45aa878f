"""The runner: events against timers, leaving, cancel, and what still ends well when things break."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from textwrap import dedent
from typing import Any

import pytest
import trio
import trio.testing

from kenaz_engine.lifecycle.analysis.bound import SWEEP
from kenaz_engine.lifecycle.machine import Event
from kenaz_engine.session.runner import ActivityError, Work

Build = Callable[..., Any]
Clock = trio.testing.MockClock


async def forever(work: Work) -> None:
    await trio.sleep_forever()


def after(seconds: float, error: Exception | None = None, **data: Any) -> Callable[[Work], Any]:
    """An activity that takes its time, then returns data or raises."""

    async def activity(work: Work) -> dict[str, Any]:
        await trio.sleep(seconds)
        if error:
            raise error
        return data

    return activity


def tidies(seconds: float, *, shielded: bool = True) -> Callable[[Work], Any]:
    """An activity that never ends by itself, and needs that long to clean up."""

    async def activity(work: Work) -> None:
        try:
            await trio.sleep_forever()
        finally:
            if shielded:
                with work.cleaning():
                    await trio.sleep(seconds)

    return activity


def decided(one: Any) -> list[tuple[str, str, str]]:
    """Each event with the state that it led to, and why it was ignored."""
    events = [r["type"] for r in one.journal.of("event")]
    decisions = [(r["state"], r.get("reason", "")) for r in one.journal.of("decision")]
    return [(event, *decision) for event, decision in zip(events, decisions, strict=True)]


async def test_a_session_runs_to_its_end(session: Build, autojump_clock: Clock) -> None:
    one = session(work=after(2, answer=42))
    outcome = await one.run()
    assert (outcome.state, outcome.success, outcome.seconds) == ("ended", True, 2)
    assert (outcome.verdict, outcome.left, outcome.internal) == ("", (), "")
    assert one.runner.outcome is outcome
    assert [r["kind"] for r in one.journal.records] == [
        *("entered", "event", "decision"),
        *("entered", "event", "decision"),
        "end",
    ]
    work, event, decision, *_, end = one.journal.records
    assert (work["state"], work["entry"], work["activity"], work["timeout"]) == ("working", 1, "work", 10)
    assert event["data"] == {"answer": 42}
    assert (event["entry"], event["activity"]) == (1, "work")
    assert (decision["state"], decision["entry"]) == ("cleaning", 2)
    assert (end["state"], end["success"], end["seconds"], end["left"]) == ("ended", True, 2, [])


async def test_done_carries_the_ledger_ids_acquired(session: Build, autojump_clock: Clock) -> None:
    async def work(work: Work) -> None:
        await one.make("thing")

    one = session(work=work)
    await one.run()
    assert one.journal.of("event")[0]["data"] == {"acquired": {"thing": 1}}
    assert one.runner.snapshot.ids == {"thing": 1}
    assert one.released == ["thing"]


class TestTimers:
    """Timers are not tasks: the runner waits on its inbox until the nearest deadline."""

    async def test_a_state_times_out(self, session: Build, autojump_clock: Clock) -> None:
        one = session(work=forever)
        outcome = await one.run()
        assert (outcome.state, outcome.verdict, outcome.seconds) == ("failed", "it took too long", 10)
        assert one.journal.of("event")[0] | {"type": "timeout", "entry": 1} == one.journal.of("event")[0]

    @pytest.mark.parametrize(("moment", "verdict"), [(10.0, ""), (10.001, "it took too long")])
    async def test_an_event_at_the_deadline_precedes_the_timer(
        self, session: Build, autojump_clock: Clock, moment: float, verdict: str
    ) -> None:
        one = session(work=forever)
        outcome = await one.run((moment, lambda: one.put("end")))
        assert outcome.verdict == verdict

    async def test_an_outcome_at_the_deadline_precedes_the_timer(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        one = session(work=after(10))
        assert (await one.run()).success

    async def test_timers_start_when_the_state_is_entered(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        """That is when the clean-up of the state before has ended."""
        one = session(work=tidies(3), clean=forever)
        outcome = await one.run((1, lambda: one.put("end")))
        assert one.journal.path() == [("working", 0), ("cleaning", 4)]
        assert one.journal.of("event")[-1]["t"] == 4 + 20
        assert outcome.verdict == "cleaning took too long"

    async def test_an_event_after_the_deadline_follows_the_timer_also_when_the_runner_is_late(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        def late() -> None:
            autojump_clock.jump(20)
            one.put("end")

        one = session(work=forever, clean=after(1))
        await one.run((1, late))
        assert [event for event, *_ in decided(one)] == ["timeout", "end", "done"]

    async def test_idle_counts_from_the_last_touch(
        self, session: Build, small: str, autojump_clock: Clock
    ) -> None:
        text = small.replace("timeout: 10s", "timeout: none\n        idle: 5s").replace(
            "timeout: {target: cleaning, fail: it took too long}", "idle: cleaning"
        )

        async def work(work: Work) -> None:
            for _ in range(4):
                await trio.sleep(4)
                work.touch()
            await trio.sleep_forever()

        one = session(text, work=work)
        outcome = await one.run()
        assert (outcome.success, outcome.seconds) == (True, 4 * 4 + 5)
        assert one.journal.of("entered")[0]["idle"] == 5
        assert one.journal.of("entered")[0]["timeout"] is None


class TestRetry:
    """An error that the state admits is tried again after a wait."""

    @staticmethod
    def text(small: str, retry: str = "{attempts: 3, when: {data: {transient: true}}, backoff: %s}") -> str:
        backoff = "{first: 1s, factor: 2, max: 30s, jitter: 0.5}"
        retry = retry % backoff if "%s" in retry else retry
        return small.replace("timeout: 10s", f"timeout: 10s\n        retry: {retry}")

    async def test_attempts_wait_in_between_and_release_what_they_made(
        self, session: Build, small: str, autojump_clock: Clock
    ) -> None:
        attempts = itertools.count(1)

        async def work(work: Work) -> None:
            number = next(attempts)
            await one.make(f"try{number}", release_takes=1)
            await trio.sleep(1)
            if number < 3:
                raise ActivityError("not yet", hint="wait", transient=True)

        one = session(self.text(small), work=work, jitter=lambda: 0.75)
        outcome = await one.run()
        assert outcome.success
        assert one.released == ["try1", "try2", "try3"]
        assert [r["seconds"] for r in one.journal.of("backoff")] == [1.25, 2.5]
        assert [r["attempt"] for r in one.journal.of("backoff")] == [2, 3]
        assert one.journal.path() == [("working", 0), ("cleaning", 2 + 1.25 + 2 + 2.5 + 1)]
        errors = [r for r in one.journal.of("event") if r["type"] == "error"]
        assert errors[0]["data"] == {"message": "not yet", "hint": "wait", "transient": True}
        assert errors[0]["t"] == 2  # what the attempt had made was released before its error was put

    async def test_timeout_covers_all_attempts_and_waits(
        self, session: Build, small: str, autojump_clock: Clock
    ) -> None:
        one = session(
            self.text(small), work=after(3, ActivityError("no", transient=True)), jitter=lambda: 0.5
        )
        outcome = await one.run()
        assert (outcome.verdict, outcome.seconds) == ("it took too long", 10)
        assert one.journal.of("activity") == [
            one.journal.of("activity")[0] | {"activity": "work", "entry": 1, "ended": "cancelled"}
        ]

    async def test_timeout_in_a_wait_leaves_the_state(
        self, session: Build, small: str, autojump_clock: Clock
    ) -> None:
        one = session(
            self.text(small, "{attempts: 3, backoff: {first: 30s}}"), work=after(1, ActivityError("no"))
        )
        outcome = await one.run()
        assert (outcome.verdict, outcome.seconds) == ("it took too long", 10)
        assert one.journal.of("activity") == []

    async def test_a_wait_ends_with_its_state(
        self, session: Build, small: str, autojump_clock: Clock
    ) -> None:
        one = session(self.text(small), work=after(1, ActivityError("no", transient=True)), clean=after(9))
        await one.run((1.5, lambda: one.put("end")))
        assert [event for event, *_ in decided(one)] == ["error", "end", "done"]

    async def test_what_a_left_attempt_made_stays_for_the_declared_path(
        self, session: Build, small: str, autojump_clock: Clock
    ) -> None:
        async def work(work: Work) -> None:
            await one.make("a", release_takes=3)
            try:
                await trio.sleep_forever()
            finally:
                raise ActivityError("no", transient=True)

        text = self.text(small).replace("timeout: 20s", "timeout: 20s\n        retry: {attempts: 2}")
        one = session(text, work=work)
        await one.run((1, lambda: one.put("end")))
        assert one.journal.path() == [("working", 0), ("cleaning", 1)]

    @pytest.mark.parametrize("guard", ["when: {data: {transient: true}}, ", ""])
    async def test_an_attempt_that_left_something_is_the_last(
        self, session: Build, small: str, autojump_clock: Clock, guard: str
    ) -> None:
        async def work(work: Work) -> None:
            await one.make("disk", release_fails=OSError("busy"))
            raise ActivityError("no", transient=True)

        one = session(self.text(small, f"{{attempts: 3, {guard}backoff: {{first: 1s}}}}"), work=work)
        outcome = await one.run()
        assert one.journal.of("backoff") == []
        assert one.journal.of("event")[0]["data"] == {"message": "no", "transient": False, "left": ["disk"]}
        assert [left.resource for left in outcome.left] == ["disk"]

    async def test_leaving_bounds_the_release_of_a_failed_attempt(
        self, session: Build, small: str, autojump_clock: Clock
    ) -> None:
        async def work(work: Work) -> None:
            for name in ("a", "b", "c"):
                await one.make(name, release_takes=4)
            raise ActivityError("no", transient=True)

        one = session(self.text(small), work=work)
        outcome = await one.run((1, lambda: one.put("end")))
        assert one.journal.path() == [("working", 0), ("cleaning", 6)]
        assert one.released == ["c", "b", "a"]
        assert outcome.left == ()


class TestLeaving:
    """Leaving a state cancels its activity and waits for its clean-up."""

    async def test_the_next_state_waits_for_the_cleanup(self, session: Build, autojump_clock: Clock) -> None:
        one = session(work=tidies(3))
        await one.run((2, lambda: one.put("end")))
        assert one.journal.path() == [("working", 0), ("cleaning", 5)]
        (activity,) = one.journal.of("activity")
        assert (activity["activity"], activity["entry"], activity["ended"]) == ("work", 1, "cancelled")

    async def test_cleanup_is_bounded(self, session: Build, autojump_clock: Clock) -> None:
        one = session(work=tidies(1000))
        await one.run((2, lambda: one.put("end")))
        assert one.journal.path() == [("working", 0), ("cleaning", 2 + 5)]

    async def test_an_abort_put_while_leaving_cuts_the_cleanup(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        """It stays in the inbox, and is decided in the next state."""
        one = session(work=tidies(4))
        await one.run((2, lambda: one.put("end")), (3, lambda: one.put("abort")))
        assert one.journal.path() == [("working", 0), ("cleaning", 3)]
        assert decided(one)[:2] == [("end", "cleaning", ""), ("abort", "cleaning", "declared")]

    async def test_cleanup_that_begins_after_the_cut_has_no_time(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        async def work(work: Work) -> None:
            try:
                await trio.sleep_forever()
            finally:
                for _ in range(3):
                    with work.cleaning():
                        await trio.sleep(4)

        one = session(work=work)
        await one.run((0, lambda: one.put("end")))
        assert one.journal.path() == [("working", 0), ("cleaning", 5)]

    async def test_an_acquisition_may_end_while_leaving(self, session: Build, autojump_clock: Clock) -> None:
        async def work(work: Work) -> None:
            await one.make("vm", takes=4)
            raise AssertionError("not reached")

        one = session(work=work)
        await one.run((1, lambda: one.put("end")))
        assert one.journal.path() == [("working", 0), ("cleaning", 4)]
        assert one.released == ["vm"]

    @pytest.mark.parametrize("abort_at", [None, 3.0])
    async def test_an_acquisition_is_cut_with_the_cleanup(
        self, session: Build, autojump_clock: Clock, abort_at: float | None
    ) -> None:
        """Otherwise the end of a session could not be bounded. Its intent stays in the ledger."""

        async def slow(intent: Any) -> None:
            await trio.sleep(2)
            one.released.append("by intent")

        async def work(work: Work) -> None:
            await one.make("vm", takes=1000)

        one = session(work=work, by_intent=slow)
        script = [(1, lambda: one.put("end"))]
        script += [(abort_at, lambda: one.put("abort"))] if abort_at else []
        outcome = await one.run(*script)
        cut = abort_at or 1 + 5
        assert one.journal.path() == [("working", 0), ("cleaning", cut)]
        assert (one.released, outcome.left, outcome.seconds) == (["by intent"], (), cut + 2)

    async def test_events_put_while_leaving_are_decided_in_the_next_state(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        one = session(work=tidies(4), clean=after(1))
        await one.run((1, lambda: one.put("end")), (2, lambda: one.put("thing.alarm", id=1)))
        assert decided(one) == [
            ("end", "cleaning", ""),
            ("thing.alarm", "cleaning", "declared"),
            ("done", "ended", ""),
        ]

    @pytest.mark.parametrize("error", [ActivityError("late"), ValueError("late")])
    async def test_what_a_left_activity_raises_is_no_event(
        self, session: Build, autojump_clock: Clock, error: Exception
    ) -> None:
        async def work(work: Work) -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise error

        one = session(work=work)
        outcome = await one.run((1, lambda: one.put("end")))
        (activity,) = one.journal.of("activity")
        assert activity["ended"] == "error"
        assert "late" in activity["error"]
        assert outcome.success
        assert [r["type"] for r in one.journal.of("event")] == ["end", "done"]

    async def test_errors_beside_the_cancel_do_not_break_the_session(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        """A nursery inside of the activity gives a group of Cancelled and of what its clean-up raised."""

        async def child() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("late")

        async def work(work: Work) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child)
                nursery.start_soon(trio.sleep_forever)

        one = session(work=work)
        outcome = await one.run((1, lambda: one.put("end")))
        assert outcome.success
        assert one.journal.of("activity")[0]["error"] == "internal error: ValueError: late"

    async def test_what_a_left_activity_returns_is_no_event(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        async def work(work: Work) -> dict[str, Any]:
            with work.cleaning():
                await trio.sleep(3)
            return {"late": True}

        one = session(work=work)
        await one.run((1, lambda: one.put("end")))
        assert one.journal.of("activity")[0]["ended"] == "done"
        assert [r["type"] for r in one.journal.of("event")] == ["end", "done"]

    async def test_an_outcome_put_before_leaving_is_stale_in_the_next_state(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        """Both are there when the runner looks; the loss is decided first, and makes the error late."""
        one = session(work=after(2, ActivityError("broken pipe")))
        outcome = await one.run((2, lambda: one.put("thing.lost", id=1)), (2, lambda: one.put("abort")))
        assert decided(one)[:2] == [("abort", "cleaning", ""), ("error", "cleaning", "stale")]
        assert outcome.verdict == "aborted"


class TestOutside:
    """A cancel from outside is the event `abort`, and never skips release."""

    async def test_a_cancel_becomes_abort_and_goes_on(self, session: Build, autojump_clock: Clock) -> None:
        async def work(work: Work) -> None:
            await one.make("vm", release_takes=2)
            await trio.sleep_forever()

        one = session(work=work)
        with trio.move_on_after(3) as scope:
            await one.runner.run()
            pytest.fail("Cancelled must go on")
        assert scope.cancelled_caught
        outcome = one.runner.outcome
        assert outcome is not None
        assert (outcome.state, outcome.verdict, outcome.seconds) == ("failed", "aborted", 5)
        assert one.released == ["vm"]
        assert one.journal.of("event")[0]["data"] == {"by": "cancel"}
        assert one.journal.records[-1]["kind"] == "end"

    async def test_a_cancel_from_before_the_start_still_runs_the_declared_path(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        one = session(work=forever)
        with trio.CancelScope() as scope:
            scope.cancel()
            await one.runner.run()
        assert one.journal.path() == [("working", 0), ("cleaning", 0)]
        assert one.runner.outcome is not None

    async def test_a_cancel_while_releasing_does_not_disturb_it(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        async def work(work: Work) -> None:
            await one.make("vm", release_takes=4)

        one = session(work=work)
        with trio.move_on_after(1):
            await one.runner.run()
        outcome = one.runner.outcome
        assert outcome is not None
        assert (outcome.success, outcome.seconds) == (True, 4)
        assert decided(one)[1] == ("abort", "cleaning", "declared")

    async def test_no_cancel_no_abort(self, session: Build, autojump_clock: Clock) -> None:
        one = session()
        with trio.move_on_after(100) as scope:
            await one.run()
        assert not scope.cancelled_caught
        assert not one.runner.inbox.holds("abort")


class TestDefects:
    """Whatever breaks, the ledger is swept and the journal ends."""

    async def test_an_activity_with_a_defect_is_an_error(self, session: Build, autojump_clock: Clock) -> None:
        one = session(work=after(1, ZeroDivisionError("oops")))
        outcome = await one.run()
        assert outcome.verdict == "it failed: internal error: ZeroDivisionError: oops"
        assert "ZeroDivisionError" in one.runner.tracebacks[0]

    async def test_of_several_errors_the_first_speaks(self, session: Build, autojump_clock: Clock) -> None:
        errors = [ActivityError("one", transient=True), ExceptionGroup("", [ActivityError("two")])]
        one = session(work=after(1, ExceptionGroup("", errors)))
        await one.run()
        assert one.journal.of("event")[0]["data"] == {"message": "one", "transient": False}
        assert one.runner.tracebacks == []

    async def test_of_several_errors_a_defect_speaks_first(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        one = session(work=after(1, ExceptionGroup("", [ActivityError("one"), KeyError("x")])))
        outcome = await one.run()
        assert outcome.verdict == "it failed: internal error: KeyError: 'x'"
        assert "one" in one.runner.tracebacks[0]

    async def test_an_unknown_activity_is_an_error(
        self, session: Build, small: str, autojump_clock: Clock
    ) -> None:
        one = session(small.replace("invoke: work", "invoke: play"))
        assert (await one.run()).verdict == "it failed: internal error: KeyError: 'play'"

    @pytest.mark.parametrize("error", [ValueError("bug"), ActivityError("bug")])
    async def test_a_task_that_fails_becomes_abort(
        self, session: Build, autojump_clock: Clock, error: Exception
    ) -> None:
        """As the event `internal.error`, where a lifecycle does not name that."""

        async def owner(*, task_status: trio.TaskStatus[str]) -> None:
            task_status.started("ready")
            await trio.sleep(3)
            raise error

        async def work(work: Work) -> None:
            assert await work.start(owner) == "ready"
            await trio.sleep_forever()

        one = session(work=work)
        outcome = await one.run()
        kind = type(error).__name__
        assert outcome.verdict == f"aborted: internal error: {kind}: bug"
        assert decided(one)[:2] == [("internal.error", "working", "unhandled"), ("abort", "cleaning", "")]
        assert (outcome.internal, outcome.seconds) == ("", 3)

    async def test_a_lifecycle_may_name_internal_errors(
        self, session: Build, small: str, autojump_clock: Clock
    ) -> None:
        async def owner(*, task_status: trio.TaskStatus[None]) -> None:
            task_status.started()
            raise ValueError("bug")

        async def work(work: Work) -> None:
            await work.start(owner)
            await trio.sleep_forever()

        text = small.replace(
            "          end: cleaning\n", "          internal.error: {target: cleaning, fail: bug}\n"
        )
        outcome = await session(text, work=work).run()
        assert outcome.verdict == "bug: internal error: ValueError: bug"

    async def test_a_task_that_fails_before_it_started_fails_its_starter(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        async def owner(*, task_status: trio.TaskStatus[None]) -> None:
            raise ActivityError("cannot")

        async def work(work: Work) -> None:
            await work.start(owner)

        outcome = await session(work=work).run()
        assert outcome.verdict == "it failed: cannot"

    async def test_a_task_outlives_its_state_and_ends_with_the_session(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        ended = []

        async def owner(*, task_status: trio.TaskStatus[None]) -> None:
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                ended.append(trio.current_time())

        async def work(work: Work) -> None:
            await work.start(owner)

        await session(work=work, clean=after(5)).run()
        assert ended == [5]

    async def test_a_task_whose_cleanup_fails_is_internal(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        async def owner(*, task_status: trio.TaskStatus[None]) -> None:
            task_status.started()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tidy)
                nursery.start_soon(trio.sleep_forever)

        async def tidy() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("bug")

        async def work(work: Work) -> None:
            await work.start(owner)

        one = session(work=work)
        outcome = await one.run()
        assert (outcome.state, outcome.success) == ("ended", False)
        assert outcome.internal == "internal error: ValueError: bug"
        assert one.journal.records[-1]["internal"] == outcome.internal

    async def test_a_decision_that_fails_still_sweeps(
        self, session: Build, small: str, autojump_clock: Clock
    ) -> None:
        async def work(work: Work) -> None:
            await one.make("vm", release_takes=1)
            try:
                await trio.sleep_forever()
            finally:
                with work.cleaning():
                    await trio.sleep(2)

        one = session("strict: true\n" + dedent(small), work=work)
        outcome = await one.run((1, lambda: one.put("zork")))
        assert outcome.internal.startswith("internal error: UnexpectedEvent")
        assert (outcome.state, outcome.success, outcome.seconds) == ("working", False, 4)
        assert one.released == ["vm"]
        end = one.journal.records[-1]
        assert (end["kind"], end["internal"]) == ("end", outcome.internal)

    async def test_data_that_are_not_json_are_a_defect(self, session: Build, autojump_clock: Clock) -> None:
        one = session(work=after(1, thing=object()))
        outcome = await one.run()
        assert outcome.internal.startswith("internal error: TypeError")
        assert one.journal.records[-1]["kind"] == "end"

    async def test_a_runner_that_breaks_in_its_nursery_still_sweeps(
        self, session: Build, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Here in the task of the activity, whose end cannot be recorded."""

        async def work(work: Work) -> None:
            await one.make("vm", release_takes=1)
            await trio.sleep_forever()

        one = session(work=work)
        append = one.recorder.append

        def broken(kind: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
            if kind == "activity":
                raise LookupError("bug")
            return append(kind, fields)

        monkeypatch.setattr(one.recorder, "append", broken)
        outcome = await one.run((1, lambda: one.put("end")))
        assert (outcome.internal, outcome.success) == ("internal error: LookupError: bug", False)
        assert one.released == ["vm"]
        assert one.journal.records[-1]["internal"] == outcome.internal

    async def test_an_interrupt_of_the_runner_still_sweeps(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        async def work(work: Work) -> None:
            await one.make("vm", release_takes=1)
            raise KeyboardInterrupt

        one = session(work=work)
        with pytest.raises(BaseExceptionGroup) as caught:
            await one.runner.run()
        assert caught.value.split(KeyboardInterrupt)[1] is None
        assert one.released == ["vm"]
        assert one.runner.outcome is not None
        assert one.runner.outcome.internal == "the runner was interrupted"
        assert one.journal.records[-1]["kind"] == "end"


class TestSweep:
    """After the final state the ledger is looked through once more."""

    async def test_what_the_lifecycle_left_is_swept(self, session: Build, autojump_clock: Clock) -> None:
        async def work(work: Work) -> None:
            await one.make("vm")

        one = session(work=work, clean=after(0))
        assert (await one.run()).left == ()
        assert one.released == ["vm"]

    async def test_what_cannot_be_released_is_left_and_fails_the_session(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        async def work(work: Work) -> None:
            await one.make("disk")
            await one.make("vm", uses=("disk",), release_takes=1000, bound=1000)

        one = session(work=work, clean=after(0))
        outcome = await one.run()
        assert (outcome.state, outcome.success, outcome.seconds) == ("ended", False, SWEEP / 2)
        assert [left.resource for left in outcome.left] == ["vm", "disk"]
        assert one.journal.records[-1]["left"] == [
            {"id": 2, "resource": "vm", "type": "thing", "error": "took longer than 5 s"},
            {"id": 1, "resource": "disk", "type": "thing", "error": "is still used by the vm"},
        ]

    async def test_from_abort_to_the_end_is_bounded(self, session: Build, autojump_clock: Clock) -> None:
        """By (cleanup + cleaning) + cleanup + sweep, however much hangs."""

        async def work(work: Work) -> None:
            await one.make("vm", release_takes=1000, bound=1000)
            try:
                await one.make("disk", takes=1000)
            finally:
                with work.cleaning():
                    await trio.sleep_forever()

        async def clean(work: Work) -> None:
            try:
                await one.ledger.release_all(trio.current_time() + 1000)
            finally:
                with work.cleaning():
                    await trio.sleep_forever()

        one = session(work=work, clean=clean)
        outcome = await one.run((1, lambda: one.put("abort")))
        assert outcome.seconds <= 1 + (5 + 20) + 5 + SWEEP
        assert [left.resource for left in outcome.left] == ["vm"]


class TestJournalFails:
    """A session whose journal cannot be written ends along its declared path."""

    async def test_a_full_disk_aborts(self, session: Build, autojump_clock: Clock) -> None:
        async def work(work: Work) -> None:
            await one.make("vm")
            one.journal.broken = OSError(28, "No space left on device")
            await trio.sleep(1)
            await one.make("disk")

        one = session(work=work)
        outcome = await one.run()
        fault = "the journal could not be written: No space left on device (make room there)"
        assert (outcome.internal, outcome.success) == (fault, False)
        assert one.released == ["vm"]
        assert [r["kind"] for r in one.journal.records] == ["entered", "intent", "acquired"]
        assert outcome.verdict.startswith("it failed: ")

    async def test_a_full_disk_is_noticed_with_the_next_record(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        async def work(work: Work) -> None:
            one.journal.broken = OSError("gone")
            await trio.sleep_forever()

        one = session(work=work)
        outcome = await one.run((2, lambda: one.put("thing.alarm", id=1)))
        assert (outcome.verdict, outcome.seconds) == ("aborted: the journal could not be written: gone", 2)

    async def test_nothing_follows_a_record_that_was_lost(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        """A torn line in the middle would hide the rest."""
        one = session(work=forever)
        one.journal.broken = OSError("gone")
        outcome = await one.run(
            (1, lambda: setattr(one.journal, "broken", None)), (2, lambda: one.put("thing.alarm"))
        )
        assert one.journal.records == []
        assert outcome.internal == "the journal could not be written: gone"

    async def test_an_end_that_cannot_be_written_is_no_success(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        async def work(work: Work) -> None:
            await one.make("vm")

        def full_at_the_end(record: Any) -> None:
            if record["kind"] == "decision" and record["state"] == "ended":
                one.journal.broken = OSError("gone")

        one = session(work=work, observers=(full_at_the_end,))
        outcome = await one.run()
        assert (outcome.state, outcome.success) == ("ended", False)
        assert outcome.internal == "the journal could not be written: gone"

    async def test_observers_see_every_record(self, session: Build, autojump_clock: Clock) -> None:
        seen: list[str] = []
        one = session(observers=(lambda record: seen.append(record["kind"]),))
        await one.run()
        assert seen == [r["kind"] for r in one.journal.records]

    @pytest.mark.parametrize("error", [BrokenPipeError("closed"), KeyError("bug")])
    async def test_an_observer_that_fails_is_asked_no_more(
        self, session: Build, autojump_clock: Clock, error: Exception
    ) -> None:
        seen: list[str] = []

        def observe(record: Any) -> None:
            seen.append(record["kind"])
            if record["kind"] == "event":
                raise error

        one = session(observers=(observe,))
        assert (await one.run()).success
        assert seen == ["entered", "event"]
        (note,) = one.journal.of("note")
        assert (note["about"], note["error"]) == ("observer", f"{type(error).__name__}: {error}")


async def test_simultaneous_losses_are_decided_in_a_fixed_order(
    session: Build, autojump_clock: Clock
) -> None:
    one = session(work=after(1), clean=after(1))
    script = [(1, lambda kind=kind: one.runner.inbox.put(Event(kind))) for kind in ("end", "thing.lost")]
    await one.run(*script)
    assert [event for event, *_ in decided(one)] == ["done", "end", "thing.lost", "done"]


def test_cleanup_that_ends_with_the_abort_is_not_cut(session: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order in which the scheduler runs the two."""
    monkeypatch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    finished = []

    async def work(work: Work) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with work.cleaning():
                await trio.sleep(3)
                await trio.lowlevel.checkpoint()
                finished.append(True)

    for seed in range(6):
        trio._core._run._r.seed(seed)
        one = session(work=work)
        script = [(1.0, lambda one=one: one.put("end")), (4.0, lambda one=one: one.put("abort"))]
        trio.run(one.run, *script, clock=Clock(autojump_threshold=0))
    assert len(finished) == 6
