"""What the guest prints: kept within bounds, and watched for the lines that mean that it cannot go on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from kenaz_engine.openflags import PLAIN

HEAD_BYTES = 1 << 20
"""Bytes of the beginning that are kept in the file."""

TAIL_BYTES = 64 << 10
"""Bytes of the end that are kept when there was more."""

LINE_BYTES = 4096
"""A longer line is looked at in pieces of this size."""

_ANSI = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|[@-Z\\-_])|[\x00-\x08\x0b-\x1f\x7f]")


class Console:
    """Takes the guest's console as it comes. Memory and file are bounded whatever the guest prints.

    `patterns` are pairs of a name and a regular expression; `on_match(name, line)` is called for the first
    line that matches each name: once the line has ended, for what comes next may belong to it. A prompt
    such as `grub>` ends no line, so whoever feeds calls `pause` when nothing has come for a while.
    """

    def __init__(
        self, path: Path, patterns: Sequence[tuple[str, str]], on_match: Callable[[str, str], None]
    ) -> None:
        """Raises OSError when the file cannot be made, re.error for a bad pattern."""
        self._patterns = [(name, re.compile(pattern)) for name, pattern in patterns]
        self._on_match = on_match
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | PLAIN, 0o600)
        self._written = 0
        self._dropped = 0
        self._tail = bytearray()
        self._line = bytearray()

    def feed(self, data: bytes) -> None:
        """Takes what the guest has just printed."""
        room = max(0, HEAD_BYTES - self._written)
        self._write(data[:room])
        self._written += min(room, len(data))
        self._dropped += max(0, len(data) - room)
        self._tail += data
        if len(self._tail) > 2 * TAIL_BYTES:
            del self._tail[:-TAIL_BYTES]
        if self._patterns:
            self._watch(data)

    @property
    def unfinished(self) -> bool:
        """True while a line has begun that has not been looked at."""
        return bool(self._line)

    def pause(self) -> None:
        """Takes what stands in the unfinished line for the whole of it. Idempotent."""
        rest, self._line = bytes(self._line), bytearray()
        self._match(rest)

    def tail(self, count: int) -> list[str]:
        """The last `count` lines that are not empty, without control characters."""
        lines = [printable(line) for line in bytes(self._tail[-TAIL_BYTES:]).split(b"\n")]
        return [line for line in lines if line][-count:]

    def close(self) -> None:
        """Writes the end of what did not fit, and closes the file. Idempotent."""
        if self._file < 0:
            return
        if self._dropped:
            tail = bytes(self._tail[-min(TAIL_BYTES, self._dropped) :])
            self._write(b"\n[... %d bytes dropped ...]\n" % (self._dropped - len(tail)) + tail)
        os.close(self._file)
        self._file = -1

    def _write(self, data: bytes) -> None:
        """A full disk must not end the session for the sake of its console."""
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError:
            return

    def _watch(self, data: bytes) -> None:
        self._line += data
        *lines, self._line = self._line.split(b"\n")
        for raw in lines:
            self._match(bytes(raw))
        if len(self._line) > LINE_BYTES:
            self.pause()

    def _match(self, raw: bytes) -> None:
        for start in range(0, len(raw), LINE_BYTES):
            self._match_piece(printable(raw[start : start + LINE_BYTES]))

    def _match_piece(self, line: str) -> None:
        for name, pattern in list(self._patterns):
            if pattern.search(line):
                self._patterns = [p for p in self._patterns if p[0] != name]
                self._on_match(name, line)


def printable(line: bytes) -> str:
    """A line of the console as text that is safe to show on a terminal."""
    text = _ANSI.sub("", line.decode("utf-8", "replace")).expandtabs().strip()
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
