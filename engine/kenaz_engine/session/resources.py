"""How each kind of resource is given back: by the process that made it, or from the journal alone."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from kenaz_drivers.host import terminate
from kenaz_engine.session.ledger import Made

Intent = Mapping[str, Any]
Handle = Mapping[str, Any]
Release = Callable[[Mapping[str, Any]], Awaitable[None]]


def file_handle(path: Path) -> dict[str, Any]:
    """What tells this file from another that later has its path. Raises FileNotFoundError."""
    status = path.lstat()
    return {"path": str(path), "device": status.st_dev, "inode": status.st_ino}


def is_same(handle: Handle) -> bool:
    """True while the path still names the file of the handle."""
    try:
        status = Path(handle["path"]).lstat()
    except FileNotFoundError:
        return False
    return (status.st_dev, status.st_ino) == (handle["device"], handle["inode"])


def made_file(path: Path) -> Made:
    """A file or socket that now exists; it is given back by unlinking it."""
    handle = file_handle(path)
    return Made(handle, partial(_unlink_same, handle))


def made_directory(path: Path) -> Made:
    """A directory that now exists; it is given back with all that is in it."""
    handle = file_handle(path)
    return Made(handle, partial(_remove_same, handle))


def planned_file(path: Path) -> Made:
    """A file that somebody else will make, in the session's own directory; it is given back as one that is
    there."""
    handle = {"path": str(path)}
    return Made(handle, partial(_unlink, handle))


async def _unlink_same(handle: Handle) -> None:
    if is_same(handle):
        Path(handle["path"]).unlink(missing_ok=True)


async def _remove_same(handle: Handle) -> None:
    if is_same(handle):
        shutil.rmtree(handle["path"])


async def _unlink(intent: Intent) -> None:
    """The path was ours alone to make: it lies in the session's own directory."""
    Path(intent["path"]).unlink(missing_ok=True)


async def _remove_tree(intent: Intent) -> None:
    path = Path(intent["path"])
    if path.exists():
        shutil.rmtree(path)


async def _nothing(fields: Mapping[str, Any]) -> None:
    """What lives and dies with the launcher's process."""


async def _unlink_sockets(fields: Mapping[str, Any]) -> None:
    """The process is ended by its mark, or has died with its launcher; what it made lies in the session's own
    directory."""
    for path in fields["sockets"]:
        Path(path).unlink(missing_ok=True)


async def _end_process(handle: Handle) -> None:
    await terminate(handle)
    await _unlink_sockets(handle)


_WITH_THE_LAUNCHER: Mapping[str, Release] = dict.fromkeys(
    ("image-reference", "stream", "cid", "port"), _nothing
)

BY_INTENT: Mapping[str, Release] = {
    "file": _unlink,
    "planned-file": _unlink,
    "socket": _unlink,
    "directory": _remove_tree,
    "process": _unlink_sockets,
    **_WITH_THE_LAUNCHER,
}
"""Release from an intent alone, by kind: for an act that failed, or that nobody saw the end of. Machines are
their driver's."""

BY_HANDLE: Mapping[str, Release] = {
    "file": _unlink_same,
    "planned-file": _unlink,
    "socket": _unlink_same,
    "directory": _remove_same,
    "process": _end_process,
    **_WITH_THE_LAUNCHER,
}
"""Release by the handle, in a process other than the one that made it. Machines are their driver's."""
