"""Where a session lives on disk, and what follows from what is found there.

    <state>/sessions/<id>/   0700
        lock            held by the launcher while the session lives; gone at the end
        journal.jsonl   what happened; stays
        console.log     what the guest printed, bounded; stays
        control.sock    here, or in the runtime directory when the path would be too long for a socket
        ...             disks and sockets of the session; gone at the end

Whether a session lives is never stored: it follows from the lock.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from kenaz_drivers.host import is_alive as process_is_alive
from kenaz_engine.channel.transports.local import LONGEST_PATH
from kenaz_engine.journal.reader import Recording, read_journal
from kenaz_engine.session.locks import Lock, is_locked, try_lock
from kenaz_engine.shortage import what_to_do

SOCKETS = ("control.sock", "channel.sock", "vhost", "vsock", "vsock_65535")
"""Names of the sockets that a session may have; the number is a port."""

JOURNAL = "journal.jsonl"
CONSOLE = "console.log"
LOCK = "lock"

ELSEWHERE = "set KENAZ_STATE_DIR to another directory"
"""The mend for a state directory that cannot be used."""

_OTHERS_BOUND = 5.0
_TAIL = 1 << 16


class DirectoryError(Exception):
    """The session's directory cannot be had. `hint` is what the user can do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def state_home() -> Path:
    """`$KENAZ_STATE_DIR`, else the platform's place for state (`$XDG_STATE_HOME/kenaz` on Linux)."""
    if override := os.environ.get("KENAZ_STATE_DIR"):
        return Path(override).absolute()
    from platformdirs import user_state_path

    return user_state_path("kenaz", appauthor=False)


def sessions_home() -> Path:
    """Where the directories of sessions are."""
    return state_home() / "sessions"


def runtime_home() -> Path:
    """A short directory of the user's own for sockets: `$XDG_RUNTIME_DIR/kenaz`, else one below the
    directory for temporary files."""
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(base) / "kenaz"
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    return Path(tempfile.gettempdir()) / f"kenaz-{user}"


def fits_socket(path: Path) -> bool:
    """True when a socket can have that path."""
    return len(os.fsencode(path)) <= LONGEST_PATH


def socket_directory(directory: Path) -> Path:
    """Where the sockets of the session in `directory` are.

    Raises DirectoryError when no place is short enough.
    """
    # Sessions of other state directories may have the same id, hence the digest of the whole path.
    digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    # No longer than what macOS's own place for temporary files, of 48 bytes, leaves of a socket's 103.
    candidates = [directory, runtime_home() / f"{directory.name[:7]}-{digest}"]
    for candidate in candidates:
        if all(fits_socket(candidate / name) for name in SOCKETS):
            return candidate
    longest = candidates[-1] / max(SOCKETS, key=len)
    raise DirectoryError(
        f"a socket's path would be too long: {longest} has {len(os.fsencode(longest))} bytes, "
        f"{LONGEST_PATH} are possible",
        "set XDG_RUNTIME_DIR to a shorter directory",
    )


def make_socket_directory(path: Path) -> None:
    """Makes the directory that `socket_directory` chose outside of the session's own; the caller holds the
    session's lock, so what lies there was left by a dead one. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.parent.lstat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022):
        raise PermissionError(errno.EPERM, f"{path.parent} is not yours alone to write to")
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(mode=0o700)


@dataclass(frozen=True, slots=True)
class SessionDirectory:
    """The directory of a living session, ours by its lock."""

    id: str
    path: Path
    lock: Lock

    @property
    def journal(self) -> Path:
        """The journal's file."""
        return self.path / JOURNAL

    @property
    def console(self) -> Path:
        """The file of what the guest printed."""
        return self.path / CONSOLE

    def discard(self) -> None:
        """Removes the directory of a session that could not begin, unless it still holds a socket."""
        if sys.platform == "win32":
            self.close()  # what is open cannot be removed there
        if not any((self.path / name).exists() for name in SOCKETS):
            shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Gives the lock back. The journal and the console stay."""
        self.lock.close(remove=True)


async def create_directory(session: str) -> SessionDirectory:
    """Makes the directory of a new session and locks it.

    A finished session of the same id is set aside as `<id>~<n>`, with its journal. Raises DirectoryError when
    a living session has the id, or a dead one that still holds something, or when the directory cannot be
    made.
    """
    home = sessions_home()
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = home / session
        if is_alive(path):
            await _while_reaped(path)
        async with creating(home):
            if path.exists():
                _require_free(path)
                path.rename(_aside(path))
            path.mkdir(mode=0o700)
            # Whoever looks whether it is held, holds it for that moment.
            try:
                lock = await _wait_lock(path / LOCK)
            except BaseException:
                (path / LOCK).unlink(missing_ok=True)
                path.rmdir()
                raise
    except OSError as exc:
        raise DirectoryError(
            f"the state directory {home / session} cannot be made: {exc.strerror or exc}",
            what_to_do(exc, ELSEWHERE),
        ) from exc
    return SessionDirectory(session, path, lock)


def _require_free(path: Path) -> None:
    """What a dead session holds is known by its path, so it has to be given back before it is set aside."""
    if is_alive(path):
        raise DirectoryError(
            f"a living session has the id {path.name!r}",
            f"end it by `kenaz-launcher end {path.name}`, or choose another --session-id",
        )
    if not finished(path):
        raise DirectoryError(
            f"a dead session has the id {path.name!r}, and is not reaped",
            f"`kenaz-launcher reap {path.name}` says why; or choose another --session-id",
        )


async def _while_reaped(path: Path) -> None:
    """Waits, within bounds, while the lock is held by somebody who is not the session's launcher."""
    deadline = trio.current_time() + _OTHERS_BOUND
    while is_alive(path) and trio.current_time() < deadline:
        holder = holder_of(path)
        if see(path).status == "running" and (holder is None or process_is_alive(holder)):
            return
        await trio.sleep(0.02)


