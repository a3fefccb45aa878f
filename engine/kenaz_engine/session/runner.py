"""Runs a lifecycle: the only place where the pure core meets trio.

Events go into one inbox. The runner takes one, journals it, asks the machine, journals the decision, and
carries out its effects; nothing else changes state. It knows no state and no activity by name.

    caller's scope
      outer nursery        sentinel: a cancel from outside becomes the event `abort`
        shield
          session nursery  the current activity, and the watchers of what outlives it
"""

from __future__ import annotations

import math
import random
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import trio

from kenaz_engine.lifecycle.analysis.bound import SWEEP
from kenaz_engine.lifecycle.machine import (
    Decision,
    Effect,
    Enter,
    Event,
    Finish,
    Machine,
    Restart,
    Snapshot,
    Wait,
)
from kenaz_engine.lifecycle.model import State
from kenaz_engine.lifecycle.recorded import decision_fields, event_fields
from kenaz_engine.session.inbox import Inbox
from kenaz_engine.session.ledger import Ledger, Left, left_data
from kenaz_engine.session.recorder import Recorder


class ActivityError(Exception):
    """An activity could not do its work. `transient` says that another attempt may succeed.

    `data` goes into the event: plain JSON, and no content (docs/explanation/security.md).
    """

    def __init__(self, message: str, *, hint: str = "", transient: bool = False, **data: Any) -> None:
        super().__init__(message)
        self.data = {"message": message, **({"hint": hint} if hint else {}), "transient": transient, **data}


class Owner(Protocol):
    """A task of the session that owns something which outlives the state that made it."""

    def __call__(self, *, task_status: trio.TaskStatus[Any]) -> Awaitable[None]: ...


@dataclass(slots=True)
class _Running:
    """One run of an activity, from its start to the end of its clean-up."""

    activity: str
    entry: int
    attempt: int
    cleanup: float
    leaving: bool = False
    cut: bool = False
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    cleanups: list[trio.CancelScope] = field(default_factory=list)
    ended: trio.Event = field(default_factory=trio.Event)

    def cut_cleanup(self) -> None:
        """The time for clean-up is over, also for what has not begun yet."""
        self.cut = True
        for scope in self.cleanups:
            scope.cancel()


@dataclass(frozen=True, slots=True)
class Work:
    """What an activity is given to work with.

    `timeout` is the state's, in seconds. `put` puts an event into the session's inbox, `touch` restarts the
    idle deadline. `start` starts a task that outlives the state and returns what that task gives to
    `task_status.started`; if the task fails later, that becomes the event `internal.error`.
    """

    ledger: Ledger
    timeout: float | None
    put: Callable[[Event], None]
    touch: Callable[[], None]
    start: Callable[[Owner], Awaitable[Any]]
    _running: _Running

    @contextmanager
    def cleaning(self) -> Iterator[None]:
        """For awaits in an activity's own clean-up: shielded until the state's bound, or an abort."""
        with trio.CancelScope(shield=True) as scope:
            self._running.cleanups.append(scope)
            if self._running.cut:
                scope.cancel()
            try:
                yield
            finally:
                self._running.cleanups.remove(scope)


