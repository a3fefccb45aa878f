"""Writes a journal to a file, one record at a time, durable where another process may depend on it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from kenaz_engine.journal.records import DURABLE, GENESIS, decode_all, encode
from kenaz_engine.openflags import PLAIN

KILL = "KENAZ_TEST_KILL"
"""The environment variable by which a test has the process killed at a record; see `mortal`."""

Clock = Callable[[], float]


class Sink(Protocol):
    """Where records go. A file for real sessions, a list for simulated ones."""

    def append(self, kind: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Writes one record and returns it. Raises OSError when it could not be written whole."""
        ...


class Journal:
    """A journal file, 0600, made anew, or gone on with by `resume`. Close it; the file stays."""

    def __init__(self, path: Path, *, monotonic: Clock = time.monotonic, wall: Clock = time.time) -> None:
        """Raises FileExistsError when there is one already, OSError when it cannot be made."""
        self._open(path, os.O_CREAT | os.O_EXCL, monotonic, wall)

    @classmethod
    def resume(
        cls, path: Path, *, monotonic: Clock = time.monotonic, wall: Clock = time.time
    ) -> tuple[Self, list[dict[str, Any]]]:
        """Goes on with the journal of a launcher that is gone; also returns the records that are in it.

        A torn last line is cut off. `t` goes on by the wall clock, never back: the monotonic clock of another
        boot says nothing. Raises Damaged, with nothing changed, and OSError.
        """
        data = path.read_bytes()
        records, _ = decode_all(data)
        whole = data[: data.rfind(b"\n") + 1]
        journal = cls.__new__(cls)
        journal._open(path, 0, monotonic, wall)
        try:
            if len(whole) < len(data):
                os.ftruncate(journal._file, len(whole))
                os.fsync(journal._file)
        except BaseException:
            journal.close()
            raise
        if records:
            last = records[-1]
            journal._seq = len(records)
            journal._prev = hashlib.sha256(whole[:-1].rpartition(b"\n")[2]).hexdigest()
            journal._start -= last["t"] + max(0.0, wall() - last["wall"])
        return journal, records

    def _open(self, path: Path, flags: int, monotonic: Clock, wall: Clock) -> None:
        flags |= os.O_WRONLY | os.O_APPEND | PLAIN
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
        self._write(line)
        if kind in DURABLE:
            os.fsync(self._file)
        return record

    def _write(self, line: bytes) -> None:
        """A short write (a full disk) is finished or raises; the torn line is the reader's to drop."""
        while line:
            line = line[os.write(self._file, line) :]

    def close(self) -> None:
        """Closes the file. Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
