"""Gives back what sessions hold whose launcher is gone, from nothing but their journals.

A session is dead when its lock is free and its journal has no `end` that says nothing is left. Reaping takes
that lock, so that no launcher and no other reaper is at it; goes on with the journal, so that whoever comes
next knows how far it came; and releases through the ledger, newest first, as the launcher itself would have
done. A reaping that was not finished, also one that was killed, is gone on with by the next.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import trio

from kenaz_drivers.contract import DriverError
from kenaz_drivers.host import identify, is_alive, terminate
from kenaz_drivers.registry import load
from kenaz_engine import __version__
from kenaz_engine.journal.opening import resume_journal
from kenaz_engine.journal.reader import Recording, read_journal
from kenaz_engine.journal.records import Damaged
from kenaz_engine.journal.writer import Journal
from kenaz_engine.session import directory as directories
from kenaz_engine.session.directory import CONSOLE, JOURNAL, LOCK, DirectoryError, creating, finished
from kenaz_engine.session.ledger import Entry, Ledger, Left, left_data, still_held
from kenaz_engine.session.leftovers import leftovers
from kenaz_engine.session.locks import Lock, try_lock
from kenaz_engine.session.recorder import Recorder
from kenaz_engine.session.resources import BY_HANDLE, BY_INTENT

KEEP = 200
"""Finished sessions whose directories are kept: the newest ones. docs/reference/journal.md says so too."""

BOUND = 60.0
"""Seconds that a reaping of all sessions may take, unless the caller says otherwise."""

AT_ONCE = 8
"""Sessions that are reaped at a time."""

LAST_GASP = 2.0
"""Seconds that a launcher may be on its way out after its lock is free."""

DIED = "its launcher died"

Status = Literal["reaped", "left", "refused", "running", "ended", "dead"]


@dataclass(frozen=True, slots=True)
class Reaped:
    """What came of one session.

    `reaped`: all is given back. `left`: not all. `refused`: nothing was touched, and `message` says why.
    `running`: it has a launcher, or another reaper. `ended`: it held nothing. `dead`: it is to be reaped, and
    was only looked at. `released` is what was given back (of `dead`: would be), newest first.
    """

    id: str
    path: Path
    status: Status
    released: tuple[Entry, ...] = ()
    left: tuple[Left, ...] = ()
    message: str = ""


def reaped_data(result: Reaped) -> dict[str, Any]:
    """What came of a session, as plain JSON."""
    return {
        "id": result.id,
        "status": result.status,
        "released": [{"id": e.id, "resource": e.resource, "type": e.kind} for e in result.released],
        "left": [left_data(item) for item in result.left],
        "message": result.message,
    }


@dataclass(frozen=True, slots=True)
class Swept:
    """What came of all: a result for each session that was dead, and the finished ones that were removed."""

    sessions: tuple[Reaped, ...]
    removed: tuple[str, ...]


class Refused(Exception):
    """A session that nobody should touch, and why."""


# --- decisions ----------------------------------------------------------------------------------------------


def objection(recording: Recording, path: str) -> str:
    """Why the session in the directory `path` (a real path) must not be reaped by its journal; else empty."""
    header = recording.header or {}
    own = header.get("directory")
    if own == path:
        return ""
    return (
        f"its journal is that of {own or 'another place'}: this directory was copied or moved; remove it by "
        "hand when you need it no longer"
    )


def expired(ended: Iterable[tuple[float, Path]], keep: int = KEEP) -> list[Path]:
    """Of finished sessions (when, where) those that are kept no longer: all but the newest `keep`."""
    newest_first = sorted(ended, reverse=True)
    return sorted(path for _, path in newest_first[keep:])


def end_fields(recording: Recording, left: Iterable[Left]) -> dict[str, Any]:
    """The `end` that a reaper writes: where the session stood when its launcher ended, and what is left."""
    none: dict[str, Any] = {}
    told = next((r for r in reversed(recording.records) if r["kind"] in ("decision", "end")), none)
    seconds = next((r["t"] for r in reversed(recording.records) if r["kind"] not in _REAPERS), 0.0)
    own_end = recording.end
    fields: dict[str, Any] = {
        "state": own_end["state"]
        if own_end
        else recording.state or recording.records[0]["lifecycle"]["initial"],
        "success": False,
        "seconds": round(seconds, 3) if own_end is None else own_end["seconds"],
        "left": [left_data(item) for item in left],
        "reaped": True,
    }
    kept = {name: told[name] for name in ("verdict", "also", "warnings") if name in told}
    internal = DIED if own_end is None else own_end.get("internal", "")
    return fields | kept | ({"internal": internal} if internal else {})


_REAPERS = frozenset({"reap", "released", "note"})


# --- one session --------------------------------------------------------------------------------------------


async def reap(path: Path, deadline: float) -> Reaped:
    """Reaps the session in that directory until `deadline` (trio's clock). Never raises for what it finds."""
    try:
        lock = await _take(path)
        if lock is None:
            return Reaped(path.name, path, "running")
        clean = False
        try:
            result = await _reap(path, deadline)
            clean = result.status in ("reaped", "ended")
        finally:
            lock.close(remove=clean)
    except Exception as exc:
        return Reaped(path.name, path, "refused", message=_said(exc))
    return result


def _said(exc: Exception) -> str:
    """Whatever is wrong with one session, the others are none the worse for it."""
    match exc:
        case Refused() | DirectoryError():
            return str(exc)
        case OSError():
            return (f"{exc.filename}: " if exc.filename else "") + (exc.strerror or str(exc))
        case Damaged():
            return f"its journal is damaged: {exc}"
    return f"its journal cannot be understood: {type(exc).__name__}: {exc}"


def look(path: Path) -> Reaped:
    """What reaping that session would come to, without touching anything."""
    if directories.is_alive(path):
        return Reaped(path.name, path, "running")
    try:
        recording = _read(path)
        held = still_held(recording.records) if recording else []
    except Exception as exc:
        return Reaped(path.name, path, "refused", message=_said(exc))
    if recording is None:
        return Reaped(path.name, path, "dead", message=_NOT_BEGUN)
    if _is_done(recording, held):
        return Reaped(path.name, path, "ended")
    return Reaped(path.name, path, "dead", tuple(reversed(held)))


def _is_done(recording: Recording, held: list[Entry]) -> bool:
    return recording.end is not None and not recording.being_reaped and not held


_NOT_BEGUN = "it died before its first record"


async def _take(path: Path) -> Lock | None:
    """The session's lock. A directory that is being made just now is not mistaken for one that was left."""
    async with creating(path.parent):
        for _ in range(5):
            if (lock := try_lock(path / LOCK)) is not None:
                return lock
            await trio.sleep(0.01)  # perhaps somebody only looked whether it is held
    return None


def _read(path: Path) -> Recording | None:
    """The journal, or None where a session has not even begun. Raises Damaged, Refused and OSError."""
    try:
        recording = read_journal(path / JOURNAL)
    except FileNotFoundError:
        recording = Recording(path / JOURNAL, [], torn=False)
    if recording.header is None:
        if strange := {item.name for item in path.iterdir()} - {JOURNAL, CONSOLE, LOCK}:
            raise Refused(f"it has no journal, but {', '.join(sorted(strange))}")
        return None
    if wrong := objection(recording, os.path.realpath(path)):
        raise Refused(wrong)
    return recording


async def _reap(path: Path, deadline: float) -> Reaped:
    recording = _read(path)
    if recording is None:
        # Nothing is made before the header, and there is nothing to be remembered.
        shutil.rmtree(path)
        return Reaped(path.name, path, "reaped", message=_NOT_BEGUN)
    held = still_held(recording.records)
    if _is_done(recording, held):
        return Reaped(path.name, path, "ended")
    await _end_processes(recording.records[0], deadline)
    journal, _ = resume_journal(path / JOURNAL)
    try:
        return await _release(path, recording, held, journal, deadline)
    finally:
        journal.close()


async def _end_processes(header: Mapping[str, Any], deadline: float) -> None:
    """The lock of a launcher is free a moment before its children are told that it is gone."""
    launcher = header["process"]
    patience = min(deadline, trio.current_time() + LAST_GASP)
    while launcher["pid"] != os.getpid() and is_alive(launcher):
        if trio.current_time() >= patience:
            raise Refused(f"its launcher, process {launcher['pid']}, still runs, without its lock")
        await trio.sleep(0.01)
    if sys.platform == "linux":
        # Before any file goes, lest a child still at work make it again.
        handle = {"mark": header["mark"], "boot_id": launcher["boot_id"]}
        try:
            await terminate(handle, deadline=max(0.1, min(5.0, deadline - trio.current_time())))
        except DriverError as exc:
            raise Refused(str(exc)) from exc


async def _release(
    path: Path, recording: Recording, held: list[Entry], journal: Journal, deadline: float
) -> Reaped:
    recorder = Recorder(journal)
    recorder.append("reap", {"launcher": __version__, "process": identify(os.getpid())})
    machine = _machines(recording.records[0]["driver"])
    ledger = Ledger(
        recorder, {**BY_INTENT, "machine": machine}, {**BY_HANDLE, "machine": machine}, entries=list(held)
    )
    left = await ledger.release_all(deadline)
    if not left:
        _sweep(path)
    recorder.append("end", end_fields(recording, left))
    message = recorder.fault or "; ".join(leftovers(path / JOURNAL)[:1] if not left else ())
    released = tuple(entry for entry in reversed(held) if entry not in ledger.entries)
    status: Status = "left" if left or message else "reaped"
    return Reaped(path.name, path, status, released, tuple(left), message)


def _machines(driver: str) -> Callable[[Mapping[str, Any]], Awaitable[None]]:
    async def release(handle: Mapping[str, Any]) -> None:
        await load(driver).release(handle)

    return release


def _sweep(path: Path) -> None:
    """Half-written files, that no record names. The directory is the session's own, and so is all in it."""
    for item in path.iterdir():
        if item.name in (JOURNAL, CONSOLE, LOCK):
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()


# --- all sessions -------------------------------------------------------------------------------------------


async def sweep(*, older_than: float = 0.0, bound: float = BOUND, keep: int = KEEP) -> Swept:
    """Reaps all dead sessions of this user, then removes the finished ones that are kept no longer.

    Leaves alone what changed less than `older_than` seconds ago. Takes about `bound` seconds at the most.
    """
    deadline = trio.current_time() + bound
    dead, old = _found(older_than, keep)
    results: list[Reaped] = []
    limiter = trio.CapacityLimiter(AT_ONCE)

    async def one(path: Path) -> None:
        async with limiter:
            if trio.current_time() < deadline:
                results.append(await reap(path, deadline))

    async with trio.open_nursery() as nursery:
        for path in dead:
            nursery.start_soon(one, path)
    return Swept(_told(results), await _remove(old))


def survey(*, older_than: float = 0.0, keep: int = KEEP) -> Swept:
    """What `sweep` would do, without doing any of it."""
    dead, old = _found(older_than, keep)
    return Swept(_told(map(look, dead)), tuple(path.name for path in old))


def _found(older_than: float, keep: int) -> tuple[list[Path], list[Path]]:
    """The directories of sessions that are dead, and of those that have been kept long enough."""
    paths = directories.session_directories()
    ended = {path for path in paths if finished(path)}
    old = expired(((_touched(path), path) for path in ended), keep)
    dead = [path for path in paths if path not in ended and not directories.is_alive(path)]
    if not older_than:
        return dead, old  # also what was written in the future, for clocks are set back
    since = time.time() - older_than
    return [p for p in dead if _touched(p) <= since], [p for p in old if _touched(p) <= since]


def _told(results: Iterable[Reaped]) -> tuple[Reaped, ...]:
    return tuple(sorted((r for r in results if r.status not in ("running", "ended")), key=lambda r: r.id))


def _touched(path: Path) -> float:
    """When something was last written of that session; 0.0 when it is gone."""
    for one in (path / JOURNAL, path):
        try:
            return one.stat().st_mtime
        except OSError:
            continue
    return 0.0


async def _remove(old: list[Path]) -> tuple[str, ...]:
    removed: list[str] = []
    try:
        if old:
            async with creating(directories.sessions_home()):
                for path in filter(finished, old):
                    shutil.rmtree(path, ignore_errors=True)
                    removed.append(path.name)
    except (DirectoryError, OSError):
        return tuple(removed)  # the next time will do
    return tuple(removed)
