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
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import trio

from kenaz_engine.channel.transports.unix import SUN_PATH
from kenaz_engine.journal.reader import Recording, read_journal
from kenaz_engine.session.locks import Lock, try_lock

SOCKETS = ("control.sock", "channel.sock")
"""Names of the sockets that a session may have."""

_OTHERS_BOUND = 5.0


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


def runtime_home() -> Path:
    """A short directory of the user's own for sockets: `$XDG_RUNTIME_DIR/kenaz`, else one below the
    directory for temporary files."""
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(base) / "kenaz"
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    return Path(tempfile.gettempdir()) / f"kenaz-{user}"


def fits_socket(path: Path) -> bool:
    """True when a socket can have that path."""
    return len(os.fsencode(path)) < SUN_PATH


def socket_directory(directory: Path) -> Path:
    """Where the sockets of the session in `directory` are.

    Raises DirectoryError when no place is short enough.
    """
    # Sessions of other state directories may have the same id, hence the digest of the whole path.
    digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    candidates = [directory, runtime_home() / f"{directory.name[:16]}-{digest}"]
    for candidate in candidates:
        if all(fits_socket(candidate / name) for name in SOCKETS):
            return candidate
    longest = candidates[-1] / max(SOCKETS, key=len)
    raise DirectoryError(
        f"a socket's path would be too long: {longest} has {len(os.fsencode(longest))} bytes, "
        f"{SUN_PATH - 1} are possible",
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
        return self.path / "journal.jsonl"

    @property
    def console(self) -> Path:
        """The file of what the guest printed."""
        return self.path / "console.log"

    def discard(self) -> None:
        """Removes the directory of a session that could not begin, unless it still holds a socket."""
        if not any((self.path / name).exists() for name in SOCKETS):
            shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Gives the lock back. The journal and the console stay."""
        self.lock.close(remove=True)


async def create_directory(session: str) -> SessionDirectory:
    """Makes the directory of a new session and locks it.

    A finished or dead session of the same id is set aside as `<id>~<n>`, with its journal. Raises
    DirectoryError when a living session has the id, or when the directory cannot be made.
    """
    home = state_home() / "sessions"
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        creating = await _wait_lock(home / ".creating")
        try:
            path = home / session
            if path.exists():
                if is_alive(path):
                    raise DirectoryError(
                        f"a living session has the id {session!r}",
                        f"end it by `kenaz-launcher end {session}`, or choose another --session-id",
                    )
                path.rename(_aside(path))
            path.mkdir(mode=0o700)
            # Whoever looks whether it is held, holds it for that moment.
            lock = await _wait_lock(path / "lock")
        finally:
            creating.close()
    except OSError as exc:
        raise DirectoryError(
            f"the state directory {home / session} cannot be made: {exc.strerror or exc}",
            "make room or give access to it, or set KENAZ_STATE_DIR to another directory",
        ) from exc
    return SessionDirectory(session, path, lock)


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
    """True while a launcher holds the lock of that session directory."""
    try:
        lock = try_lock(path / "lock", create=False)
    except FileNotFoundError:
        return False
    if lock is None:
        return True
    lock.close()
    return False


@dataclass(frozen=True, slots=True)
class Seen:
    """A session as it is found on disk. `status` is `running`, `ended`, or `dead`: its launcher is gone and
    it may have left something."""

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
    try:
        recording: Recording | None = read_journal(path / "journal.jsonl")
    except (OSError, ValueError):
        recording = None
    ended = recording is not None and recording.end is not None
    return Seen(path.name, path, "running" if alive else "ended" if ended else "dead", recording)


def all_sessions() -> Iterator[Seen]:
    """Every session of this user, by id."""
    home = state_home() / "sessions"
    if home.is_dir():
        for path in sorted(home.iterdir()):
            if path.is_dir():
                yield see(path)
