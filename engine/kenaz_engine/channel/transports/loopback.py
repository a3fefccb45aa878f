"""A port of 127.0.0.1 behind two secrets: what a UNIX socket is where Python has none, as on Windows.

A file stands where the socket's would, in a directory that only this user can enter; its form, and who dials,
are in kenaz_drivers/_common/loopback.py. Anybody on the host can dial the port, and whoever has not said the
secret is not heard. Who can read the file is this user, or an administrator. See decision 25.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import trio

from kenaz_drivers.host import LOOPBACK, PATIENCE, port_owner, read_line
from kenaz_engine.channel.transports import Accepted, TransportError
from kenaz_engine.channel.transports.unix import BACKLOG, accept_socket
from kenaz_engine.shortage import what_to_do

CALLERS = 32
"""Most callers that have not said the secret yet; the one that came first makes room."""


class _Caller:
    """A connection whose peer has not proven yet that it may dial."""

    def __init__(self, connected: trio.socket.SocketType) -> None:
        self.stream = trio.SocketStream(connected)
        self._said = bytearray()
        self._deadline = trio.current_time() + PATIENCE

    async def proves(self, ask: bytes, answer: bytes) -> bool:
        """Whether it says the secret, in which case it is answered. May be cancelled, and asked again."""
        with trio.move_on_at(self._deadline), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await read_line(self.stream, self._said)
            if not hmac.compare_digest(self._said, ask):
                return False
            with trio.CancelScope(shield=True):  # one line fits into any buffer
                await self.stream.send_all(answer)
            return True
        return False


class LoopbackListener:
    """Made by `listen_loopback`."""

    def __init__(self, listening: trio.socket.SocketType, path: Path, ask: str, answer: str) -> None:
        status = path.lstat()
        self.path = path
        self._file = status.st_dev, status.st_ino
        self._socket = listening
        self._ask, self._answer = (f"{text}\n".encode() for text in (ask, answer))
        self._callers: list[_Caller] = []
        self._proven: deque[_Caller] = deque()

    @property
    def address(self) -> str:
        """`loopback:PATH`."""
        return f"loopback:{self.path}"

    async def accept(self) -> Accepted:
        """The next connection of somebody who can read the file; others are closed, and hold nobody up.
        Raises TransportError."""
        while True:
            stream = (await self._next_proven()).stream
            with suppress(OSError):  # gone again while another was given
                return Accepted(stream, f"port {stream.socket.getpeername()[1]}, which knew the secret")
            await trio.aclose_forcefully(stream)

    async def _next_proven(self) -> _Caller:
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            for caller in self._callers:
                nursery.start_soon(self._hear, caller, nursery.cancel_scope)
            try:
                while not self._proven:
                    caller = _Caller(await accept_socket(self._socket))
                    self._callers.append(caller)  # from here on it is closed on every path
                    nursery.start_soon(self._hear, caller, nursery.cancel_scope)
                    if len(self._callers) > CALLERS:
                        await trio.aclose_forcefully(self._callers[0].stream)
            except (TransportError, trio.ClosedResourceError) as exc:
                failure = exc
            nursery.cancel_scope.cancel()
        if not self._proven:
            assert failure is not None
            raise failure
        return self._proven.popleft()

    async def _hear(self, caller: _Caller, done: trio.CancelScope) -> None:
        # Where this is cancelled, another was given: this one is heard on by the next `accept`.
        proven = await caller.proves(self._ask, self._answer)
        self._callers.remove(caller)
        if proven:
            self._proven.append(caller)
            done.cancel()
        else:
            await trio.aclose_forcefully(caller.stream)

    async def aclose(self) -> None:
        """Stops listening, and removes the file if it is still ours. Idempotent."""
        self._socket.close()
        for caller in (*self._callers, *self._proven):
            await trio.aclose_forcefully(caller.stream)
        self._callers.clear()
        self._proven.clear()
        with suppress(FileNotFoundError):
            status = self.path.lstat()
            if (status.st_dev, status.st_ino) == self._file:
                self.path.unlink()
        await trio.lowlevel.checkpoint()


class OwnedPort:
    """A port of 127.0.0.1 for one program that can say no secret, such as QEMU: it is known by its process.
    Made by `listen_owned`."""

    def __init__(self, listening: trio.socket.SocketType, owner: Callable[[int, int], int]) -> None:
        self.port: int = listening.getsockname()[1]
        self._socket = listening
        self._owner = owner
        self._pid = 0
        self._known = trio.Event()

    @property
    def address(self) -> str:
        """`tcp:ADDRESS:PORT`."""
        return f"tcp:{LOOPBACK}:{self.port}"

    def expect(self, pid: int) -> None:
        """Names the process that may connect, which has been started by now."""
        self._pid = pid
        self._known.set()

    async def accept(self) -> Accepted:
        """The next connection of that process; others are closed. Raises TransportError."""
        await self._known.wait()
        while True:
            connected = await accept_socket(self._socket)
            try:
                if self._owner(connected.getpeername()[1], self.port) == self._pid:
                    return Accepted(trio.SocketStream(connected), f"process {self._pid}")
            except OSError:  # gone again
                pass
            connected.close()

    async def aclose(self) -> None:
        """Stops listening. Idempotent."""
        self._socket.close()
        await trio.lowlevel.checkpoint()


def listen_owned(owner: Callable[[int, int], int] = port_owner) -> OwnedPort:
    """Takes a free port and listens. `owner` says whose connection from the one port to the other it
    is, 0 where that is not known. Raises TransportError."""
    return OwnedPort(trio.socket.from_stdlib_socket(listening_port()), owner)


def listen_loopback(path: str | os.PathLike[str]) -> LoopbackListener:
    """Takes a free port of 127.0.0.1, listens, and writes the file. Raises TransportError, also where the
    file exists."""
    place = Path(path)
    ask, answer = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
    listening = listening_port()
    try:
        said = {"port": listening.getsockname()[1], "ask": ask, "answer": answer}
        file = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(file, json.dumps(said).encode())
        finally:
            os.close(file)
        return LoopbackListener(trio.socket.from_stdlib_socket(listening), place, ask, answer)
    except OSError as exc:
        listening.close()
        if isinstance(exc, FileExistsError):
            raise TransportError(
                f"{place}: exists already", hint="another session uses it, or left it: remove it if none runs"
            ) from None
        raise TransportError(f"{place}: cannot listen: {exc.strerror or exc}", hint=what_to_do(exc)) from None


def listening_port() -> socket.socket:
    """A socket that listens on a free port of 127.0.0.1, which nobody else can take. Raises
    TransportError."""
    listening = socket.socket()
    try:
        # Windows gives a port that is in use to whoever asks for it by SO_REUSEADDR, but for this.
        if exclusive := getattr(socket, "SO_EXCLUSIVEADDRUSE", None):
            listening.setsockopt(socket.SOL_SOCKET, exclusive, 1)
        listening.bind((LOOPBACK, 0))
        listening.listen(BACKLOG)
    except OSError as exc:
        listening.close()
        raise TransportError(
            f"no port of {LOOPBACK} can be had: {exc.strerror or exc}", hint=what_to_do(exc)
        ) from None
    return listening
