"""What is the driver process's own, with real children, and the probe of the real QEMU."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from kenaz_drivers.contract import Disk, DriverError, LaunchRequest
from kenaz_drivers.process.driver import ProcessDriver, describe_exit
from kenaz_drivers.qemu import probe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
async def driver():
    return ProcessDriver()


@pytest.fixture
async def plan_for(driver, tmp_path):
    capabilities = await driver.probe("x86_64", {})
    assert not capabilities.isolates
    assert not capabilities.boots_image

    def plan(script, **changes):
        request = LaunchRequest(
            session="p",
            directory=str(tmp_path),
            runtime=str(tmp_path),
            cpus=1,
            memory=1 << 30,
            transport="unix",
            channel=str(tmp_path / "c"),
            port=7881,
            capabilities=capabilities,
            disks=(Disk("root", str(tmp_path), "directory"),),
            agent=("sh", "-c", script),
        )
        return driver.plan(replace(request, **changes))

    return plan


async def test_it_says_loudly_that_it_isolates_nothing(plan_for):
    assert plan_for("true").notes == (
        "the driver process isolates nothing: the agent runs as you, on this machine",
    )


async def test_output_environment_and_directory_of_the_agent(driver, plan_for, tmp_path, monkeypatch):
    monkeypatch.setenv("A_SECRET", "x")
    script = "echo out; echo err >&2; env; pwd; ulimit -c"
    async with driver.launch(plan_for(script), {}) as machine:
        await machine.ready()
        said = b"".join([data async for data in machine.console()]).decode().split()
        assert (await machine.wait()).clean
    assert {"out", "err", f"HOME={tmp_path}", "LANG=C.UTF-8", str(tmp_path), "0"} <= set(said)
    assert "A_SECRET" not in " ".join(said)
    with pytest.raises(DriverError, match="the agent ended"):
        await machine.ready()


async def test_a_crash_is_not_clean_and_the_group_goes_with_it(driver, plan_for, tmp_path):
    async with driver.launch(plan_for("sleep 600 & echo $! > pid; exit 3"), {}) as machine:
        assert (await machine.wait()).reason == "the agent ended with code 3"
    stat = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    with trio.fail_after(30), suppress(OSError):
        while ") Z " not in stat.read_text():  # dead; whoever reaps orphans here may take its time
            await trio.sleep(0.01)


async def test_an_escaped_child_that_holds_the_console_does_not_hold_us(driver, plan_for, tmp_path):
    escapes = "setsid sh -c 'echo $$ > pid; exec sleep 600' & while [ ! -s pid ]; do sleep 0.01; done; exit 0"
    async with driver.launch(plan_for(escapes), {}) as machine:
        await machine.wait()
        started = time.monotonic()
        assert [data async for data in machine.console()] == []
    assert time.monotonic() - started < 5
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


async def test_what_cannot_be_planned_or_started(driver, plan_for, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DriverError, match="transport 'vsock'"):
        plan_for("true", transport="vsock")
    with pytest.raises(DriverError, match="needs an agent"):
        plan_for("true", agent=())
    with pytest.raises(DriverError, match="NUL"):
        plan_for("tr\0ue")
    nowhere = (Disk("root", str(tmp_path / "nowhere"), "directory"),)
    with pytest.raises(DriverError, match="cannot start sh"):
        async with driver.launch(plan_for("true", disks=nowhere), {}):
            pytest.fail("it was launched")
    assert len(os.listdir("/proc/self/fd")) == before


def test_how_an_agent_ended():
    assert describe_exit(-signal.SIGTERM, asked=True).clean
    assert not describe_exit(-signal.SIGTERM, asked=False).clean
    assert describe_exit(-99, asked=False).reason == "signal 99 killed the agent"


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed")
class TestRealQemu:
    async def test_the_probe_starts_nothing_the_second_time(self, tmp_path, monkeypatch):
        monkeypatch.setenv("KENAZ_CACHE_DIR", str(tmp_path))
        found = await probe.probe("x86_64", {})
        assert found.usable
        monkeypatch.setattr(trio.lowlevel, "open_process", None)
        monkeypatch.setattr(subprocess, "Popen", None)
        assert await probe.probe("x86_64", {}) == found

    async def test_the_tiny_guest_runs_under_emulation(self):
        binary = probe.find_binary("x86_64")
        verdict = await probe.run_guest(binary, "x86_64", "tcg", "max", deadline=20)
        assert verdict == probe.Verdict(True, "TCG runs guests")
        early = await probe.run_guest(binary, "x86_64", "tcg", "max", deadline=0.02)
        assert "not done after 0.02 s" in early.text

    # Such a KVM is known to emulate each instruction.
    @pytest.mark.only_where("pvm" in " ".join(os.listdir("/sys/module")) and os.access("/dev/kvm", os.W_OK))
    async def test_a_kvm_that_crawls_is_found_out(self):
        verdict = await probe.run_guest(probe.find_binary("x86_64"), "x86_64", "kvm", "qemu64")
        assert verdict.text == "KVM present but does not run guests (a tiny guest is not done after 2 s)"


async def test_on_windows_the_agent_has_what_sockets_need_there_and_the_user_is_told(driver, plan_for):
    capabilities = replace(
        await driver.probe("x86_64", {}), data={"environment": {"SYSTEMROOT": "C:\\Windows", "PATH": "C:\\"}}
    )
    plan = plan_for("", capabilities=capabilities)
    assert plan.environment["SYSTEMROOT"] == "C:\\Windows"
    assert plan.environment["PATH"] == "C:\\"
    assert "memory is not bounded" in plan.notes[-1]
    assert "SYSTEMROOT" not in plan_for("").environment
