"""Where a guest's connection comes from: one module for each kind of listening socket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import trio


class TransportError(Exception):
    """A transport cannot be used here. `hint` is what the user can do about it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Accepted:
    """A connection whose peer is the one that was expected; `peer` describes it, for the journal."""

    stream: trio.SocketStream
    peer: str


class Listener(Protocol):
    """A bound socket that listens already."""

    @property
    def address(self) -> str:
        """Where the guest's side dials: `unix:PATH` or `vsock:PORT`."""
        ...

    async def accept(self) -> Accepted:
        """The next connection of the expected peer; others are closed. Raises TransportError."""
        ...

    async def aclose(self) -> None:
        """Stops listening. Accepted connections stay. Idempotent."""
        ...
