"""Brings a file into a store that others fill at the same time, and that keeps nobody from anything."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator

from kenaz_drivers.libvirt.streams.store import PIECE, Busy, Failed, Gone, Store

GAP = 4 << 20
"""Bytes of a hole that are worth a stream of their own to be left out."""

POLL = 1.0
"""Seconds between two looks whether somebody else is done with a file."""

STILL = 10
"""Looks in a row that find a file as it was, after which whoever brought it is taken for gone."""

_UNTOUCHED = 3
"""Looks in a row that find as it was a file whose upload failed. Fewer than STILL, so that nobody has begun
to take it over meanwhile."""

_TRIES = 3
"""Times that a file is begun anew when it goes while it is brought."""


def put(
    store: Store,
    file: int,
    name: str,
    told: Callable[[str], None],
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Sees to it that the volume of that name has the content of the file.

    The name says what the content is, so whoever writes there writes the same. The first piece that is not
    all zeros is written last: where it is there, all is; what an upload that broke off has left is none. One
    that goes on is waited for. libvirt keeps nobody from a volume that is being written, but the
    file's time tells: as long as it moves, somebody is at it. Raises Failed.
    """
    upload = _Upload(store, file, name, told, wait)
    for _ in range(_TRIES - 1):
        with contextlib.suppress(Gone):
            return upload.run()
    return upload.run()


class _Upload:
    """One file on its way; the words are those of `put`."""

    def __init__(
        self,
        store: Store,
        file: int,
        name: str,
        told: Callable[[str], None],
        wait: Callable[[float], None],
    ) -> None:
        self._store = store
        self._file = file
        self._name = name
        self._told = told
        self._wait = wait
        self._size = os.fstat(file).st_size
        self._first = _first(file, self._size)

    def run(self) -> None:
        """Raises Gone when the volume went meanwhile: another try makes it anew."""
        if self._store.create(self._name, self._size):
            try:
                self._bring()
            except Gone:
                raise
            except Failed:
                if self._untouched():
                    self._store.delete(self._name)
                raise
        elif not self._waited():
            self._bring()

    def _waited(self) -> bool:
        """Whether all is there, be it that somebody else has brought it; false when nobody is at it."""
        stamp, still = "", 0
        while still < STILL:
            try:
                if self._store.read(self._name, self._first, PIECE) == _piece(self._file, self._first):
                    return True
                before, stamp = stamp, self._store.stamp(self._name)
                still = still + 1 if stamp == before else 0
            except Busy:
                still = 0
            self._told(f"waiting {self._size}")
            self._wait(POLL)
        return False

    def _untouched(self) -> bool:
        """Whether nobody else writes there: another may have taken it over, and must not lose it."""
        try:
            stamp = self._store.stamp(self._name)
            for _ in range(_UNTOUCHED):
                self._wait(POLL)
                if self._store.stamp(self._name) != stamp:
                    return False
        except Failed:
            return False
        return True

    def _bring(self) -> None:
        first, last = self._first, min(self._first + PIECE, self._size)
        rest = [(max(start, last), end) for start, end in extents(self._file, self._size) if end > last]
        self._whole = last - first + sum(end - start for start, end in rest)
        self._done = 0
        for start, end in rest:
            self._write(start, end)
        if rest and not self._has(max(rest[-1][0], rest[-1][1] - PIECE)):
            raise Gone(f"the volume {self._name} was made anew while it was written")
        self._write(first, last)

    def _has(self, at: int) -> bool:
        """Whether what was written there is there: not, where somebody has deleted the volume meanwhile and
        another one of that name is being filled, which the first piece would then call whole."""
        while True:
            try:
                return self._store.read(self._name, at, PIECE) == _piece(self._file, at)
            except Busy:
                self._wait(POLL / 10)

    def _write(self, start: int, end: int) -> None:
        while True:
            try:
                return self._store.write(self._name, start, end - start, self._pieces(start, end))
            except Busy:
                self._wait(POLL / 10)

    def _pieces(self, start: int, end: int) -> Iterator[bytes]:
        for at in range(start, end, PIECE):
            data = _piece(self._file, at, min(PIECE, end - at))
            yield data
            self._done += len(data)
            self._told(f"{self._done} {self._whole}")


def _first(file: int, size: int) -> int:
    """Where the first piece begins that is not all zeros; of a file without one, the first of all."""
    for start, end in extents(file, size):
        for at in range(start - start % PIECE, end, PIECE):
            if any(_piece(file, at)):
                return at
    return 0


def _piece(file: int, at: int, length: int = PIECE) -> bytes:
    os.lseek(file, at, os.SEEK_SET)
    data = b""
    while len(data) < length and (more := os.read(file, length - len(data))):
        data += more
    return data


def extents(file: int, size: int) -> Iterator[tuple[int, int]]:
    """Where the file holds data, with holes that are not worth being left out; all of it where the platform
    does not tell."""
    if sys.platform == "win32" or not hasattr(os, "SEEK_DATA"):
        yield 0, size
    else:
        begun, reached = -1, 0
        while reached < size:
            try:
                start = os.lseek(file, reached, os.SEEK_DATA)
            except OSError as exc:
                if exc.errno == errno.ENXIO:  # holes up to the end
                    break
                yield 0, size  # a file system that does not tell
                return
            end = os.lseek(file, start, os.SEEK_HOLE)
            if begun >= 0 and start - reached > GAP:
                yield begun, reached
                begun = -1
            begun, reached = (start if begun < 0 else begun), end
        if begun >= 0:
            yield begun, reached