ActivityFunction = Callable[[Work], Awaitable[Mapping[str, Any] | None]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a session ended. `internal` is the defect that ended it early, where there was one."""

    state: str
    success: bool
    verdict: str
    also: tuple[str, ...]
    warnings: tuple[str, ...]
    left: tuple[Left, ...]
    internal: str
    seconds: float


class Runner:
    """One session's run.

    `settle` is for virtual time: the order of simultaneous events is then fixed, with `opposite` the other
    way round. `jitter` draws from [0, 1).
    """

    def __init__(
        self,
        machine: Machine,
        activities: Mapping[str, ActivityFunction],
        ledger: Ledger,
        recorder: Recorder,
        *,
        settle: bool = False,
        opposite: bool = False,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.inbox = Inbox(settle=settle, opposite=opposite)
        self.outcome: Outcome | None = None
        self.tracebacks: list[str] = []
        self._machine = machine
        self._activities = activities
        self._ledger = ledger
        self._recorder = recorder
        self._jitter = jitter
        self._decision = machine.start()
        self._running: _Running | None = None
        self._started = self._entered = self._touched = -math.inf
        self._retry_due = math.inf
        recorder.on_fault = lambda fault: self.inbox.put(Event("internal.error", {"message": fault}))

    @property
    def snapshot(self) -> Snapshot:
        """Where the session stands now."""
        return self._decision.snapshot

    def touch(self) -> None:
        """Something came through the channel: the idle deadline starts anew."""
        self._touched = trio.current_time()

    async def run(self) -> Outcome:
        """Runs the session to its end, releases everything, and writes the `end` record.

        A cancel from outside becomes the event `abort`; the session then ends along its declared path and
        Cancelled goes on to the caller, who finds the result in `outcome`.
        """
        async with trio.open_nursery() as outer:
            outer.start_soon(self._sentinel)
            with trio.CancelScope(shield=True):
                outcome = await self._session()
            outer.cancel_scope.cancel()
        return outcome

    async def _sentinel(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            if self.outcome is None:
                self.inbox.put(Event("abort", {"by": "cancel"}))

    async def _session(self) -> Outcome:
        """The declared path; where that breaks off, for whatever reason, the sweep still comes."""
        self._started = trio.current_time()
        final: Finish | None = None
        internal = ""
        try:
            async with trio.open_nursery() as self._nursery:
                try:
                    final = await self._loop()
                except Exception as exc:
                    internal = self._defect(exc)
                finally:
                    with trio.CancelScope(shield=True):
                        await self._leave()
                        await self._ledger.release_all(trio.current_time() + SWEEP)
                    self._nursery.cancel_scope.cancel()
        except Exception as exc:
            internal = internal or self._defect(exc)
        finally:
            self.outcome = self._conclude(final, internal)
        return self.outcome

    def _conclude(self, final: Finish | None, internal: str) -> Outcome:
        at = self._decision.snapshot
        internal = internal or self._recorder.fault or ("" if final else "the runner was interrupted")
        left = tuple(self._ledger.left())
        outcome = Outcome(
            state=at.state,
            success=final is not None and final.success and not internal and not left,
            verdict=at.verdict,
            also=at.also,
            warnings=at.warnings,
            left=left,
            internal=internal,
            seconds=trio.current_time() - self._started,
        )
        self._recorder.append("end", _end_fields(outcome))
        if self._recorder.fault and not internal:
            outcome = replace(outcome, success=False, internal=self._recorder.fault)
        return outcome

    async def _loop(self) -> Finish:
        decision = self._decision
        while True:
            for effect in decision.effects:
                if isinstance(effect, Finish):
                    await self._leave()
                    return effect
                await self._carry_out(effect)
            event = await self._next_event()
            decision = self._decide(event)

    def _decide(self, event: Event) -> Decision:
        self._recorder.append("event", event_fields(event))
        decision = self._machine.decide(self.snapshot, event)
        self._decision = decision
        self._recorder.append("decision", decision_fields(decision))
        if event.type == "internal.error" and decision.reason == "unhandled":
            self.inbox.put(Event("abort", {"by": "internal", **event.data}))
        return decision

    async def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Enter():
                await self._leave()
                self._enter(self._machine.lifecycle.states[effect.state], effect.entry)
            case Wait():
                retry = self._machine.lifecycle.states[self.snapshot.state].retry
                assert retry is not None
                seconds = effect.seconds * (1 + retry.backoff.jitter * (2 * self._jitter() - 1))
                self._retry_due = trio.current_time() + seconds
                at = self.snapshot
                self._recorder.append(
                    "backoff", {"entry": at.entry, "attempt": at.attempt, "seconds": round(seconds, 6)}
                )
            case Restart():
                self._retry_due = math.inf
                self._start_activity()

    def _enter(self, state: State, entry: int) -> None:
        self._entered = self._touched = trio.current_time()
        self._retry_due = math.inf
        fields = {"state": state.name, "entry": entry, "activity": state.invoke, "timeout": state.timeout}
        self._recorder.append("entered", fields if state.idle is None else {**fields, "idle": state.idle})
        self._start_activity()

    def _start_activity(self) -> None:
        at = self.snapshot
        state = self._machine.lifecycle.states[at.state]
        running = _Running(state.invoke, at.entry, at.attempt, state.cleanup)
        self._running = running
        self._nursery.start_soon(self._run_activity, running, name=running.activity)

    async def _run_activity(self, running: _Running) -> None:
        mark = self._ledger.last
        work = Work(
            ledger=self._ledger,
            timeout=self._machine.lifecycle.states[self.snapshot.state].timeout,
            put=self.inbox.put,
            touch=self.touch,
            start=self._start,
            _running=running,
        )
        ended, data = "cancelled", {}
        try:
            # The scope is inside: what comes out of it beside Cancelled is still caught here.
            with running.scope:
                data = dict(await self._activities[running.activity](work) or {})
                ended = "done"
        except Exception as exc:
            ended, data = "error", self._error_data(exc)
            if self._machine.lifecycle.states[self.snapshot.state].retry and not running.leaving:
                data = await self._undo(mark, data)
        finally:
            self._ended(running, mark, ended, data)

    async def _undo(self, mark: int, data: dict[str, Any]) -> dict[str, Any]:
        """A failed attempt leaves nothing to the next; where that fails, there is no next."""
        left = await self._ledger.release_since(mark)
        return {**data, "transient": False, "left": [entry.resource for entry in left]} if left else data

    def _ended(self, running: _Running, mark: int, ended: str, data: dict[str, Any]) -> None:
        running.ended.set()
        if running.leaving or ended == "cancelled":
            fields = {"activity": running.activity, "entry": running.entry, "ended": ended}
            error = {"error": data["message"]} if ended == "error" else {}
            self._recorder.append("activity", fields | error)
            return
        if ended == "done":
            acquired = {e.resource: e.id for e in self._ledger.entries if e.id > mark}
            data = {**data, "acquired": acquired} if acquired else data
        self.inbox.put(Event(ended, data, entry=running.entry, activity=running.activity))

    async def _leave(self) -> None:
        """Cancels the activity and waits for its clean-up; events stay in the inbox, but for `abort`."""
        running = self._running
        if running is not None and not running.ended.is_set():
            running.leaving = True
            running.scope.cancel()
            async with trio.open_nursery() as waiting:
                waiting.start_soon(self._bound_cleanup, running)
                await running.ended.wait()
                waiting.cancel_scope.cancel()

    async def _bound_cleanup(self, running: _Running) -> None:
        deadline = trio.current_time() + running.cleanup
        while trio.current_time() < deadline and not self.inbox.holds("abort"):
            await self.inbox.wait(until=deadline)
            await self.inbox.settle()
        running.cut_cleanup()
        self._ledger.cut()

    async def _next_event(self) -> Event:
        while True:
            if not self.inbox.waiting:
                await self.inbox.wait(until=self._next_timer()[0])
            await self.inbox.settle()
            due, timer = self._next_timer()
            event = self.inbox.take_nowait(until=due)
            if event is not None:
                return event
            if trio.current_time() >= due:
                return Event(timer, entry=self.snapshot.entry)

    def _next_timer(self) -> tuple[float, str]:
        state = self._machine.lifecycle.states[self.snapshot.state]
        timers = [(self._retry_due, "retry.due")]
        if state.timeout is not None:
            timers.insert(0, (self._entered + state.timeout, "timeout"))
        if state.idle is not None:
            timers.append((self._touched + state.idle, "idle"))
        return min(timers, key=lambda timer: timer[0])

    async def _start(self, owner: Owner) -> Any:
        return await self._nursery.start(self._own, owner)

    async def _own(self, owner: Owner, *, task_status: trio.TaskStatus[Any]) -> None:
        status = _Status(task_status)
        try:
            await owner(task_status=status)
        except Exception as exc:
            if not status.given:
                raise
            self.inbox.put(Event("internal.error", {"message": self._defect(exc)}))

    def _error_data(self, exc: Exception) -> dict[str, Any]:
        """What an activity raised, as an event's data; of several errors at once the first one's."""
        errors = [error for error in _leaves(exc) if isinstance(error, ActivityError)]
        if len(errors) < len(_leaves(exc)):
            return {"message": self._defect(exc), "transient": False}
        return {**errors[0].data, "transient": all(error.data["transient"] for error in errors)}

    def _defect(self, exc: Exception) -> str:
        """Keeps the traceback for `--debug`; the journal gets the type and the message only."""
        self.tracebacks.append("".join(traceback.format_exception(exc)))
        first = next((e for e in _leaves(exc) if not isinstance(e, ActivityError)), _leaves(exc)[0])
        return f"internal error: {type(first).__name__}: {first}"


class _Status(trio.TaskStatus[Any]):
    """Knows whether the task has started: what it raises before belongs to its starter."""

    def __init__(self, inner: trio.TaskStatus[Any]) -> None:
        self._inner = inner
        self.given = False

    def started(self, value: Any = None) -> None:
        self._inner.started(value)
        self.given = True


def _leaves(exc: Exception) -> list[Exception]:
    """The exceptions in nested groups, or the one that is no group."""
    if isinstance(exc, ExceptionGroup):
        return [leaf for inner in exc.exceptions for leaf in _leaves(inner)]
    return [exc]


def _end_fields(outcome: Outcome) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "state": outcome.state,
        "success": outcome.success,
        "seconds": round(outcome.seconds, 3),
        "left": [left_data(left) for left in outcome.left],
    }
    optional = {
        "verdict": outcome.verdict,
        "also": list(outcome.also),
        "warnings": list(outcome.warnings),
        "internal": outcome.internal,
    }
    return fields | {name: value for name, value in optional.items() if value}
