"""Kernel locks on files: a crash leaves none behind."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: int) -> bool:
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(file: int) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class Lock:
    """An exclusive lock, held from `try_lock` until `close` or the end of the process."""

    def __init__(self, path: Path, file: int) -> None:
        self.path = path
        self._file = file

    def close(self, *, remove: bool = False) -> None:
        """Gives the lock back; with `remove`, its file goes first, while the lock is held. Idempotent."""
        if self._file < 0:
            return
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = -1


def try_lock(path: Path, *, create: bool = True) -> Lock | None:
    """The lock on the file at `path`, or None when another process holds it.

    Raises FileNotFoundError without `create` when there is no such file, OSError where locks do not work.
    """
    flags = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | (os.O_CREAT if create else 0)
    file = os.open(path, flags, 0o600)
    try:
        if _try_lock(file):
            return Lock(path, file)
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    return None
