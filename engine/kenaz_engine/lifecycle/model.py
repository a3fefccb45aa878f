"""A lifecycle as frozen values. What the words mean is in docs/reference/lifecycle.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

OUTCOMES = ("done", "error", "timeout")
"""Events that end the work of a state: the first two come from its activity, the last from its clock."""

TIMERS = ("timeout", "idle", "retry.due")
"""Events that the runner's clock raises."""

REQUESTS = ("end", "abort")
"""Events that come from outside and may arise in every state."""


@dataclass(frozen=True, slots=True)
class Guard:
    """`data`: the event's `data[key]` equals `value`; `verdict`: so far `value` (success or failure);
    `below`: the counter `key` is below `value`."""

    kind: Literal["data", "verdict", "below"]
    key: str
    value: Any


@dataclass(frozen=True, slots=True)
class Arm:
    """One transition: taken by its event when `when` holds. `line` is its place in the lifecycle's file."""

    target: str
    when: Guard | None = None
    fail: str = ""
    warn: str = ""
    count: str = ""
    line: int = 0


@dataclass(frozen=True, slots=True)
class Backoff:
    """Nominal wait before attempt n+1: `first * factor**(n-1)`, at most `maximum` seconds; `jitter` is the
    fraction by which the runner may shorten or lengthen it."""

    first: float = 1.0
    factor: float = 2.0
    maximum: float = 30.0
    jitter: float = 0.0

    def nominal(self, attempt: int) -> float:
        """Seconds to wait after the failed attempt of that number (1 is the first)."""
        return min(self.maximum, self.first * self.factor ** min(attempt - 1, 64))


@dataclass(frozen=True, slots=True)
class Retry:
    """An `error` within `attempts` and for which `when` holds starts the activity again after `backoff`."""

    attempts: int
    when: Guard | None = None
    backoff: Backoff = Backoff()


@dataclass(frozen=True, slots=True)
class State:
    """A state. Times are in seconds; `timeout` None means `none` (allowed only beside `idle`)."""

    name: str
    invoke: str = ""
    timeout: float | None = None
    idle: float | None = None
    cleanup: float = 5.0
    retry: Retry | None = None
    on: Mapping[str, tuple[Arm, ...]] = field(default_factory=dict)
    ignore: frozenset[str] = frozenset()
    goal: bool = False
    final: Literal["success", "failure"] | None = None
    line: int = 0


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """A whole lifecycle. `any` holds the transitions that every state has that does not name their event."""

    name: str
    initial: str
    states: Mapping[str, State]
    any: Mapping[str, tuple[Arm, ...]] = field(default_factory=dict)
    description: str = ""
    strict: bool = False
    file: str = ""

    def arms(self, state: State, event: str) -> tuple[Arm, ...]:
        """The transitions that `event` has in `state`; a state's own entry hides `any` for that event."""
        if event in state.on:
            return state.on[event]
        if event in state.ignore or state.final:
            return ()
        return self.any.get(event, ())
