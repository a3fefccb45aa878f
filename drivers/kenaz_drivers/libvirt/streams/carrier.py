"""Joins a domain's console or channel with a UNIX socket of ours."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterator
from typing import Any

from kenaz_drivers.libvirt.streams.library import ERRORS, ON_HANDLE, ON_STREAM, READABLE, WRITABLE, Connection
from kenaz_drivers.libvirt.streams.store import PIECE, Failed

HELD = 4 << 20
"""Bytes for our side that are held before libvirt is left to itself."""

_TRY = 0.02
"""Seconds after which what libvirt did not take is tried again, while nothing may be read from it."""


class Carrier:
    """Joins a stream of libvirt with a socket of ours, in libvirt's own event loop.

    One thread: of two that use a connection of libvirt 9.0 at once, one may wait for ever. What our side does
    not take is held back where it comes from, once there is more than HELD of it: libvirt then reads no more.
    """

    def __init__(self, connection: Connection, stream: Any, near: socket.socket) -> None:
        self._connection = connection
        self._stream = stream
        self._near = near
        self._to_near = bytearray()
        self._to_far = b""
        self._over = False
        self._failure: Exception | None = None
        self._callbacks = ON_STREAM(self._on_stream), ON_HANDLE(self._on_near)
        near.setblocking(False)
        call = connection.call
        call("virStreamEventAddCallback", stream, READABLE | ERRORS, self._callbacks[0], None, None)
        self._watch = call("virEventAddHandle", near.fileno(), READABLE, self._callbacks[1], None, None)

    def run(self) -> None:
        """Returns when one side has ended and all that it had said was handed on. Raises Failed, OSError."""
        while not self._over:
            if len(self._to_near) > HELD:
                self._wait_for_near()
            else:
                self._connection.call("virEventRunDefaultImpl")
            if self._failure is not None:
                raise self._failure
        self._near.setblocking(True)
        self._near.sendall(self._to_near)

    def _wait_for_near(self) -> None:
        """Our side alone, for libvirt would read on. What it did not take is tried again."""
        reads = [] if self._to_far else [self._near]
        ready = select.select(reads, [self._near], [], _TRY if self._to_far else None)
        with self._noting():
            self._send()
        self._on_near(0, 0, READABLE * bool(ready[0]) | WRITABLE * bool(ready[1]), None)

    def _on_stream(self, stream: Any, events: int, data: Any) -> None:
        with self._noting():
            if events & WRITABLE:
                self._send()
            while len(self._to_near) <= HELD and (got := self._receive()) is not None:
                self._over = self._over or not got
                self._to_near += got
                if not got:
                    break
            self._flush()

    def _on_near(self, watch: int, file: int, events: int, data: Any) -> None:
        with self._noting():
            if events & (READABLE | ERRORS) and not self._to_far:
                self._to_far = self._near.recv(PIECE)
                self._over = not self._to_far
                self._send()
            self._flush()

    def _receive(self) -> bytes | None:
        """What has come; empty at the end, None where nothing has."""
        return self._connection.receive(self._stream)

    def _send(self) -> None:
        while self._to_far and (sent := self._connection.send(self._stream, self._to_far)) is not None:
            self._to_far = self._to_far[sent:]

    def _flush(self) -> None:
        """Hands on what our side takes, and asks for what is waited for."""
        with contextlib.suppress(BlockingIOError):
            while self._to_near:
                del self._to_near[: self._near.send(self._to_near)]
        library = self._connection.library
        near = (WRITABLE if self._to_near else 0) | (0 if self._to_far else READABLE)
        library.virEventUpdateHandle(self._watch, near)
        far = READABLE | ERRORS | (WRITABLE if self._to_far else 0)
        self._connection.call("virStreamEventUpdateCallback", self._stream, far)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """What is raised within a call of libvirt's is lost."""
        try:
            yield
        except (Failed, OSError) as error:
            self._failure = error
