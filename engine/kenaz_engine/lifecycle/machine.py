"""The pure core: given a snapshot and an event, what happens. No clock, no randomness, no effects.

`transitions` holds the table and picks the arm; what is stale and what is tried again is settled before it is
asked. Snapshots are values: `decide` never changes the one it was given. The rules are numbered in
docs/reference/lifecycle.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import transitions

from kenaz_engine.lifecycle.model import Arm, Guard, Lifecycle, State
from kenaz_engine.lifecycle.vocabulary import Resource, Vocabulary


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. `data` is plain JSON.

    Outcomes and timers carry the `entry` of the state that they belong to, outcomes their `activity` too.
    Events of a resource carry its ledger `id`.
    """

    type: str
    data: Mapping[str, Any] = field(default_factory=dict)
    entry: int | None = None
    activity: str = ""
    id: int | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Where a session stands. Everything that later decisions depend on is in here.

    `entry` counts entries into states, `attempt` the starts of the activity within this entry; `waiting` is
    True between a failed attempt and the next. `verdict` is the first failure (empty: success so far), `also`
    the later ones. `ids` maps each resource to the newest ledger id seen, `lost` to the newest that is gone.
    """

    state: str
    entry: int = 1
    attempt: int = 1
    waiting: bool = False
    verdict: str = ""
    also: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    counters: Mapping[str, int] = field(default_factory=dict)
    ids: Mapping[str, int] = field(default_factory=dict)
    lost: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Enter:
    """Leave the state one is in, wait for its clean-up, then enter `state` and start its activity."""

    state: str
    entry: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Stay; `seconds` (nominal, before jitter) later put `retry.due`."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Restart:
    """Stay, and start the state's activity again."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The session has reached the final `state`."""

    state: str
    success: bool


Effect = Enter | Wait | Restart | Finish


@dataclass(frozen=True, slots=True)
class Decision:
    """What an event led to. `reason` is why it was ignored (`stale`, `foreign`, `declared`, `unhandled`,
    `finished`), empty otherwise; `arm` is the line of the transition taken, 0 where none was."""

    snapshot: Snapshot
    effects: tuple[Effect, ...] = ()
    reason: str = ""
    arm: int = 0

    @property
    def ignored(self) -> bool:
        """True when the event led to nothing."""
        return bool(self.reason)


class UnexpectedEvent(Exception):
    """A strict lifecycle was given an event that its current state does not name."""


class _Cursor:
    """The throw-away model that `transitions` moves for one decision."""

    __slots__ = ("event", "snapshot", "state")

    def __init__(self, snapshot: Snapshot, event: Event) -> None:
        self.state = snapshot.state
        self.snapshot = snapshot
        self.event = event


class Machine:
    """A lifecycle, compiled. One serves any number of sessions."""

    def __init__(self, lifecycle: Lifecycle, vocabulary: Vocabulary) -> None:
        self.lifecycle = lifecycle
        self._raisers = {
            event: resource for resource in vocabulary.resources.values() for event in resource.raises
        }
        self._around = {name: _around(vocabulary, name) for name in vocabulary.resources}
        self._arms: dict[tuple[str, str], tuple[Arm, ...]] = {
            (state.name, event): arms
            for state in lifecycle.states.values()
            for event in sorted({*state.on, *lifecycle.any})
            if (arms := lifecycle.arms(state, event))
        }
        self._compile()

    def _compile(self) -> None:
        self._table = table = transitions.Machine(
            model=None,
            states=list(self.lifecycle.states),
            initial=self.lifecycle.initial,
            auto_transitions=False,
            send_event=True,
            queued=False,
        )
        self._rows: dict[tuple[str, str], tuple[tuple[Arm, transitions.Transition], ...]] = {}
        for (state, event), arms in self._arms.items():
            for arm in arms:
                condition = _condition(arm.when) if arm.when else None
                table.add_transition(event, state, arm.target, conditions=condition)
            compiled = table.get_transitions(event, state)
            self._rows[state, event] = tuple(zip(arms, compiled, strict=True))

    def start(self) -> Decision:
        """The decision that begins every session."""
        snapshot = Snapshot(self.lifecycle.initial)
        return Decision(snapshot, (Enter(snapshot.state, snapshot.entry),))

    def decide(self, snapshot: Snapshot, event: Event) -> Decision:
        """What `event` leads to. Raises UnexpectedEvent where a strict lifecycle does not name it."""
        state = self.lifecycle.states[snapshot.state]
        if state.final:
            return Decision(snapshot, reason="finished")
        if event.entry is not None and event.entry != snapshot.entry:
            return Decision(snapshot, reason="stale")
        if event.activity and event.activity != state.invoke:
            return Decision(snapshot, reason="foreign")
        resource = self._raisers.get(event.type)
        if resource is not None and event.id is not None:
            if self._is_stale(snapshot, resource, event.id):
                return Decision(snapshot, reason="stale")
            snapshot = _seen(snapshot, resource, event)
        match event.type:
            case "retry.due":
                return _due(snapshot)
            case "error" if _admits(state, snapshot, event):
                assert state.retry is not None
                nominal = state.retry.backoff.nominal(snapshot.attempt)
                waiting = replace(snapshot, attempt=snapshot.attempt + 1, waiting=True)
                return Decision(waiting, (Wait(nominal),))
        return self._transit(state, snapshot, event)

    def _transit(self, state: State, snapshot: Snapshot, event: Event) -> Decision:
        if (state.name, event.type) not in self._arms:
            if event.type in state.ignore:
                return Decision(snapshot, reason="declared")
            if self.lifecycle.strict:
                raise UnexpectedEvent(f"state {state.name!r} does not name the event {event.type!r}")
            return Decision(snapshot, reason="unhandled")
        arm = self._pick(snapshot, event)
        if arm is None:
            return Decision(snapshot, reason="unhandled")
        moved = _moved(snapshot, arm, event)
        final = self.lifecycle.states[arm.target].final
        effect: Effect = Finish(arm.target, final == "success") if final else Enter(arm.target, moved.entry)
        return Decision(moved, (effect,), arm=arm.line)

    def _pick(self, snapshot: Snapshot, event: Event) -> Arm | None:
        # The rows are run one by one, which is what Event.trigger does, so that it is known which was taken.
        rows = self._rows[snapshot.state, event.type]
        attempt = transitions.EventData(None, None, self._table, _Cursor(snapshot, event), (), {})
        return next((arm for arm, row in rows if row.execute(attempt)), None)

    def _is_stale(self, snapshot: Snapshot, resource: Resource, ledger_id: int) -> bool:
        """An older incarnation, one already lost, or one inside of something that is lost."""
        ids, lost = snapshot.ids, snapshot.lost
        if ledger_id < ids.get(resource.name, 0) or ledger_id <= lost.get(resource.name, 0):
            return True
        return any(
            outer in lost and lost[outer] >= ids.get(outer, 0) for outer in self._around[resource.name]
        )


