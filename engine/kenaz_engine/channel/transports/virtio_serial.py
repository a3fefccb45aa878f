"""A virtio-serial port: one stream for as long as the machine runs, whoever opens it in the guest.

QEMU connects to our socket as it starts, long before there is a guest, and stays connected while agents
in the guest open the port, die, and open it again. What one of them left of a frame, in either direction, is
still in the stream when the next one writes. That one begins with a mark (rule F6 of the protocol), so what
stands before the mark is dropped; nothing is guessed from what the bytes look like or when they come.

Where the hypervisor tells that the guest has closed the port, the stream ends there for whoever reads it, and
the next `accept` gives another over the same connection. Without that, a new agent's mark alone tells.
"""

from __future__ import annotations

import os
import re
import selectors

import trio

from kenaz_engine.channel.framing import MARK
from kenaz_engine.channel.transports import Accepted, Listener
from kenaz_engine.channel.transports.loopback import OwnedPort, listen_owned
from kenaz_engine.channel.transports.unix import listen_unix

_MARKS = re.compile(MARK + rb"+")


class SerialPort:
    """Made by `listen_serial`. Its connections come one after the other."""

    def __init__(self, listener: Listener) -> None:
        self.openings = 0
        """How many writers have been seen to begin."""
        self._listener = listener
        self._stream: trio.SocketStream | None = None
        self._peer = ""
        self._opening: Opening | None = None
        self._marks = False  # whether this guest's agents write marks
        self._tail = 0  # how many bytes of a mark came last
        self._changed = trio.lowlevel.ParkingLot()

    @property
    def address(self) -> str:
        """`unix:PATH`, or on Windows `tcp:ADDRESS:PORT`: where the hypervisor connects."""
        return self._listener.address

    @property
    def port_address(self) -> str:
        """`ADDRESS:PORT`, where it is a port to which the hypervisor connects; else empty."""
        return self.address.removeprefix("tcp:") if isinstance(self._listener, OwnedPort) else ""

    def expect(self, pid: int) -> None:
        """Names the hypervisor's process, where it is that which tells it from others."""
        if isinstance(self._listener, OwnedPort):
            self._listener.expect(pid)

    async def accept(self) -> Accepted:
        """The port, at first; when that stream has been closed, the port for its next writer. Raises
        TransportError."""
        if self._stream is None:
            accepted = await self._listener.accept()
            assert isinstance(accepted.stream, trio.SocketStream)
            self._stream, self._peer = accepted.stream, accepted.peer
            await self._listener.aclose()  # there is one hypervisor: nobody else has business here
            self._opening = Opening(self, self._stream, skips=False)
        else:
            while self._opening is not None:
                await self._changed.park()
            self._opening = Opening(self, self._stream, skips=self._marks)
        return Accepted(self._opening, self._peer)

    def guest_closed(self) -> None:
        """The writer that was seen last has closed the port: what it wrote is read, then the stream ends."""
        if self._opening is not None:
            self._opening.end()

    async def next_opening(self, after: int) -> None:
        """Returns when more than `after` writers have been seen to begin."""
        while self.openings <= after:
            await self._changed.park()

    async def aclose(self) -> None:
        """Gives up the port. Idempotent."""
        try:
            await self._listener.aclose()
        finally:
            if self._stream is not None:
                await trio.aclose_forcefully(self._stream)

    def note(self, data: bytes, *, first: bool) -> None:
        """What was read: counts the writers that begin in it."""
        text = MARK[:1] * self._tail + data
        begun = len(_MARKS.findall(text)) - (self._tail == len(MARK))
        self._tail = min(len(text) - len(text.rstrip(MARK[:1])), len(MARK))
        self._marks = self._marks or begun > 0
        if first and not text.startswith(MARK[:1]):
            begun += 1
        if begun:
            self.openings += begun
            self._changed.unpark_all()

    def closed(self, opening: Opening) -> None:
        """Whoever had the stream has closed it."""
        if self._opening is opening:
            self._opening = None
            self._changed.unpark_all()


class Opening(trio.abc.Stream):
    """The port while one writer has it, as far as can be told. `skips` says that a mark must come first."""

    def __init__(self, port: SerialPort, stream: trio.SocketStream, *, skips: bool) -> None:
        self._port = port
        self._stream = stream
        self._skipped: bytes | None = b"" if skips else None  # its end, which may begin a mark
        self._begun = False
        self._ending = False
        self._closed = False
        self._receiving = trio.CancelScope()

    def end(self) -> None:
        """Has the stream end after what has come; nothing happens where nothing has."""
        if self._begun:
            self._ending = True
            self._receiving.cancel()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As of any stream. Nobody knows whether the guest reads it."""
        self._check()
        await self._stream.send_all(data)
        self._check()

    async def wait_send_all_might_not_block(self) -> None:
        """As of any stream."""
        self._check()
        await self._stream.wait_send_all_might_not_block()
        self._check()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As of any stream; empty when the guest has closed the port, or the machine is gone."""
        while True:
            self._check()
            if self._ending and not _readable(self._stream):
                await trio.lowlevel.checkpoint()
                return b""
            before = self._port.openings
            with trio.CancelScope() as self._receiving:
                data = bytes(await self._stream.receive_some(max_bytes))
            if self._receiving.cancelled_caught:
                continue
            if not data:
                self._check()
                return b""
            self._port.note(data, first=not self._begun and self._skipped is None)
            if self._port.openings > before:
                self._ending = False  # it was the one before who closed the port
            if kept := self._after_mark(data):
                self._begun = True
                return kept

    async def aclose(self) -> None:
        """Leaves the port to the next `accept`. Idempotent."""
        if not self._closed:
            self._closed = True
            self._receiving.cancel()
            self._port.closed(self)
        await trio.lowlevel.checkpoint()

    def _check(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("the port is somebody else's now")

    def _after_mark(self, data: bytes) -> bytes:
        if self._skipped is None:
            return data
        text = self._skipped + data
        at = text.find(MARK)
        if at < 0:
            self._skipped = text[1 - len(MARK) :]
            return b""
        self._skipped = None
        return text[at:]


def _readable(stream: trio.SocketStream) -> bool:
    """Whether something has come that was not read; also at the end of the stream."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream.socket.fileno(), selectors.EVENT_READ)
        return bool(selector.select(0))


def listen_serial_port() -> SerialPort:
    """Listens on a port of 127.0.0.1, for the process that `SerialPort.expect` names. Raises
    TransportError."""
    return SerialPort(listen_owned())


def listen_serial(path: str | os.PathLike[str]) -> SerialPort:
    """Listens where the hypervisor connects the port. Raises TransportError, as `listen_unix` does."""
    return SerialPort(listen_unix(path))
