"""Frames over a byte stream: read by whoever asks, written in order by one task."""

from __future__ import annotations

from collections import deque

import trio

from kenaz_engine.channel.framing import Framing

READ = 128 * 1024
"""Bytes to ask the stream for."""

BATCH = 64 * 1024
"""Bytes that are written at once, unless one frame alone has more."""


class FrameQueue:
    """Payloads in order, bounded by bytes.

    Whoever puts awaits `room` first; `put` itself never waits, so that what was taken elsewhere is either
    there or here, whenever its task is cancelled. Hence the queue holds at most `bound` and what one `put`
    more adds.
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._payloads: deque[bytes] = deque()
        self._bytes = 0
        self._changed = trio.lowlevel.ParkingLot()
        self._closed = False

    @property
    def bytes_waiting(self) -> int:
        """Bytes of all payloads that wait."""
        return self._bytes

    def put(self, payload: bytes) -> None:
        """Adds a payload at the end; a closed queue drops it."""
        if not self._closed:
            self._payloads.append(payload)
            self._bytes += len(payload)
            self._changed.unpark_all()

    def head(self) -> bytes:
        """The first payload, which stays. Raises IndexError when there is none."""
        return self._payloads[0]

    def drop(self) -> bytes:
        """Takes the first payload away. Raises IndexError when there is none."""
        payload = self._payloads.popleft()
        self._bytes -= len(payload)
        self._changed.unpark_all()
        return payload

    def close(self) -> None:
        """Drops what waits and what still comes; nobody waits for room any more."""
        self._closed = True
        self._payloads.clear()
        self._bytes = 0
        self._changed.unpark_all()

    async def room(self) -> None:
        """Returns when less than `bound` bytes wait; at once, without a checkpoint, if that is so."""
        while self._bytes >= self.bound:
            await self._changed.park()

    async def some(self) -> None:
        """Returns when a payload waits, or the queue is closed; at once, without a checkpoint, if that is
        so."""
        while not self._payloads and not self._closed:
            await self._changed.park()

    async def empty(self) -> None:
        """Returns when no payload waits; at once, without a checkpoint, if that is so."""
        while self._payloads:
            await self._changed.park()


class Connection:
    """Payloads in both directions over one stream, which it owns.

    `queue` is how many bytes may wait to be written before `room` waits. A peer that takes nothing for
    `write` seconds ends the connection: `failure` then says so.
    """

    def __init__(self, stream: trio.abc.Stream, framing: Framing, *, queue: int, write: float) -> None:
        self._stream = stream
        self._framing = framing
        self._queue = FrameQueue(queue)
        self._write = write
        self._writing = trio.Lock()
        self._received: deque[bytes] = deque()
        self._passed_on = False
        self.failure = ""

    @property
    def has_received(self) -> bool:
        """True when a payload has come that `receive` has not returned yet."""
        return bool(self._received)

    def successor(self) -> Connection:
        """Another connection over the same stream, which it owns from now on; what was read stays to be
        received. This one counts as closed. Nobody may be using it."""
        heir = Connection(self._stream, self._framing, queue=self._queue.bound, write=self._write)
        heir._received = self._received
        self._received = deque()
        self._passed_on = True
        self._fail("passed on")
        return heir

    def give_back(self, payload: bytes) -> None:
        """Has `receive` return this payload next."""
        self._received.appendleft(payload)

    async def run(self) -> None:
        """Writes what is put; returns when the stream has failed or was closed."""
        while not self.failure:
            await self._queue.some()
            await self.flush()

    async def fill(self) -> bool:
        """Reads from the stream once; False at its end. Raises FramingError when it ends within a frame.

        If cancelled, nothing was read.
        """
        try:
            data = await self._stream.receive_some(READ)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            self._fail(f"the connection broke: {exc.__cause__ or 'closed here'}")
            return False
        if not data:
            self._framing.close()
            return False
        self._received.extend(self._framing.feed(bytes(data)))
        return True

    async def receive(self) -> bytes | None:
        """The next payload, or None at the end of the stream. For one task at a time.

        Raises FramingError after the last payload before the fault. If cancelled, no payload is lost.
        Executes no checkpoint when a payload has already come.
        """
        while not self._received:
            if self._framing.error is not None:
                raise self._framing.error
            if not await self.fill():
                return None
        return self._received.popleft()

    async def discard(self) -> None:
        """Reads to the end of the stream and keeps nothing."""
        self._received.clear()
        try:
            while await self._stream.receive_some(READ):
                pass
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    def put(self, payload: bytes) -> None:
        """Queues a payload, also beyond the bound. After the stream's end it is dropped."""
        self._queue.put(payload)

    async def room(self) -> None:
        """Returns when the queue is below its bound, or the stream has ended."""
        await self._queue.room()

    async def send(self, payload: bytes) -> None:
        """Queues a payload when there is room. If cancelled, it was not queued."""
        await self._queue.room()
        self._queue.put(payload)

    async def flush(self) -> None:
        """Returns when what is queued has been written, or the stream has ended.

        If cancelled within a write, the stream is of no more use, and counts as ended.
        """
        try:
            self._writing.acquire_nowait()  # saves the common case a checkpoint
        except trio.WouldBlock:
            await self._writing.acquire()
        try:
            while not self.failure and self._queue.bytes_waiting:
                await self._write_batch()
        finally:
            self._writing.release()

    async def aclose(self) -> None:
        """Closes the stream at once, unless a successor has it. What is queued is dropped."""
        self._fail("closed here")
        if self._passed_on:
            await trio.lowlevel.checkpoint()
        else:
            await trio.aclose_forcefully(self._stream)

    async def _write_batch(self) -> None:
        frames: list[bytes] = []
        size = 0
        while self._queue.bytes_waiting and (not frames or size + len(self._queue.head()) <= BATCH):
            frames.append(self._framing.encode(self._queue.drop()))
            size += len(frames[-1])
        whole = False
        try:
            with trio.move_on_after(self._write):
                await self._stream.send_all(frames[0] if len(frames) == 1 else b"".join(frames))
                whole = True
            if not whole:
                self._fail(f"the peer took nothing for {self._write:g} s")
                await trio.aclose_forcefully(self._stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            self._fail(f"the connection broke: {exc.__cause__ or 'closed here'}")
        finally:
            if not whole:
                self._fail("a write was cut")

    def _fail(self, reason: str) -> None:
        self.failure = self.failure or reason
        self._queue.close()