class Table(Machine):
    """The same decisions without `transitions`, several times as fast: for a replay of many records.

    Sessions run on `Machine`; a property test holds the two against each other.
    """

    def _compile(self) -> None:
        """The arms are all that is needed."""

    def _pick(self, snapshot: Snapshot, event: Event) -> Arm | None:
        for arm in self._arms[snapshot.state, event.type]:
            if arm.when is None or holds(arm.when, snapshot, event):
                return arm
        return None


def _condition(guard: Guard) -> Callable[[transitions.EventData], bool]:
    def met(trigger: transitions.EventData) -> bool:
        cursor = cast(_Cursor, trigger.model)
        return holds(guard, cursor.snapshot, cursor.event)

    return met


def _around(vocabulary: Vocabulary, name: str) -> tuple[str, ...]:
    """The resources that the named one lies within, nearest first."""
    outer = vocabulary.resources[name].within
    return (outer, *_around(vocabulary, outer)) if outer else ()


def holds(guard: Guard, snapshot: Snapshot, event: Event) -> bool:
    """Whether a guard lets `event` pass, seen from `snapshot`."""
    match guard.kind:
        case "data":
            value = event.data.get(guard.key)
            return type(value) is type(guard.value) and bool(value == guard.value)
        case "verdict":
            return bool(guard.value == ("failure" if snapshot.verdict else "success"))
        case "below":
            return bool(snapshot.counters.get(guard.key, 0) < guard.value)


def _admits(state: State, snapshot: Snapshot, event: Event) -> bool:
    """Whether another attempt is made: never over what the last one made and could not give back (`left`)."""
    retry = state.retry
    if retry is None or snapshot.attempt >= retry.attempts or event.data.get("left"):
        return False
    return retry.when is None or holds(retry.when, snapshot, event)


def _due(snapshot: Snapshot) -> Decision:
    if not snapshot.waiting:
        return Decision(snapshot, reason="stale")
    return Decision(replace(snapshot, waiting=False), (Restart(snapshot.attempt),))


def _seen(snapshot: Snapshot, resource: Resource, event: Event) -> Snapshot:
    assert event.id is not None
    ids, lost = snapshot.ids, snapshot.lost
    if ids.get(resource.name, 0) < event.id:
        ids = {**ids, resource.name: event.id}
    if event.type in resource.loses:
        lost = {**lost, resource.name: event.id}
    return replace(snapshot, ids=ids, lost=lost)


def _moved(snapshot: Snapshot, arm: Arm, event: Event) -> Snapshot:
    verdict, also, warnings, counters = snapshot.verdict, snapshot.also, snapshot.warnings, snapshot.counters
    if arm.fail:
        failure = _with_detail(arm.fail, event)
        verdict, also = (verdict, (*also, failure)) if verdict else (failure, also)
    if arm.warn:
        warnings = (*warnings, _with_detail(arm.warn, event))
    if arm.count:
        counters = {**counters, arm.count: counters.get(arm.count, 0) + 1}
    ids = snapshot.ids
    if event.type == "done" and (acquired := event.data.get("acquired")):
        ids = {**ids, **acquired}
    return Snapshot(
        state=arm.target,
        entry=snapshot.entry + 1,
        verdict=verdict,
        also=also,
        warnings=warnings,
        counters=counters,
        ids=ids,
        lost=snapshot.lost,
    )


def _with_detail(text: str, event: Event) -> str:
    detail = event.data.get("message")
    return f"{text}: {detail}" if detail else text
