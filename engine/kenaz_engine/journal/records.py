"""What a journal is made of: one JSON object a line, each bound to the line before it.

Every record has `seq` (from 0, without a gap), `t` (monotonic seconds since the header), `wall` (UTC),
`kind`, and `prev` (SHA-256 of the previous line without its newline, in hex; of nothing for the header). The
other members are the kind's own; docs/reference/journal.md lists them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from jiter import from_json

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
        try:
            record = _json(line)
        except (ValueError, RecursionError):
            raise Damaged(self._seq + 1, "is not JSON") from None
        if not (
            isinstance(record, dict)
            and record.get("seq") == self._seq
            and record.get("prev") == self._prev
            and isinstance(kind := record.get("kind"), str)
            and kind in KINDS
            and (self._seq or (kind == "header" and record.get("format") == FORMAT))
        ):
            raise Damaged(self._seq + 1, self._fault(record))
        self._seq += 1
        self._prev = hashlib.sha256(line).hexdigest()
        return record

    def _fault(self, record: Any) -> str:
        if not isinstance(record, dict):
            return "is not a record"
        seq, kind = record.get("seq"), record.get("kind")
        if self._seq == 0 and kind != "header":
            return f"is no header: its kind is {kind!r}"
        if self._seq == 0 and record.get("format") != FORMAT:
            return f"is of format {record.get('format')!r}; this version reads {FORMAT}"
        if seq != self._seq:
            return f"record {self._seq} is expected here, found {seq!r}: missing or moved"
        if record.get("prev") != self._prev:
            return "does not follow from the line before it: one of the two was changed"
        return f"has the unknown kind {kind!r}"


def _json(line: bytes) -> Any:
    """What a line holds. Raises ValueError or RecursionError."""
    # jiter takes all that Python's decoder takes but half of a surrogate pair, and blanks around it besides.
    if line[:1] == b"{" and line[-1:] == b"}" and line.isascii():
        with suppress(ValueError):
            return from_json(line)
    text = line.decode("ascii")
    value, end = _decode(text)
    if end != len(text):
        raise ValueError(line)
    return value


def decode_all(data: bytes) -> tuple[list[dict[str, Any]], bool]:
    """All records of a journal, and whether a torn last line was dropped.

    A line without its newline is what a crash in the middle of a write leaves: it is dropped. Anything else
    that is wrong raises Damaged with the line.
    """
    *lines, rest = data.split(b"\n")
    decoder = Decoder()
    return [decoder.decode(line) for line in lines], bool(rest)
