"""What process control needs of Windows, which has no signals, groups or parent-death: kernel32 by ctypes.

A process is held by a handle, which pins it as a pidfd does; a job ends all that is in it when its last
handle closes, so that no child outlives the launcher. Every function takes the library, so that all but
loading it can be tried anywhere. Facts: Microsoft's documentation of processthreadsapi.h, jobapi2.h and
winnt.h. Run under Wine 8.0, not on Windows yet.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import byref, sizeof
from typing import Any

from kenaz_drivers.contract import DriverError

Dword = ctypes.c_uint32
Word64 = ctypes.c_uint64
Size = ctypes.c_size_t

TERMINATE, SET_QUOTA, QUERY, SYNCHRONIZE = 0x0001, 0x0100, 0x1000, 0x0010_0000
SUSPEND_RESUME = 0x0800
"""Rights to a process: PROCESS_TERMINATE, _SET_QUOTA, _QUERY_LIMITED_INFORMATION, SYNCHRONIZE, and
PROCESS_SUSPEND_RESUME."""

STILL_ACTIVE = 259
INVALID_PARAMETER = 87
"""What OpenProcess says where there is no process of that number."""

CREATE_SUSPENDED = 0x4
KILL_ON_JOB_CLOSE = 0x2000
EXTENDED_LIMITS = 9
"""JobObjectExtendedLimitInformation."""


class BasicLimits(ctypes.Structure):
    """JOBOBJECT_BASIC_LIMIT_INFORMATION."""

    _fields_ = (
        ("per_process_time", ctypes.c_int64),
        ("per_job_time", ctypes.c_int64),
        ("flags", Dword),
        ("least_working_set", Size),
        ("most_working_set", Size),
        ("processes", Dword),
        ("affinity", Size),
        ("priority", Dword),
        ("scheduling", Dword),
    )


class ExtendedLimits(ctypes.Structure):
    """JOBOBJECT_EXTENDED_LIMIT_INFORMATION: 144 bytes where a pointer has 8."""

    _fields_ = (
        ("basic", BasicLimits),
        ("io", Word64 * 6),
        ("process_memory", Size),
        ("job_memory", Size),
        ("peak_process_memory", Size),
        ("peak_job_memory", Size),
    )


if sys.platform == "win32":

    def load() -> Any:
        """kernel32, with handles as wide as they are."""
        library = ctypes.WinDLL("kernel32", use_last_error=True)
        for name in ("OpenProcess", "CreateJobObjectW"):
            getattr(library, name).restype = ctypes.c_void_p
        return library

    def resume(process: Any) -> bool:
        """Lets a process run that was made suspended; whether it does. The thread's own handle is not to be
        had of Popen."""
        return bool(ctypes.WinDLL("ntdll").NtResumeProcess(process) == 0)

    def last_error() -> int:
        """Why the last call failed."""
        return ctypes.get_last_error()

else:

    def load() -> Any:
        """kernel32. Raises DriverError where there is none."""
        raise DriverError("this is not Windows")

    def resume(process: Any) -> bool:
        """Does nothing: nothing is made suspended here."""
        return True

    def last_error() -> int:
        """Nothing is known."""
        return 0


def needed_environment(*names: str) -> dict[str, str]:
    """The variables without which no program of Windows finds its sockets, and those besides; empty
    elsewhere."""
    wanted = ("SYSTEMROOT", *names) if sys.platform == "win32" else ()
    return {name: os.environ[name] for name in wanted if name in os.environ}


def started(kernel: Any, pid: int) -> str:
    """When that process began, in 100 ns since 1601; empty when it does not run. The number may be of a
    process that has ended, for as long as somebody holds it."""
    handle = _open(kernel, pid, QUERY)
    if handle is None:
        return ""
    try:
        return _started(kernel, handle)
    finally:
        kernel.CloseHandle(handle)


def _open(kernel: Any, pid: int, rights: int) -> Any:
    handle = kernel.OpenProcess(Dword(rights), False, Dword(pid))
    return ctypes.c_void_p(handle) if handle else None


def _started(kernel: Any, handle: Any) -> str:
    code, times = Dword(), [Word64() for _ in range(4)]
    if not kernel.GetExitCodeProcess(handle, byref(code)) or code.value != STILL_ACTIVE:
        return ""
    if not kernel.GetProcessTimes(handle, *map(byref, times)):
        return ""
    return str(times[0].value)


def end(kernel: Any, pid: int, start_time: str) -> bool:
    """Ends the process of that number if it is the one that began then; whether it still ran. The handle pins
    it before it is looked at. Raises DriverError where it may not be ended."""
    handle = _open(kernel, pid, QUERY | TERMINATE | SYNCHRONIZE)
    if handle is None:
        if last_error() in {0, INVALID_PARAMETER}:
            return False
        raise DriverError(f"process {pid} may not be ended", hint="end it as its user")
    try:
        if not start_time or _started(kernel, handle) != start_time:
            return False
        kernel.TerminateProcess(handle, Dword(1))
        return True
    finally:
        kernel.CloseHandle(handle)


class Job:
    """Ends its processes when this process ends, however that comes about."""

    def __init__(self, kernel: Any) -> None:
        """Raises DriverError."""
        self._kernel = kernel
        made = kernel.CreateJobObjectW(None, None)
        limits = ExtendedLimits()
        limits.basic.flags = KILL_ON_JOB_CLOSE
        self._handle = ctypes.c_void_p(made)
        if not made or not kernel.SetInformationJobObject(
            self._handle, EXTENDED_LIMITS, byref(limits), Dword(sizeof(limits))
        ):
            raise DriverError("no job for child processes can be made", hint="Windows 8 or later")

    def add(self, pid: int) -> None:
        """Takes in a process that was made suspended, and lets it run. Raises DriverError, the process being
        ended then."""
        handle = _open(self._kernel, pid, SET_QUOTA | TERMINATE | QUERY | SUSPEND_RESUME)
        if handle is None:
            raise DriverError(f"process {pid} cannot be held")
        try:
            tied = self._kernel.AssignProcessToJobObject(self._handle, handle)
            if not tied or not resume(handle):
                self._kernel.TerminateProcess(handle, Dword(1))
                raise DriverError(f"process {pid} cannot be {'let run' if tied else 'tied to the launcher'}")
        finally:
            self._kernel.CloseHandle(handle)
