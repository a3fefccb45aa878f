"""Ends processes that are known by a handle only, with all that has come of them.

A process may be gone and have left children. What is still its own is proven, never guessed: it carries the
mark that its launcher chose for it, in an environment that children inherit; or it is in the session that the
process leads, or led: while anything is in a session, the kernel gives its number to no other process.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import trio

from kenaz_drivers._common.identity import boot_id, is_alive, runs, status
from kenaz_drivers.contract import MARK, DriverError, JsonObject

if sys.platform == "win32":
    from kenaz_drivers._common import windows

_POLL = 0.05  # seconds between looks at a process that cannot be waited for
_AT_ONCE = 256  # processes that are held at a time, each by a descriptor


async def terminate(handle: JsonObject, *, alone: bool = False, deadline: float = 5.0) -> None:
    """Kills the process of that handle, from whatever process we are, and unless `alone` what has come of it.

    Returns when all are gone, at once when they were gone already. A handle with nothing but a `mark` is
    enough on Linux. A number alone is never signalled: there a pidfd pins a process before its start time is
    compared. Raises DriverError when something is still there after `deadline` seconds.
    """
    cleared = False
    with trio.move_on_after(deadline):
        if sys.platform == "linux":
            while _kin(handle, alone):
                await _end(handle, alone)
        elif "pid" not in handle:
            raise DriverError(
                "a process that nobody saw start cannot be told from others here", hint="end it by hand"
            )
        elif sys.platform == "win32":
            kernel = windows.load()
            while windows.end(kernel, int(handle["pid"]), str(handle["start_time"])):  # noqa: ASYNC110
                await trio.sleep(_POLL)
        else:
            while is_alive(handle):
                with suppress(ProcessLookupError):  # gone since it was looked at
                    os.kill(int(handle["pid"]), signal.SIGKILL)
                await trio.sleep(_POLL)
        cleared = True
    if not cleared and (left := _kin(handle, alone)):
        raise undead(min(left))


def undead(pid: int) -> DriverError:
    """What to raise of a process that the kernel keeps."""
    return DriverError(
        f"process {pid} does not die", hint="it is probably waiting for a device: `ps -o stat,wchan` tells"
    )


def _kin(handle: JsonObject, alone: bool) -> dict[int, str]:
    """The running processes that are the handle's: start times by number."""
    if handle.get("boot_id", boot_id()) != boot_id():
        return {}
    itself = int(handle["pid"]) if "pid" in handle and is_alive(handle) else 0
    found = {itself: str(handle["start_time"])} if itself else {}
    return found if alone else _with_kin(handle, found, itself)


def _with_kin(handle: JsonObject, found: dict[int, str], itself: int) -> dict[int, str]:
    """`found`, with what has come of that process. Nothing tells outside of Linux: there is no /proc."""
    led, mark = int(handle.get("pid", 0)), str(handle.get("mark", ""))
    if led and not itself and not mark:
        return {}  # nothing could prove that a process is its own
    proven = bool(itself)
    mates: dict[int, str] = {}
    for name in os.listdir("/proc") if sys.platform == "linux" else ():  # noqa: PTH208  # no paths are needed, of hundreds of processes
        if not name.isdecimal() or (pid := int(name)) == os.getpid():
            continue
        seen = status(pid)
        if not runs(seen):
            continue
        if led and seen.session == led:
            mates[pid] = seen.started
        if mark and _carries(pid, mark):
            found[pid] = seen.started
            proven = proven or seen.session == led
    return found | mates if proven else found


def _carries(pid: int, mark: str) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return f"{MARK}={mark}".encode() in environment.split(b"\0")


if sys.platform == "linux":

    async def _end(handle: JsonObject, alone: bool) -> None:
        """Stops all that is there, until there is nothing new, so that none slips away or loses its proof;
        then kills them."""
        held: dict[int, int] = {}
        try:
            while len(held) < _AT_ONCE:
                await trio.lowlevel.checkpoint()
                new = [found for found in _kin(handle, alone).items() if found[0] not in held]
                if not new:
                    break
                for pid, started in new[: _AT_ONCE - len(held)]:
                    _hold(pid, started, held)
            for pidfd in held.values():
                _send(pidfd, signal.SIGKILL)
            for pidfd in held.values():
                await trio.lowlevel.wait_readable(pidfd)
        except PermissionError as error:
            raise DriverError(
                f"a process of {_named(handle)} belongs to another user", hint="end it as that user"
            ) from error
        finally:
            for pidfd in held.values():
                os.close(pidfd)

    def _hold(pid: int, started: str, held: dict[int, int]) -> None:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        held[pid] = pidfd
        if status(pid).started == started:
            _send(pidfd, signal.SIGSTOP)
        else:
            os.close(held.pop(pid))

    def _send(pidfd: int, number: signal.Signals) -> None:
        try:
            signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            return

    def _named(handle: JsonObject) -> str:
        return f"process {handle['pid']}" if "pid" in handle else f"the mark {handle.get('mark', '')}"
