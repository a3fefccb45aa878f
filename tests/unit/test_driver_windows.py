"""What process control needs of Windows, on a kernel32 that is made up."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import pytest

from kenaz_drivers._common import windows
from kenaz_drivers.contract import DriverError


class Kernel:
    """Stands in for kernel32: processes by number, each with when it began, and open handles."""

    def __init__(self, **refuses: bool) -> None:
        self.processes = {7: 1000}
        self.ended: list[int] = []
        self.handles: dict[int, int] = {}
        self.jobs: list[int] = []
        self.limits: Any = None
        self.rights = 0
        self.refuses = refuses

    def OpenProcess(self, rights: Any, inherit: bool, pid: Any) -> int | None:  # noqa: N802  # Windows's name
        if pid.value not in self.processes or self.refuses.get("open"):
            return None
        self.rights = rights.value
        self.handles[0x1_0000_0000 + len(self.handles)] = pid.value
        return 0x1_0000_0000 + len(self.handles) - 1

    def GetExitCodeProcess(self, handle: Any, code: Any) -> bool:  # noqa: N802
        code._obj.value = 1 if self.handles[handle.value] in self.ended else windows.STILL_ACTIVE
        return not self.refuses.get("code")

    def GetProcessTimes(self, handle: Any, began: Any, *others: Any) -> bool:  # noqa: N802
        began._obj.value = self.processes[self.handles[handle.value]]
        return len(others) == 3 and not self.refuses.get("times")

    def TerminateProcess(self, handle: Any, code: Any) -> bool:  # noqa: N802
        self.ended.append(self.handles[handle.value])
        return True

    def CloseHandle(self, handle: Any) -> bool:  # noqa: N802
        del self.handles[handle.value]
        return True

    def CreateJobObjectW(self, security: None, name: None) -> int | None:  # noqa: N802
        return None if self.refuses.get("job") else 99

    def SetInformationJobObject(self, job: Any, kind: int, limits: Any, size: Any) -> bool:  # noqa: N802
        self.limits = (job.value, kind, limits._obj.basic.flags, size.value)
        return not self.refuses.get("limits")

    def AssignProcessToJobObject(self, job: Any, process: Any) -> bool:  # noqa: N802
        self.jobs.append(self.handles[process.value])
        return not self.refuses.get("assign")


def test_a_process_of_windows_is_told_by_when_it_began() -> None:
    kernel = Kernel()
    assert windows.started(kernel, 7) == "1000"
    assert windows.started(kernel, 8) == ""
    assert not windows.end(kernel, 7, "999")  # another of the same number
    assert not windows.end(kernel, 7, "")
    assert not windows.end(kernel, 8, "1000")
    assert kernel.ended == []
    assert windows.end(kernel, 7, "1000")
    assert not windows.end(kernel, 7, "1000")
    assert (kernel.ended, kernel.handles) == ([7], {})
    assert windows.started(kernel, 7) == ""
    assert windows.started(Kernel(times=True), 7) == ""


def test_a_process_of_another_user_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "last_error", lambda: 5)
    with pytest.raises(DriverError, match="process 7 may not be ended"):
        windows.end(Kernel(open=True), 7, "1000")


def test_a_job_takes_its_processes_along() -> None:
    kernel = Kernel()
    windows.Job(kernel).add(7)
    assert kernel.jobs == [7]
    assert kernel.handles == {}
    # PROCESS_SET_QUOTA and _TERMINATE, for the job, and _SUSPEND_RESUME: it was made suspended.
    assert kernel.rights & 0x0901 == 0x0901
    # 144 bytes is what a 64-bit Windows has for JOBOBJECT_EXTENDED_LIMIT_INFORMATION.
    if ctypes.sizeof(ctypes.c_void_p) == 8:
        assert kernel.limits == (99, 9, 0x2000, 144)


@pytest.mark.parametrize(("refused", "words"), [("job", "no job"), ("limits", "no job"), ("open", "be held")])
def test_a_job_that_cannot_be_had_is_an_error(refused: str, words: str) -> None:
    with pytest.raises(DriverError, match=words):
        windows.Job(Kernel(**{refused: True})).add(7)


def test_a_child_that_cannot_be_tied_is_ended() -> None:
    kernel = Kernel(assign=True)
    with pytest.raises(DriverError, match="cannot be tied"):
        windows.Job(kernel).add(7)
    assert (kernel.ended, kernel.handles) == ([7], {})


def test_a_child_that_cannot_be_let_run_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "resume", lambda process: False)
    kernel = Kernel()
    with pytest.raises(DriverError, match="cannot be let run"):
        windows.Job(kernel).add(7)
    assert (kernel.ended, kernel.handles) == ([7], {})


@pytest.mark.skipif(sys.platform == "win32", reason="there is one")
def test_there_is_no_kernel32_elsewhere() -> None:
    with pytest.raises(DriverError, match="not Windows"):
        windows.load()
