"""What a journal is made of: one JSON object a line, each bound to the line before it.

Every record has `seq` (from 0, without a gap), `t` (monotonic seconds since the header), `wall` (UTC),
`kind`, and `prev` (SHA-256 of the previous line without its newline, in hex; of nothing for the header). The
other members are the kind's own; docs/reference/journal.md lists them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

FORMAT = 1
"""Version of the format, in the header. A reader refuses any other."""

KINDS = frozenset(
    {
        "header",
        "event",
        "decision",
        "entered",
        "backoff",
        "activity",
        "intent",
        "acquired",
        "released",
        "channel",
        "note",
        "end",
        "reap",
    }
)

DURABLE = frozenset({"header", "intent", "acquired", "released", "end", "reap"})
"""Kinds that are on the disk before the launcher goes on: another process may have to act on them."""

GENESIS = hashlib.sha256(b"").hexdigest()
"""`prev` of the header."""

_decode = json.JSONDecoder().raw_decode
_encode = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode


def encode(record: Mapping[str, Any], prev: str) -> tuple[bytes, str]:
    """The line (with its newline) and the hash that the next record carries as `prev`.

    Raises ValueError or TypeError for a value that is not plain JSON.
    """
    line = _encode({**record, "prev": prev}).encode("ascii")
    return line + b"\n", hashlib.sha256(line).hexdigest()


class Damaged(ValueError):
    """A journal that was changed after it was written, or that this version cannot read."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(f"line {line}: {message}")
        self.line = line
        self.message = message


class Decoder:
    """Reads lines in order, and refuses what does not follow from the line before."""

    def __init__(self) -> None:
        self._seq = 0
        self._prev = GENESIS

    def decode(self, line: bytes) -> dict[str, Any]:
        """The record of one line (without its newline). Raises Damaged."""
        number = self._seq + 1
        try:
            text = line.decode("ascii")
            record, end = _decode(text)
        except (ValueError, RecursionError):
            raise Damaged(number, "is not JSON") from None
        if end != len(text):
            raise Damaged(number, "is not JSON")
        if not isinstance(record, dict):
            raise Damaged(number, "is not a record")
        kind = record.get("kind")
        if number == 1 and kind != "header":
            raise Damaged(number, f"is no header: its kind is {kind!r}")
        if number == 1 and record.get("format") != FORMAT:
            raise Damaged(number, f"is of format {record.get('format')!r}; this version reads {FORMAT}")
        if record.get("seq") != self._seq:
            raise Damaged(
                number, f"record {self._seq} is expected here, found {record.get('seq')!r}: missing or moved"
            )
        if record.get("prev") != self._prev:
            raise Damaged(number, "does not follow from the line before it: one of the two was changed")
        if not isinstance(kind, str) or kind not in KINDS:
            raise Damaged(number, f"has the unknown kind {kind!r}")
        self._seq += 1
        self._prev = hashlib.sha256(line).hexdigest()
        return record


def decode_all(data: bytes) -> tuple[list[dict[str, Any]], bool]:
    """All records of a journal, and whether a torn last line was dropped.

    A line without its newline is what a crash in the middle of a write leaves: it is dropped. Anything else
    that is wrong raises Damaged with the line.
    """
    *lines, rest = data.split(b"\n")
    decoder = Decoder()
    return [decoder.decode(line) for line in lines], bool(rest)
