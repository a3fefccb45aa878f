"""Cuts a byte stream into frames, without IO. Wire: docs/reference/vsock-protocol.md, rules F and L."""

from __future__ import annotations

import re
from typing import Protocol

DEFAULT_LIMIT = 4 * 1024 * 1024
"""Most bytes of one payload, unless the session's spec says otherwise."""

HEADER = 4

MARK = b"\xff" * 4
"""Says that a new writer has taken over the stream. In no valid stream do four such bytes stand together:
UTF-8 has none, and a length begins with another."""

_MARKS = re.compile(MARK + rb"+")


class FramingError(Exception):
    """The bytes are not frames. `code` is `frame_too_large`, `frame_empty` or `frame_cut`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Framing(Protocol):
    """One direction's decoder and the other's encoder."""

    @property
    def pending(self) -> int:
        """Bytes held back until their frame is complete."""
        ...

    @property
    def error(self) -> FramingError | None:
        """What is wrong after the frames that were returned so far. No frame follows it."""
        ...

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that `data` completes, in order."""
        ...

    def close(self) -> None:
        """The stream has ended. Raises FramingError when it did so within a frame or after an error."""
        ...

    def encode(self, payload: bytes) -> bytes:
        """The payload as a frame. Raises FramingError when it does not fit in one."""
        ...

    def pieces(self, payload: bytes) -> tuple[bytes, ...]:
        """As `encode`, in pieces, so that what is large need not be copied."""
        ...


class _Cutter:
    """What cuts a stream holds of it: what is not complete, or what was wrong."""

    _unit: str

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._error: FramingError | None = None

    @property
    def pending(self) -> int:
        """Bytes held back until their frame is complete."""
        return len(self._buffer)

    @property
    def error(self) -> FramingError | None:
        """What is wrong after the frames that were returned so far. No frame follows it."""
        return self._error

    def close(self) -> None:
        """The stream has ended. Raises FramingError when it did so within a frame or after an error."""
        if self._error is not None:
            raise self._error
        if self._buffer:
            raise FramingError("frame_cut", f"the stream ended {len(self._buffer)} bytes into a {self._unit}")


