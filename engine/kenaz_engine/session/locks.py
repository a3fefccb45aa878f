"""Kernel locks on files: a crash leaves none behind."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from kenaz_engine.openflags import PLAIN

if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: int, *, shared: bool = False) -> bool:
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(file: int, *, shared: bool = False) -> bool:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as exc:
            raise OSError(exc.errno, f"locks (flock) do not work there: {exc.strerror}") from exc
        return True


class Lock:
    """An exclusive lock, held from `try_lock` until `close` or the end of the process."""

    def __init__(self, path: Path, file: int) -> None:
        self.path = path
        self._file = file

    def close(self, *, remove: bool = False) -> None:
        """Gives the lock back; with `remove`, its file goes first, while the lock is held. Idempotent.

        A file that cannot go says nothing wrong: `reap` finds nobody who holds it.
        """
        if self._file < 0:
            return
        if remove and sys.platform != "win32":
            with suppress(OSError):
                self.path.unlink()
        os.close(self._file)
        self._file = -1
        if remove and sys.platform == "win32":
            # There an open file cannot go; so one that somebody else has locked since stays.
            with suppress(OSError):
                self.path.unlink()


def try_lock(path: Path, *, create: bool = True) -> Lock | None:
    """The lock on the file at `path`, or None when another process holds it.

    Raises FileNotFoundError without `create` when there is no such file, OSError where locks do not work.
    """
    flags = os.O_RDWR | PLAIN | (os.O_CREAT if create else 0)
    file = os.open(path, flags, 0o600)
    try:
        # Who held it may have removed the file since: then this lock is on nothing that others see.
        if _try_lock(file) and _is_at(file, path):
            return Lock(path, file)
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    return None


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on the file at `path`. Those who look do not hinder each other, and
    whoever takes the lock just then has to try again. Raises OSError where locks do not work."""
    try:
        file = os.open(path, os.O_RDWR | PLAIN)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(file, shared=True)
    finally:
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
