"""Writes a journal to a file, one record at a time, durable where another process may depend on it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from kenaz_engine.journal.records import DURABLE, GENESIS, encode

Clock = Callable[[], float]


class Sink(Protocol):
    """Where records go. A file for real sessions, a list for simulated ones."""

    def append(self, kind: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Writes one record and returns it. Raises OSError when it could not be written whole."""
        ...


class Journal:
    """A journal file, 0600, made anew. Close it; the file stays."""

    def __init__(self, path: Path, *, monotonic: Clock = time.monotonic, wall: Clock = time.time) -> None:
        """Raises FileExistsError when there is one already, OSError when it cannot be made."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | getattr(os, "O_CLOEXEC", 0)
        self.path = path
        self._file = os.open(path, flags, 0o600)
        self._monotonic = monotonic
        self._wall = wall
        self._start = monotonic()
        self._seq = 0
        self._prev = GENESIS

    def append(self, kind: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Writes one record and returns it; durable kinds are on the disk when this returns."""
        record = {
            "seq": self._seq,
            "t": round(self._monotonic() - self._start, 6),
            "wall": round(self._wall(), 3),
            "kind": kind,
            **fields,
        }
        line, self._prev = encode(record, self._prev)
        self._seq += 1
        _write_all(self._file, line)
        if kind in DURABLE:
            os.fsync(self._file)
        return record

    def close(self) -> None:
        """Closes the file. Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _write_all(file: int, data: bytes) -> None:
    """A short write (a full disk) is finished or raises; the torn line is the reader's to drop."""
    while data:
        data = data[os.write(file, data) :]
