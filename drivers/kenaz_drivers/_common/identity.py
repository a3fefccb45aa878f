"""Which process is meant: a number alone is used again, so a handle says more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from kenaz_drivers.contract import JsonObject

if sys.platform == "win32":
    from kenaz_drivers._common import windows


class Status(NamedTuple):
    """A process as it is now; all empty when there is none of that number."""

    state: str
    started: str
    session: int


_NONE = Status("", "", 0)


def boot_id() -> str:
    """Names this boot of the machine; empty where the platform does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def status(pid: int) -> Status:
    """State letter, start time and session of a process (proc(5), fields 3, 22 and 6). Outside of Linux the
    session is 0."""
    if sys.platform == "linux":
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return _NONE
        fields = text.rpartition(")")[2].split()  # the name in field 2 may hold spaces and parentheses
        found = Status(fields[0], fields[19], int(fields[3]))
    elif sys.platform == "win32":
        began = windows.started(windows.load(), pid)
        found = Status("R", began, 0) if began else _NONE
    else:
        command = ["/bin/ps", "-o", "stat=,lstart=", "-p", str(pid)]
        # It writes the time in the language and the time zone of whoever asks, which a reaper's need not be.
        neutral = {"LC_ALL": "C", "TZ": "UTC0"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=neutral)
        state, _, started = done.stdout.strip().partition(" ")
        found = Status(state[:1], started.strip(), 0)
    return found


def identify(pid: int) -> dict[str, str | int]:
    """The handle of a running process: its pid, and what tells it from a later one of the same pid."""
    return {"pid": pid, "start_time": status(pid).started, "boot_id": boot_id()}


def is_alive(handle: JsonObject) -> bool:
    """Whether the very process of that handle still runs. A zombie does not."""
    if handle.get("boot_id", "") != boot_id():
        return False
    found = status(int(handle["pid"]))
    return bool(found.started) and found.started == handle.get("start_time") and runs(found)


def runs(found: Status) -> bool:
    """Whether a process of that status does anything yet: it is there, and no zombie."""
    return bool(found.state) and found.state not in {"Z", "X"}
