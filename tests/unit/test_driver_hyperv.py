"""A machine of Hyper-V whose PowerShell is made up."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from kenaz_drivers._common.background import open_background
from kenaz_drivers.hyperv import driver as module
from kenaz_drivers.hyperv.driver import HypervMachine, PowerShell

VM = "11111111-2222-3333-4444-555555555555"
DATA = {"mark": "s", "powershell": "powershell.exe", "console": r"\\.\pipe\kenaz-s-com1"}


class Shell(PowerShell):
    """Notes what it is asked to do, and does not get done with some of it."""

    def __init__(self, *slow: str) -> None:
        super().__init__("powershell.exe")
        self.slow = slow
        self.done = trio.Event()
        self.asked: list[str] = []

    async def run(self, script: str, what: str, deadline: float) -> str:
        self.asked.append(what)
        if what in self.slow:
            await self.done.wait()
        return ""


async def test_a_console_that_says_nothing_can_be_left(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    theirs, ours = trio.testing.memory_stream_one_way_pair()
    opened: list[str] = []

    def open_named(path: str) -> Any:
        opened.append(path)
        if len(opened) < 2:
            raise FileNotFoundError(path)
        return ours

    monkeypatch.setattr(module, "open_named", open_named)
    seen = bytearray()

    async def read(machine: HypervMachine) -> None:
        async for data in machine.console():
            seen.extend(data)

    async with open_background() as background:
        machine = HypervMachine(Shell("the machine is gone"), VM, DATA, background)
        await machine.ready()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, machine)
            await theirs.send_all(b"Linux")
            await trio.sleep(1)
            nursery.cancel_scope.cancel()  # it still runs, and prints nothing
    assert (opened, seen) == ([DATA["console"]] * 2, b"Linux")
    with pytest.raises(trio.BrokenResourceError):
        await theirs.send_all(b"more")


async def test_the_button_is_pressed_again_only_when_the_last_press_is_over() -> None:
    shell = Shell("the guest shuts not down")
    async with open_background() as background:
        machine = HypervMachine(shell, VM, DATA, background)
        for _ in range(2):
            await machine.powerdown()
            await trio.testing.wait_all_tasks_blocked()
        assert len(shell.asked) == 1
        shell.done.set()
        await trio.testing.wait_all_tasks_blocked()
        await machine.powerdown()
        await trio.testing.wait_all_tasks_blocked()
        assert len(shell.asked) == 2
