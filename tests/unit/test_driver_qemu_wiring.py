"""The console of a QEMU on Windows: a pipe that QEMU serves some time after it has started."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from kenaz_drivers._common.winpipes import open_named
from kenaz_drivers.contract import DriverError, LaunchPlan
from kenaz_drivers.qemu import wiring
from kenaz_drivers.qemu.wiring import NamedConsole, connect

PIPE = r"\\.\pipe\kenaz-x-console"


async def test_the_console_is_opened_when_it_is_there(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    theirs, ours = trio.testing.memory_stream_one_way_pair()
    tried: list[str] = []

    def not_at_once(path: str) -> Any:
        tried.append(path)
        if len(tried) < 3:
            raise FileNotFoundError(path)
        return ours

    monkeypatch.setattr(wiring, "open_named", not_at_once)
    console = NamedConsole(PIPE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(console.open)
        await theirs.send_all(b"Linux version")
        assert await console.receive_some() == b"Linux version"
    assert tried == [PIPE] * 3
    console.give_up()  # what was opened is read to its end
    await theirs.aclose()
    assert await console.receive_some() == b""
    await console.aclose()


async def test_a_qemu_that_ends_before_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    def never(path: str) -> Any:
        raise FileNotFoundError(path)

    monkeypatch.setattr(wiring, "open_named", never)
    console = NamedConsole(PIPE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(console.open)
        await trio.sleep(1)
        console.give_up()
        with pytest.raises(trio.ClosedResourceError):
            await console.receive_some()
    await console.aclose()


def test_what_is_windows_s_own_is_told_elsewhere() -> None:
    with pytest.raises(DriverError, match="not Windows"):
        open_named(PIPE)
    with pytest.raises(DriverError, match="for a QEMU of Windows"):
        connect(LaunchPlan("qemu", ("qemu",)), {})