class LengthPrefixed(_Cutter):
    """4 bytes of length, big-endian and unsigned, then that many bytes; 1 to `limit` of them.

    Holds at most one frame that is not complete: `limit` and its header, beside what `feed` was given. A
    length that is not allowed is found as soon as its four bytes are there, before anything of its payload
    is kept.
    """

    _unit = "frame"

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        super().__init__(limit)
        self._wanted = HEADER  # bytes in the buffer with which something new is known

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that `data` completes, in order. After an error, bytes are dropped."""
        if self._error is not None:
            return []
        buffer, start = self._buffer, 0
        payloads: list[bytes] = []
        while buffer:  # completes what is held back, first its header; the rest is cut from `data` itself
            end = start + self._wanted - len(buffer)
            buffer += memoryview(data)[start:end]
            start = end
            if len(buffer) < self._wanted:
                return payloads
            if self._wanted == HEADER:
                length = int.from_bytes(buffer, "big")
                if not 0 < length <= self._limit:
                    return self._fail(payloads, length)
                self._wanted = HEADER + length
            else:
                payloads.append(bytes(memoryview(buffer)[HEADER:]))
                self._reset()
                break
        size = len(data)
        while size - start >= HEADER:
            body = start + HEADER
            length = int.from_bytes(data[start:body], "big")
            if not 0 < length <= self._limit:
                return self._fail(payloads, length)
            end = body + length
            if size < end:
                self._wanted = HEADER + length
                break
            payloads.append(data[body:end])
            start = end
        if start < size:
            self._buffer += memoryview(data)[start:]
        return payloads

    def _reset(self) -> None:
        self._buffer = bytearray()
        self._wanted = HEADER

    def _fail(self, payloads: list[bytes], length: int) -> list[bytes]:
        self._reset()
        self._error = self._refusal(length)
        return payloads

    def encode(self, payload: bytes) -> bytes:
        """The payload as a frame. Raises FramingError when it does not fit in one."""
        if not 0 < len(payload) <= self._limit:
            raise self._refusal(len(payload))
        return len(payload).to_bytes(HEADER, "big") + payload

    def pieces(self, payload: bytes) -> tuple[bytes, ...]:
        """As `encode`, in pieces, so that what is large need not be copied."""
        if not 0 < len(payload) <= self._limit:
            raise self._refusal(len(payload))
        return len(payload).to_bytes(HEADER, "big"), payload

    def _refusal(self, length: int) -> FramingError:
        if length == 0:
            return FramingError("frame_empty", "a frame of length 0")
        return FramingError("frame_too_large", f"a frame of {length} bytes; the limit is {self._limit}")


class Marked:
    """Length-prefixed frames on a stream that outlives its writers.

    A mark is read and written as the empty payload, which no frame has. Whatever of a frame stands before it
    is dropped, for the writer who began it is gone.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self._limit = limit
        self._frames = LengthPrefixed(limit)
        self._held = b""  # at the end of what came: it may be, or grow to be, a mark

    @property
    def pending(self) -> int:
        """Bytes held back until their frame is complete."""
        return self._frames.pending + len(self._held)

    @property
    def error(self) -> FramingError | None:
        """What is wrong after the frames that were returned so far; a mark makes up for it."""
        return self._frames.error

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that `data` completes, in order. After an error, bytes are dropped until a mark."""
        data = self._held + data
        whole = data.rstrip(MARK[:1])
        self._held = data[len(whole) : len(whole) + len(MARK)]
        *gone, last = _MARKS.split(whole) if MARK in whole else [whole]
        payloads: list[bytes] = []
        for rest in gone:
            payloads += self._frames.feed(rest)
            payloads.append(b"")
            self._frames = LengthPrefixed(self._limit)
        return payloads + self._frames.feed(last)

    def close(self) -> None:
        """The stream has ended. Raises FramingError when it did so within a frame or after an error."""
        self._frames.close()

    def encode(self, payload: bytes) -> bytes:
        """The payload as a frame, or the mark. Raises FramingError when it does not fit in one."""
        return self._frames.encode(payload) if payload else MARK

    def pieces(self, payload: bytes) -> tuple[bytes, ...]:
        """As `encode`, in pieces."""
        return self._frames.pieces(payload) if payload else (MARK,)


LINE_OUT = 64 * 1024
"""Most bytes of a line, its newline included, that today's guest takes: Go's bufio.Scanner ends without a
word at the first longer one."""


class Lines(_Cutter):
    """One payload a line. Lines that come may have `limit` bytes, those that go `limit_out`, each with its
    newline.

    Blank lines are skipped, and a carriage return before the newline is no part of the line. Holds at most
    one line that is not complete; each byte is looked at once, however small the pieces are.
    """

    _unit = "line"

    def __init__(self, limit: int = DEFAULT_LIMIT, limit_out: int = LINE_OUT) -> None:
        super().__init__(limit)
        self._limit_out = limit_out

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that `data` completes, in order. After an error, bytes are dropped."""
        payloads: list[bytes] = []
        start = 0
        while self._error is None:
            newline = data.find(b"\n", start)
            end = len(data) if newline < 0 else newline
            size = len(self._buffer) + end - start + 1
            if size > self._limit:
                self._buffer.clear()
                self._error = _line_refusal(self._limit)
            elif newline < 0:
                self._buffer += data[start:]
                break
            else:
                line = bytes(self._buffer) + data[start:end]
                self._buffer.clear()
                start = end + 1
                if line := line.removesuffix(b"\r"):
                    payloads.append(line)
        return payloads

    def encode(self, payload: bytes) -> bytes:
        """The payload as a line. Raises FramingError when it does not fit in one."""
        if not payload:
            raise FramingError("frame_empty", "a line without a message")
        if len(payload) >= self._limit_out:
            raise _line_refusal(self._limit_out)
        if b"\n" in payload:
            raise FramingError("frame_newline", "a message with a line break in it")
        return payload + b"\n"

    def pieces(self, payload: bytes) -> tuple[bytes, ...]:
        """As `encode`: a line is small."""
        return (self.encode(payload),)


def _line_refusal(limit: int) -> FramingError:
    return FramingError("frame_too_large", f"a line of more than {limit} bytes, its newline included")
