"""Frames over a byte stream: read by whoever asks, written in order: at once where the stream takes all,
else by one task."""

from __future__ import annotations

import os
import sys
from collections import deque

import trio

from kenaz_engine.channel.framing import Framing, FramingError
from kenaz_engine.channel.resume import Inbox, NotKept, Outbox, ack, read_ack

READ = 128 * 1024
"""Bytes to ask the stream for. What is larger comes from the system and goes back to it each time."""

BATCH = 256 * 1024
"""Bytes that are written at once, unless one frame alone has more."""


PARTS = 256
"""Pieces that are written at once, two for a frame: the least that systems allow is 1024."""

if sys.platform == "win32":

    def _writev(descriptor: int, pieces: list[bytes]) -> int:
        raise BlockingIOError("nothing is gathered on this system")

else:
    from os import writev as _writev


class FrameQueue:
    """Payloads in order, bounded by bytes.

    Whoever puts looks for `has_room` first, or awaits `room`; `put` itself never waits, so that what was
    taken elsewhere is either there or here, whenever its task is cancelled. Hence the queue holds at most
    `bound` and what one `put` more adds.
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._payloads: deque[bytes] = deque()
        self._bytes = 0
        self._changed = trio.lowlevel.ParkingLot()

    def __len__(self) -> int:
        """How many payloads wait."""
        return len(self._payloads)

    @property
    def bytes_waiting(self) -> int:
        """Bytes of all payloads that wait."""
        return self._bytes

    @property
    def has_room(self) -> bool:
        """Whether less than `bound` bytes wait."""
        return self._bytes < self.bound

    def put(self, payload: bytes) -> None:
        """Adds a payload at the end."""
        self._payloads.append(payload)
        self._bytes += len(payload)
        self._wake()

    def head(self) -> bytes:
        """The first payload, which stays. Raises IndexError when there is none."""
        return self._payloads[0]

    def drop(self) -> bytes:
        """Takes the first payload away. Raises IndexError when there is none."""
        payload = self._payloads.popleft()
        self._bytes -= len(payload)
        self._wake()
        return payload

    def clear(self) -> None:
        """Drops what waits."""
        self._payloads.clear()
        self._bytes = 0
        self._wake()

    async def room(self) -> None:
        """Returns when `has_room`; at once, without a checkpoint, if that is so."""
        while not self.has_room:
            await self._changed.park()

    async def some(self) -> None:
        """Returns when a payload waits; at once, without a checkpoint, if that is so."""
        while not self._payloads:
            await self._changed.park()

    async def empty(self) -> None:
        """Returns when no payload waits; at once, without a checkpoint, if that is so."""
        while self._payloads:
            await self._changed.park()

    def _wake(self) -> None:
        if self._changed:
            self._changed.unpark_all()


class Connection:
    """Payloads in both directions over one stream, which it owns.

    `queue` is how many bytes may wait to be written before `room` waits. A peer that takes nothing for
    `write` seconds ends the connection: `failure` then says so. Once `number` was called, messages are
    numbered and kept, and `inbox` and `outbox` may outlive the connection.
    """

    def __init__(self, stream: trio.abc.Stream, framing: Framing, *, queue: int, write: float) -> None:
        self._stream = stream
        self._framing = framing
        self._write = write
        self._writing = trio.Lock()
        self._received: deque[bytes] = deque()
        self._changed = trio.lowlevel.ParkingLot()  # of those who wait for room
        self._work = trio.lowlevel.ParkingLot()  # of `run`
        self._passed_on = False
        self._ack = b""
        self._rest = b""  # of a frame that the stream has taken in part
        # A stream that is a socket may be read and written without trio's own steps, and be written without
        # its task and from several pieces of memory.
        self._socket: trio.SocketStream | None = None
        if sys.platform != "win32" and isinstance(stream, trio.SocketStream):
            self._socket = stream
        self._turns = 0  # for others, before the next read
        self.outbox = Outbox(queue)
        self.inbox: Inbox | None = None
        self.failure = ""
        self.broken = False  # for its owner to note that its end has been told

    @property
    def has_received(self) -> bool:
        """True when a payload has come that `receive` has not returned yet."""
        return bool(self._received)

    @property
    def has_room(self) -> bool:
        """Whether less than `queue` bytes wait; where messages are numbered, also of those that the peer has
        not acknowledged. True where the stream has ended and nothing is kept."""
        outbox = self.outbox
        if self.inbox is not None:
            return outbox.waiting_bytes + outbox.kept_bytes < outbox.bound
        return outbox.waiting_bytes < outbox.bound or bool(self.failure)

    def number(self, outbox: Outbox | None = None, inbox: Inbox | None = None) -> None:
        """Counts from now on what is put, and what `took` says was taken; or goes on with what an earlier
        connection counted."""
        if outbox is None:
            self.outbox.keep()
        else:
            self.outbox = outbox
        self.inbox = Inbox(self.outbox.bound) if inbox is None else inbox

    def grant(self, inbox: Inbox) -> None:
        """Counts what the peer sends from now on, and tells it so by `push`."""
        self.inbox = inbox
        self._ack = ack(inbox.received)

    def took(self, size: int) -> None:
        """A payload of that size is in good hands: the peer need not keep it. `push` tells it so."""
        if self.inbox is not None and self.inbox.took(size):
            self._ack = ack(self.inbox.received)

    def successor(self) -> Connection:
        """Another connection over the same stream, which it owns from now on; what was read stays to be
        received. This one counts as closed. Nobody may be using it."""
        heir = Connection(self._stream, self._framing, queue=self.outbox.bound, write=self._write)
        heir._received = self._received
        self._received = deque()
        self._passed_on = True
        self.fail("passed on")
        return heir

    def give_back(self, payload: bytes) -> None:
        """Has `receive` return this payload next."""
        self._received.appendleft(payload)

    async def run(self) -> None:
        """Writes what is put; returns when the stream has failed or was closed."""
        while not self.failure:
            if self.outbox or self._ack or self._rest:
                await self.flush()
            else:
                await self._work.park()

    async def fill(self) -> bool:
        """Reads from the stream once; False at its end. Raises FramingError when it ends within a frame.

        If cancelled, nothing was read. Others have a turn before each read but the first, and two where the
        last had not to wait: there is more on its way, and two frames at once cost little more than one.
        """
        for _ in range(self._turns):
            await trio.lowlevel.checkpoint()
        self._turns = 1
        try:
            if self._socket is None:
                data = bytes(await self._stream.receive_some(READ))
            else:
                data = await self._read(self._socket)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            self.fail(f"the connection broke: {exc.__cause__ or 'closed here'}")
            return False
        if not data:
            self._framing.close()
            return False
        self._received.extend(self._framing.feed(data))
        return True

    async def _read(self, stream: trio.SocketStream) -> bytes:
        """As `receive_some`, at a third of what that costs; no checkpoint where there is something."""
        waited = False
        while (fd := stream.socket.fileno()) >= 0:
            try:
                data = os.read(fd, READ)
            except BlockingIOError:
                waited = True
                await trio.lowlevel.wait_readable(fd)
            except OSError as exc:
                raise trio.BrokenResourceError from exc
            else:
                self._turns = 1 if waited else 2
                return data
        raise trio.ClosedResourceError

    async def receive(self) -> bytes | None:
        """The next payload, or None at the end of the stream. For one task at a time.

        Raises FramingError after the last payload before the fault. If cancelled, no payload is lost.
        Executes no checkpoint when a payload has already come.
        """
        while True:
            payload = self.receive_nowait()
            if payload is not None:
                return payload
            if not await self.fill():
                return None

    def receive_nowait(self) -> bytes | None:
        """As `receive`, but None where nothing has come yet."""
        while self._received:
            payload = self._received.popleft()
            if self.inbox is None or (number := read_ack(payload)) is None:
                return payload
            try:
                self.outbox.acknowledge(number)
            except NotKept as exc:
                raise FramingError("bad_ack", str(exc)) from None
            self._wake()
        if self._framing.error is not None:
            raise self._framing.error
        return None

    async def discard(self) -> None:
        """Reads to the end of the stream and keeps nothing."""
        self._received.clear()
        try:
            while await self._stream.receive_some(READ):
                pass
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    def put(self, payload: bytes) -> None:
        """Queues a payload, also beyond the bound; `push` or `flush` sees to it. After the stream's end it is
        dropped, unless it is numbered."""
        if self.inbox is not None or not self.failure:
            self.outbox.put(payload)

    def push(self) -> None:
        """Writes what is queued, as far as the stream takes it at once; `run` writes the rest."""
        if not self.outbox and not self._ack:
            return
        if self._socket is None or self._writing.locked() or self._rest or self.failure:
            self._work.unpark_all()
            return
        parts = self._gather()
        try:
            written = _writev(self._socket.socket.fileno(), parts)
        except BlockingIOError:
            written = 0
        except OSError as exc:
            self.fail(f"the connection broke: {exc}")
            return
        if written < sum(map(len, parts)):
            self._rest = b"".join(parts)[written:]
        if self._rest or self.outbox:
            self._work.unpark_all()
        self._wake()

    async def room(self, *, or_failure: bool = False) -> None:
        """Returns when `has_room`, or also when the stream has ended; at once, without a checkpoint, if that
        is so.

        A peer that acknowledges nothing for `write` seconds ends the connection.
        """
        while not self.has_room and not (or_failure and self.failure):
            if self.inbox is None or self.failure:
                await self._changed.park()
                continue
            lowest = self.outbox.lowest
            with trio.move_on_after(self._write) as scope:
                while not self.has_room and not self.failure and lowest == self.outbox.lowest:
                    await self._changed.park()
            if scope.cancelled_caught:
                self.fail(f"the peer acknowledged nothing for {self._write:g} s")
                await trio.aclose_forcefully(self._stream)

    async def send(self, payload: bytes) -> None:
        """Queues a payload when there is room. If cancelled, it was not queued."""
        await self.room()
        self.put(payload)
        self.push()

    async def flush(self) -> None:
        """Returns when what is queued has been written, or the stream has ended.

        If cancelled within a write, the stream is of no more use, and counts as ended.
        """
        try:
            self._writing.acquire_nowait()  # saves the common case a checkpoint
        except trio.WouldBlock:
            await self._writing.acquire()
        try:
            while not self.failure and (self.outbox or self._ack or self._rest):
                await self._write_batch()
        finally:
            self._writing.release()

    async def aclose(self) -> None:
        """Closes the stream at once, unless a successor has it. What is queued is dropped, unless it is
        numbered."""
        self.fail("closed here")
        if self._passed_on:
            await trio.lowlevel.checkpoint()
        else:
            await trio.aclose_forcefully(self._stream)

    def fail(self, reason: str) -> None:
        """The stream is of no more use; the first reason stays."""
        self.failure = self.failure or reason
        if self.inbox is None:
            self.outbox.clear()
        self._work.unpark_all()
        self._wake()

    def _gather(self) -> list[bytes]:
        """What is to be written next: heads and payloads of frames, not joined."""
        parts: list[bytes] = []
        pieces = self._framing.pieces
        for payload in self.outbox.take(BATCH, PARTS // 2):
            parts += pieces(payload)
        if self._ack:
            parts += self._framing.pieces(self._ack)
            self._ack = b""
        return parts

    async def _write_batch(self) -> None:
        data = self._rest or b"".join(self._gather())
        self._rest = b""
        self._wake()
        whole = False
        try:
            with trio.move_on_after(self._write):
                await self._stream.send_all(data)
                whole = True
            if not whole:
                self.fail(f"the peer took nothing for {self._write:g} s")
                await trio.aclose_forcefully(self._stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            self.fail(f"the connection broke: {exc.__cause__ or 'closed here'}")
        finally:
            if not whole:
                self.fail("a write was cut")

    def _wake(self) -> None:
        if self._changed:
            self._changed.unpark_all()
