"""Kernel locks on files of the store: exclusive ones for who changes, shared ones for who uses.

A crash leaves none behind. Nothing here blocks: who has to wait asks again, so that no event loop ever waits
for itself, and a wait can be cancelled. Windows has no shared locks, and needs none: an open file cannot be
removed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import trio

from kenaz_engine.openflags import PLAIN

POLL = 0.05
"""Seconds between two looks at a lock that somebody else holds."""

if sys.platform == "win32":

    def _try(file: int, *, shared: bool) -> bool:
        import msvcrt

        try:
            if not shared:
                msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try(file: int, *, shared: bool) -> bool:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class FileLock:
    """A lock that is held until `close`, or the end of the process."""

    def __init__(self, path: Path, file: int) -> None:
        self.path = path
        self.file = file

    def close(self, *, remove: bool = False) -> None:
        """Gives it back; with `remove`, the file goes first, while it is locked. Idempotent."""
        if self.file < 0:
            return
        if remove and sys.platform != "win32":
            self.path.unlink(missing_ok=True)
        os.close(self.file)
        self.file = -1
        if remove and sys.platform == "win32":
            # There an open file cannot go; so one that somebody else has locked since stays.
            with suppress(PermissionError):
                self.path.unlink(missing_ok=True)


def try_lock(path: Path, *, shared: bool = False, create: bool = False) -> FileLock | None:
    """The lock on the file at `path`; None when somebody else's stands against it.

    Never one on a file that has lost its name meanwhile. Raises FileNotFoundError without `create`, and
    OSError.
    """
    flags = os.O_RDONLY | PLAIN | (os.O_CREAT if create else 0)
    while True:
        # Read only: a lock file that another user of a shared store has made cannot be opened for more.
        file = os.open(path, flags, 0o666)
        try:
            if not _try(file, shared=shared):
                os.close(file)
                return None
            if _is_named(path, file):
                return FileLock(path, file)
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _is_named(path: Path, file: int) -> bool:
    ours = os.fstat(file)
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino)


async def wait_lock(
    path: Path, *, shared: bool = False, create: bool = False, waiting: Callable[[], object] | None = None
) -> FileLock:
    """The lock, once it can be had; `waiting` is called before each further look. Raises as `try_lock`."""
    while (lock := try_lock(path, shared=shared, create=create)) is None:
        if waiting is not None:
            waiting()
        await trio.sleep(POLL)
    return lock


class Held:
    """Files in use: nobody removes them until `close`."""

    def __init__(self) -> None:
        self._locks: list[FileLock] = []

    async def add(self, path: Path) -> None:
        """Takes one more into use. Raises FileNotFoundError when it is not there any more."""
        self._locks.append(await wait_lock(path, shared=True))

    def take(self, lock: FileLock) -> None:
        """Takes over a shared lock."""
        self._locks.append(lock)

    def close(self) -> None:
        """Gives all back. Idempotent."""
        while self._locks:
            self._locks.pop().close()


async def hold(paths: Iterable[Path]) -> Held:
    """Takes files into use. Raises FileNotFoundError, with none held, when one is not there."""
    held = Held()
    try:
        for path in paths:
            await held.add(path)
    except BaseException:
        held.close()
        raise
    return held


def in_use(path: Path) -> bool:
    """True while somebody holds the file."""
    try:
        lock = try_lock(path)
    except OSError:
        return False
    if lock is None:
        return True
    lock.close()
    return False
