"""KVM as this host has it: whatever it does with guests, the probe tells in time, and leaves nothing running.

There are hosts whose /dev/kvm opens, answers, makes machines, and then runs no guest, for ever.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from kenaz_drivers._common import accelerator
from kenaz_drivers.contract import Capabilities
from kenaz_drivers.qemu import probe as module

T = TypeVar("T")

BOUND = 3.0
"""Seconds in which a user has his answer, with QEMU asked about itself besides."""


def _opens() -> bool:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR))
    except OSError:
        return False
    return True


pytestmark = [
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs qemu-system-x86_64"),
    pytest.mark.only_where(_opens() and accelerator.host_arch() == "x86_64"),
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, empty; and a place for what is temporary, so that no process is anybody else's."""
    monkeypatch.setenv("KENAZ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / "cache/probe/qemu-x86_64.json"


async def in_time(ask: Callable[[], Awaitable[T]]) -> T:
    """The answer that comes within BOUND. Other tests may have the processors, so one of ten has to."""
    for _ in range(10):
        started = time.monotonic()
        answer = await ask()
        if time.monotonic() - started < BOUND:
            return answer
    raise AssertionError(f"no answer within {BOUND:g} s")


def running(mark: Path) -> list[str]:
    """The processes that have that path in their command line: the probe's guest has its firmware there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if str(mark).encode() in words:
            found.append(f"{process.name}: {words.decode(errors='replace')}")
    return found


async def test_the_verdict_comes_in_time_is_kept_for_this_boot_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def anew() -> Capabilities:
        cache.unlink(missing_ok=True)
        return await module.probe("x86_64", {})

    found = await in_time(anew)
    assert found.usable
    told = [reason for reason in found.reasons if "KVM" in reason.text]
    assert len(told) == 1
    # Either it has run a guest, or it is not what will be used, and the words say so.
    assert (found.accelerator == "kvm") == told[0].ok
    assert told[0].ok or ("does not run guests" in told[0].text and "using TCG" in told[0].text)
    assert running(tmp_path) == []

    ran: list[str] = []

    async def run_guest(*words: object) -> accelerator.Verdict:
        ran.append(str(words[2]))
        return accelerator.Verdict(told[0].ok, "asked again", "")

    monkeypatch.setattr(module, "run_guest", run_guest)
    assert await module.probe("x86_64", {}) == found
    assert ran == []
    monkeypatch.setattr(accelerator, "boot_id", lambda: "another")
    await module.probe("x86_64", {})
    assert ran == ["kvm"]


async def test_a_guest_that_never_ends_is_not_waited_for_and_not_left(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    async def look() -> None:
        while not seen:
            seen.extend(running(tmp_path))
            await trio.sleep(0.02)

    # `jmp $` at the reset vector: the trap itself, on whatever runs guests here.
    monkeypatch.setitem(
        accelerator.PROBE_GUESTS,
        "x86_64",
        replace(accelerator.PROBE_GUESTS["x86_64"], firmware=bytes(0xFFF0) + b"\xeb\xfe" + bytes(14)),
    )
    binary = shutil.which("qemu-system-x86_64") or ""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        verdict = await in_time(lambda: accelerator.run_guest(binary, "x86_64", "tcg", "max"))
        nursery.cancel_scope.cancel()
    assert seen  # there was something to leave
    assert not verdict.works
    assert "not done after 2 s" in verdict.text
    assert running(tmp_path) == []


async def test_a_probe_that_is_cancelled_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    for after in (0.05, 0.3, 0.6):
        with trio.move_on_after(after):
            await module.probe("x86_64", {})
        assert running(tmp_path) == []
