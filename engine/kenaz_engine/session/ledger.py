"""What a session holds and must give back, written down before it is taken.

Each acquisition is `intent` (durable), the act, `acquired` with a handle that another process could release.
From intent to acquired no cancel interrupts it, so that a thing that exists is always known. Release runs in
reverse order, each entry in a fair share of the time left, and one that fails stops no other. Only `cut` ends
what is under way: its entries stay, for whoever releases next.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import trio

from kenaz_engine.journal.writer import Sink

T = TypeVar("T")

Release = Callable[[], Awaitable[None]]

ACQUIRE_BOUND = 30.0
"""Seconds that making a thing may take; waiting until it is ready is not part of that."""


BOUND = 5.0
"""Seconds that the release of a thing may take, of most kinds."""

BOUNDS: Mapping[str, float] = {"machine": 15.0}
"""The same, of others. A machine is asked, terminated, killed, reaped."""


class AcquireTimeout(Exception):
    """Making a thing took longer than ACQUIRE_BOUND, or was cut short."""


@dataclass(frozen=True, slots=True)
class Made:
    """What an acquisition made: its handle (plain JSON), and how this process gives it back."""

    handle: Mapping[str, Any]
    release: Release


@dataclass(slots=True, eq=False)
class Entry:
    """One thing held, or maybe held. `uses` are the ids of entries that it needs to stay until it is gone;
    `error` is why it could not be released when that was last tried."""

    id: int
    resource: str
    kind: str
    intent: Mapping[str, Any]
    uses: frozenset[int]
    bound: float
    handle: Mapping[str, Any] | None = None
    release: Release | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Left:
    """An entry that could not be released, and why. `reap` tries again."""

    id: int
    resource: str
    kind: str
    error: str


@dataclass(slots=True)
class Ledger:
    """The open entries of one session, oldest first.

    `by_intent` releases an entry of each kind from its intent alone: for acts that failed half-way.
    `by_handle` does so by the handle, for entries that another process made. `helps` is asked about an error
    of a release: true when something was done about it, and the release is to be tried once more.
    """

    sink: Sink
    by_intent: Mapping[str, Callable[[Mapping[str, Any]], Awaitable[None]]]
    by_handle: Mapping[str, Callable[[Mapping[str, Any]], Awaitable[None]]] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    helps: Callable[[OSError], bool] = lambda exc: False
    _last: int = 0
    _shields: list[trio.CancelScope] = field(default_factory=list)

    async def acquire(
        self,
        resource: str,
        kind: str,
        intent: Mapping[str, Any],
        make: Callable[[], Awaitable[tuple[Made, T]]],
        *,
        uses: Iterable[str] = (),
        bound: float | None = None,
    ) -> T:
        """Makes a thing and returns what `make` returned beside its handle.

        `bound` is the most seconds that its release may take, unless its kind says. When `make` raises, what
        it may have left is released from the intent alone, and the exception goes on; the entry stays only if
        that fails too.
        A cancel is heard before the intent and after the acquisition, not between.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self._last += 1
        used = frozenset(e.id for name in uses if (e := self.held(name)) is not None)
        bound = BOUNDS.get(kind, BOUND) if bound is None else bound
        entry = Entry(self._last, resource, kind, intent, used, bound)
        fields = {"id": entry.id, "resource": resource, "type": kind}
        with self._shield() as shield:
            self.sink.append("intent", {**fields, "intent": dict(intent), "uses": sorted(used)})
            self.entries.append(entry)
            try:
                with trio.move_on_after(ACQUIRE_BOUND) as scope:
                    made, value = await make()
                if scope.cancelled_caught:
                    raise AcquireTimeout(f"making the {resource} took longer than {ACQUIRE_BOUND:g} s")
            except BaseException:
                await self._release(entry, bound)
                raise
            entry.handle, entry.release = made.handle, made.release
            self.sink.append("acquired", {**fields, "handle": dict(made.handle)})
        await trio.lowlevel.checkpoint()
        if shield.cancelled_caught:
            raise AcquireTimeout(f"making the {resource} was cut short")
        return value

    def held(self, resource: str) -> Entry | None:
        """The newest open entry of a resource."""
        return next((e for e in reversed(self.entries) if e.resource == resource), None)

    async def release(self, resource: str) -> None:
        """Gives back the newest entry of a resource, if there is one. Raises ReleaseError if that fails."""
        entry = self.held(resource)
        if entry is not None and (left := await self._release_all([entry], math.inf)):
            raise ReleaseError(f"the {resource} could not be released: {left[0].error}")

    async def release_since(self, mark: int) -> list[Left]:
        """Gives back, in reverse order, all entries with an id above `mark`: what a failed attempt made."""
        return await self._release_all([e for e in self.entries if e.id > mark], math.inf)

    async def release_all(self, deadline: float) -> list[Left]:
        """Gives back everything, newest first, until `deadline` (trio's clock).

        Each entry may take an equal share of the time left, at most its own bound. What something unreleased
        still uses is kept. Returns what is left, newest first: causes before what follows from them.
        """
        return await self._release_all(list(self.entries), deadline)

    def cut(self) -> None:
        """Ends every acquisition and release under way, for the time they had is over; their entries stay."""
        for shield in self._shields:
            shield.cancel()

    def left(self) -> list[Left]:
        """What is held now, newest first, as what could not be released."""
        return [_left(entry) for entry in reversed(self.entries)]

    @property
    def last(self) -> int:
        """The id of the newest acquisition so far; 0 before the first."""
        return self._last

    @contextmanager
    def _shield(self) -> Iterator[trio.CancelScope]:
        with trio.CancelScope(shield=True) as shield:
            self._shields.append(shield)
            try:
                yield shield
            finally:
                self._shields.remove(shield)

    async def _release_all(self, entries: list[Entry], deadline: float) -> list[Left]:
        await trio.lowlevel.checkpoint_if_cancelled()
        with self._shield():
            for count, entry in zip(range(len(entries), 0, -1), reversed(entries), strict=True):
                user = next((e for e in self.entries if entry.id in e.uses), None)
                if user is not None:
                    entry.error = f"is still used by the {user.resource}"
                else:
                    share = max(0.0, deadline - trio.current_time()) / count
                    await self._release(entry, min(share, entry.bound))
        await trio.lowlevel.checkpoint_if_cancelled()
        return [_left(entry) for entry in reversed(entries) if entry in self.entries]

    async def _release(self, entry: Entry, seconds: float) -> None:
        """A hung release is given up after `seconds`; the entry then stays, and says why."""
        entry.error = "was cut short"
        try:
            with trio.move_on_after(seconds) as scope:
                try:
                    await self._give_back(entry)
                except OSError as exc:
                    if not self.helps(exc):
                        raise
                    await self._give_back(entry)
            entry.error = f"took longer than {seconds:.3g} s" if scope.cancelled_caught else ""
        except Exception as exc:
            entry.error = str(exc) or type(exc).__name__
        fields = {"id": entry.id, "resource": entry.resource}
        if entry.error:
            self.sink.append("note", {"about": "release", **fields, "error": entry.error})
        elif entry in self.entries:
            self.entries.remove(entry)
            self.sink.append("released", {**fields, "type": entry.kind})

    async def _give_back(self, entry: Entry) -> None:
        if entry.release is not None:
            await entry.release()
            return
        ways = self.by_intent if entry.handle is None else self.by_handle
        if entry.kind not in ways:
            raise ReleaseError(f"is a {entry.kind}, which this version cannot give back")
        await ways[entry.kind](entry.intent if entry.handle is None else entry.handle)


def still_held(records: Iterable[Mapping[str, Any]]) -> list[Entry]:
    """What a journal says is held, or maybe held, oldest first: what another process has to release."""
    held: dict[int, Entry] = {}
    for record in records:
        match record["kind"]:
            case "intent":
                bound = BOUNDS.get(record["type"], BOUND)
                held[record["id"]] = Entry(
                    record["id"],
                    record["resource"],
                    record["type"],
                    record["intent"],
                    frozenset(record["uses"]),
                    bound,
                )
            case "acquired":
                held[record["id"]].handle = record["handle"]
            case "released":
                del held[record["id"]]
    return list(held.values())


def _left(entry: Entry) -> Left:
    return Left(entry.id, entry.resource, entry.kind, entry.error or "was not released")


def left_data(left: Left) -> dict[str, Any]:
    """What could not be released, as `end` records have it."""
    return {"id": left.id, "resource": left.resource, "type": left.kind, "error": left.error}


class ReleaseError(Exception):
    """One resource could not be given back; it stays in the ledger."""
