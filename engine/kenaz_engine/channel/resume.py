"""What lets a stream be lost and no message with it, without IO: rules Z1 to Z8 of
docs/reference/vsock-protocol.md.

Both sides number their messages without writing numbers: the first one after the handshake is 1, on whichever
stream it travels. Each keeps what it has put until the other has acknowledged it, so that it can be said
again on the next stream from where the other has got to.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from kenaz_engine.channel import strict_json
from kenaz_engine.channel.framing import FramingError

SMALL = 128
"""Bytes of the longest `ack`. What is longer is none, so that bulk is not looked into twice."""

_WORD = b'"ack"'


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of a conversation: its number, how many messages of the peer were taken, and which of ours
    can be said again: those after the `lowest`th, up to the `highest`th."""

    conversation: int
    received: int
    lowest: int
    highest: int


class NotKept(ValueError):
    """The peer asks for messages that are no longer kept, or were never put."""


class Outbox:
    """Payloads that wait to be written, and those that were and may have to be again.

    Those put before `keep` are not numbered. `trial` says that nobody knows yet whether the peer
    acknowledges: then nothing is kept beyond `bound` bytes, and `keeping` becomes False there.
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.waiting_bytes = 0
        self.kept_bytes = 0
        self.keeping = False
        self._trial = False
        self._plain = 0  # how many of those that wait are not numbered
        self._waiting: deque[bytes] = deque()
        self._kept: deque[bytes] = deque()
        self._acknowledged = 0

    def __len__(self) -> int:
        """How many wait to be written."""
        return len(self._waiting)

    @property
    def lowest(self) -> int:
        """The number of the last message that is no longer kept."""
        return self._acknowledged

    @property
    def highest(self) -> int:
        """The number of the last message that was put."""
        return self._acknowledged + len(self._kept) + len(self._waiting) - self._plain

    def keep(self, *, trial: bool = False) -> None:
        """Numbers what is put from now on."""
        self.keeping, self._trial, self._plain = True, trial, len(self._waiting)

    def put(self, payload: bytes) -> None:
        """Adds a payload at the end."""
        self._waiting.append(payload)
        self.waiting_bytes += len(payload)

    def head(self) -> bytes:
        """The next to be written, which stays. Raises IndexError when there is none."""
        return self._waiting[0]

    def drop(self) -> bytes:
        """Takes the next to be written. Raises IndexError when there is none."""
        payload = self._waiting.popleft()
        self.waiting_bytes -= len(payload)
        if self._plain:
            self._plain -= 1
        elif self.keeping:
            self._kept.append(payload)
            self.kept_bytes += len(payload)
            if self._trial and self.kept_bytes > self.bound:
                self.stop()
        return payload

    def take(self, size: int, count: int) -> list[bytes]:
        """As `drop`, as many as have no more than `size` bytes together, but one at least, and `count` at
        most; none where none waits."""
        waiting, taken = self._waiting, list[bytes]()
        while waiting and len(taken) < count:
            size -= len(waiting[0])
            if size < 0 and taken:
                break
            taken.append(self.drop())
        return taken

    def stop(self) -> None:
        """Keeps nothing: the peer does not acknowledge."""
        self.keeping = False
        self._forget(len(self._kept))

    def confirm(self) -> bool:
        """The peer acknowledges: what is kept is no longer a trial. False where that comes too late."""
        self._trial = False
        return self.keeping

    def acknowledge(self, number: int) -> None:
        """The peer has taken the messages up to that one. Raises NotKept."""
        if not self._acknowledged <= number <= self._acknowledged + len(self._kept):
            raise NotKept("an ack of what was not sent, or has been acknowledged")
        self._forget(number - self._acknowledged)

    def rewind(self, number: int) -> None:
        """The peer has taken those up to that one, and what follows is lost: it waits again. Raises
        NotKept."""
        if not self._acknowledged <= number <= self.highest:
            raise NotKept("what follows is not kept")
        while self._kept and self._acknowledged + len(self._kept) > number:
            payload = self._kept.pop()
            self.kept_bytes -= len(payload)
            self._waiting.appendleft(payload)
            self.waiting_bytes += len(payload)
        self._forget(len(self._kept))

    def clear(self) -> None:
        """Drops what waits."""
        self._waiting.clear()
        self.waiting_bytes = self._plain = 0

    def _forget(self, count: int) -> None:
        for _ in range(count):
            self.kept_bytes -= len(self._kept.popleft())
        self._acknowledged += count


class Inbox:
    """Counts what was taken of the peer, and says when to acknowledge it: every quarter of its window."""

    def __init__(self, window: int) -> None:
        self.received = 0
        self._quarter = max(1, window // 4)
        self._bytes = 0

    def took(self, size: int) -> bool:
        """A message of that size was taken for good. True when an ack is due."""
        self.received += 1
        self._bytes += size
        if self._bytes < self._quarter:
            return False
        self._bytes = 0
        return True


def ack(received: int) -> bytes:
    """The message that acknowledges the first so many."""
    return b'{"kind":"ack","received":%d}' % received


def read_ack(payload: bytes) -> int | None:
    """The number that an `ack` gives; None where the payload is none. Raises FramingError."""
    if len(payload) > SMALL or _WORD not in payload:
        return None
    try:
        message = strict_json.loads(payload)
    except strict_json.JsonRefused:
        return None  # whoever looks at it says what is wrong
    if message.get("kind") != "ack":
        return None
    received = message.get("received")
    if type(received) is not int:
        raise FramingError("bad_ack", "ack: `received` must be an integer")
    return received
