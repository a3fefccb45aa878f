"""Tasks that serve a machine for as long as its context is open."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio


class Background:
    """Starts tasks that outlive a cancellation from outside, so that clean-up can still rely on them."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._scopes: set[trio.CancelScope] = set()
        self._idle = trio.Event()

    def start_soon(self, task: Callable[[], Awaitable[None]]) -> None:
        """Runs `task` until it returns or the context is left."""
        scope = trio.CancelScope(shield=True)
        self._scopes.add(scope)
        self._nursery.start_soon(self._run, task, scope)

    async def _run(self, task: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
        try:
            with scope:
                await task()
        finally:
            self._scopes.discard(scope)
            if not self._scopes:
                self._idle.set()

    async def stop(self) -> None:
        """Cancels all tasks and waits for their end, shielded."""
        for scope in self._scopes:
            scope.cancel()
        with trio.CancelScope(shield=True):
            while self._scopes:
                self._idle = trio.Event()
                await self._idle.wait()


@asynccontextmanager
async def open_background() -> AsyncIterator[Background]:
    """Opens a Background. What its body raises comes out as it is, not in a group."""
    raised: BaseException | None = None
    async with trio.open_nursery() as nursery:
        background = Background(nursery)
        try:
            yield background
        except BaseException as error:  # re-raised below, outside the nursery, which would wrap it
            raised = error
        await background.stop()
    if raised is not None:
        raise raised