@asynccontextmanager
async def creating(home: Path) -> AsyncIterator[None]:
    """Holds off everybody who makes, sets aside or removes directories of sessions. Raises DirectoryError
    after some seconds, and OSError."""
    lock = await _wait_lock(home / ".creating")
    try:
        yield
    finally:
        lock.close()


async def _wait_lock(path: Path) -> Lock:
    deadline = trio.current_time() + _OTHERS_BOUND
    for pause in itertools.repeat(0.01):
        if (lock := try_lock(path)) is not None:
            return lock
        if trio.current_time() > deadline:
            break
        await trio.sleep(pause)
    raise DirectoryError(f"another launcher holds {path} for more than {_OTHERS_BOUND:g} s")


def _aside(path: Path) -> Path:
    number = 1
    while (other := path.with_name(f"{path.name}~{number}")).exists():
        number += 1
    return other


def is_alive(path: Path) -> bool:
    """True while a launcher, or a reaper, holds the lock of that session directory."""
    return is_locked(path / "lock")


def finished(path: Path) -> bool:
    """True when the session has ended and holds nothing. Cheap: looks at the journal's last line only."""
    if (path / LOCK).exists():
        return False
    try:
        with (path / JOURNAL).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            last = file.read().rsplit(b"\n", 2)[-2:]
        record = json.loads(last[0]) if last[-1] == b"" else None
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("kind") == "end" and not record.get("left")


def holder_of(path: Path) -> Mapping[str, Any] | None:
    """The process that holds the lock of that session, by its journal: who reaps it, else its launcher. None
    before the first record."""
    try:
        recording = read_journal(path / JOURNAL)
    except (OSError, ValueError):
        return None
    kind = "reap" if recording.being_reaped else "header"
    process = next((r.get("process") for r in reversed(recording.records) if r["kind"] == kind), None)
    return process if isinstance(process, dict) else None


@dataclass(frozen=True, slots=True)
class Seen:
    """A session as it is found on disk; `status` is one of

    `running`: its launcher holds the lock. `reaping`: another process holds it, to give back what it left.
    `ended`: it gave back all it held. `dead`: its launcher is gone, and it may have left something.
    `damaged`: so, and its journal cannot be read.
    """

    id: str
    path: Path
    status: str
    recording: Recording | None

    @property
    def state(self) -> str:
        """The lifecycle's state, from the journal's last decision."""
        return self.recording.state if self.recording else ""


def see(path: Path) -> Seen:
    """What a session directory shows. A damaged journal is shown as none."""
    alive = is_alive(path)
    recording, damaged = None, False
    try:
        recording = read_journal(path / JOURNAL)
    except FileNotFoundError:
        pass
    except (OSError, ValueError):
        damaged = True
    return Seen(path.name, path, _status(alive, recording, damaged), recording)


def _status(alive: bool, recording: Recording | None, damaged: bool) -> str:
    if alive:
        return "reaping" if recording is not None and recording.being_reaped else "running"
    if damaged:
        return "damaged"
    end = recording.end if recording is not None and not recording.being_reaped else None
    return "dead" if end is None or end.get("left") else "ended"


def session_directories() -> list[Path]:
    """The directories of all sessions of this user, by id."""
    home = sessions_home()
    return sorted(path for path in home.iterdir() if path.is_dir()) if home.is_dir() else []


def all_sessions() -> Iterator[Seen]:
    """Every session of this user, by id."""
    return map(see, session_directories())
