"""What children print: the guest's console, and a hypervisor's last words."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Sequence

import trio


def describe_end(who: str, code: int, log: Sequence[str] = ()) -> str:
    """How a child ended, in words: by which signal (a negative code), or with which code and last line."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:  # one of real time has no name
            name = f"signal {-code}"
        return f"{name} killed {who}"
    return f"{who} ended with code {code}{f': {log[-1]}' if log else ''}"


class LogTail:
    """The last lines of a text that comes in chunks. Bounded, whatever the child prints.

    `ended` is set when a stream that was given to `read` has ended.
    """

    def __init__(self, lines: int = 40, width: int = 400) -> None:
        self._lines: deque[str] = deque(maxlen=lines)
        self._width = width
        self._rest = b""
        self.ended = trio.Event()

    async def read(self, stream: trio.abc.ReceiveStream) -> None:
        """Keeps flowing what a child prints, and its last lines."""
        try:
            async for data in Console(stream):
                self.feed(data)
        finally:
            self.ended.set()

    def feed(self, data: bytes) -> None:
        *whole, rest = (self._rest + data).split(b"\n")
        for line in whole[-(self._lines.maxlen or 1) :]:
            self._lines.extend(self._clean(line))
        # The end of an endless line says more than its beginning.
        self._rest = rest[-4 * self._width :]

    def _clean(self, line: bytes) -> tuple[str, ...]:
        text = line.decode("utf-8", "replace")
        printable = "".join(char if char.isprintable() else " " for char in text).strip()
        return (printable[-self._width :],) if printable else ()

    def lines(self) -> tuple[str, ...]:
        """The last lines, oldest first, with what stands behind the last line feed. No line is empty."""
        return (*self._lines, *self._clean(self._rest))[-(self._lines.maxlen or 1) :]


class Console:
    """A stream as the contract's `console()`: ends, without an error, when the machine is gone."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream

    def __aiter__(self) -> Console:
        return self

    async def __anext__(self) -> bytes:
        try:
            data = await self._stream.receive_some()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            data = b""
        if not data:
            raise StopAsyncIteration
        return bytes(data)
