"""The one way into a session: events, in the order in which the runner takes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import trio

from kenaz_engine.lifecycle.machine import Event

SIMULTANEOUS = (
    "abort",
    "vm.exited",
    "guest.panic",
    "guest.bye",
    "channel.lost",
    "error",
    "done",
    "end",
)
"""Order of events with equal stamps on virtual time; what is not named here comes last, by its name."""


@dataclass(frozen=True, slots=True)
class Stamped:
    """An event and the moment (trio's clock) at which it was put."""

    at: float
    event: Event


class Inbox:
    """Events waiting to be decided. Anyone may put; only the runner takes.

    With `settle` (virtual time), taking waits until every task is blocked and orders equal stamps by
    SIMULTANEOUS, or with `opposite` the other way round, so that the schedule of tasks does not show in the
    journal. `ties` counts how often there were equal stamps to order.
    """

    def __init__(self, *, settle: bool = False, opposite: bool = False) -> None:
        self.ties = 0
        self._waiting: list[Stamped] = []
        self._put = trio.Event()
        self._settle = settle
        self._opposite = opposite

    @property
    def waiting(self) -> tuple[Stamped, ...]:
        """What was put and not yet taken, in the order of putting."""
        return tuple(self._waiting)

    def put(self, event: Event) -> None:
        """Puts an event, stamped with the time of now. Never blocks."""
        self._waiting.append(Stamped(trio.current_time(), event))
        self._put.set()

    def holds(self, kind: str) -> bool:
        """True when an event of that type waits to be decided."""
        return any(stamped.event.type == kind for stamped in self._waiting)

    def take_nowait(self, *, until: float = math.inf) -> Event | None:
        """The next event that was put at or before `until`."""
        ready = [s for s in self._waiting if s.at <= until]
        if not ready:
            return None
        first = self._first(ready) if self._settle else ready[0]
        self._waiting.remove(first)
        return first.event

    def _first(self, ready: list[Stamped]) -> Stamped:
        earliest = min(stamped.at for stamped in ready)
        equal = [stamped for stamped in ready if stamped.at == earliest]
        self.ties += len(equal) > 1
        return max(equal, key=_rank) if self._opposite else min(equal, key=_rank)

    async def wait(self, *, until: float = math.inf) -> None:
        """Returns when an event is put from now on, or at `until`."""
        self._put = trio.Event()
        with trio.move_on_at(until):
            await self._put.wait()

    async def settle(self) -> None:
        """On virtual time, lets every other task run to its next wait first."""
        if self._settle:
            # Late: this module brings pytest along, where that is installed.
            from trio.testing import wait_all_tasks_blocked

            await wait_all_tasks_blocked()
        else:
            await trio.lowlevel.checkpoint()


def _rank(stamped: Stamped) -> tuple[int, str, int, str]:
    """Total, so that nothing is left to the order in which tasks happened to run."""
    event = stamped.event
    place = SIMULTANEOUS.index(event.type) if event.type in SIMULTANEOUS else len(SIMULTANEOUS)
    return place, event.type, event.id or 0, repr(sorted(event.data.items()))
