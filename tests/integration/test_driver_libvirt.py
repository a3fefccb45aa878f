"""What is libvirt's own, against a real daemon under TCG; the rest is in test_driver_conformance.py."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
import trio

from kenaz_drivers.conformance.kit import Kit
from kenaz_drivers.contract import DriverError


@pytest.fixture(scope="module")
def place():
    with tempfile.TemporaryDirectory(prefix="kz-") as directory:
        yield Path(directory)


@pytest.fixture
def kit(libvirtd, place, monkeypatch):
    monkeypatch.setenv("KENAZ_CACHE_DIR", str(place / "cache"))
    own = place / str(len(list(place.iterdir())))
    own.mkdir()
    return Kit("libvirt", "x86_64", own, {"accel": "tcg", "uri": libvirtd.uri})


def emulator_of(handle):
    """The pid of the domain's QEMU."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if words[0].endswith(b"/qemu-system-x86_64") and handle["uuid"].encode() in words:
            return int(process.name)
    pytest.fail("no QEMU runs that domain")


async def ended(machine):
    with trio.fail_after(60):
        return await machine.wait()


class Daemon:
    """A user's own libvirtd, as `qemu:///session` has it started: for root, that of somebody else."""

    def __init__(self, directory, monkeypatch):
        for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"):
            (directory / name).mkdir(mode=0o700)
            monkeypatch.setenv(name, str(directory / name))
        monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}:/usr/sbin")
        another = "unshare --user --map-user=1000 --map-group=1000" if os.geteuid() == 0 else ""
        program = directory / "virsh"
        program.write_text(f'#!/bin/sh\nexec {another} {shutil.which("virsh")} "$@"\n')
        program.chmod(0o755)
        self._number = directory / "XDG_RUNTIME_DIR/libvirt/libvirtd.pid"

    @property
    def pid(self):
        return int(self._number.read_text())

    async def end(self):
        """Ends it, if it runs; it is no child of ours."""
        if not self._number.exists():
            return
        pidfd = os.pidfd_open(self.pid)
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        with trio.fail_after(30):
            await trio.lowlevel.wait_readable(pidfd)
        os.close(pidfd)


@pytest.fixture
async def own_daemon(kit, monkeypatch):
    daemon = Daemon(kit.directory, monkeypatch)
    # When it starts for the first time it may take long to look at QEMU.
    start = ["virsh", "-c", "qemu:///session", "-q", "domcapabilities"]
    environment = {**os.environ, "LIBVIRT_AUTOSTART": "1"}
    await trio.run_process(start, env=environment, capture_stdout=True)
    yield daemon
    await daemon.end()


@pytest.mark.slow
async def test_a_daemon_that_ended_while_the_image_came_is_started_again(kit, own_daemon):
    kit.options["uri"] = "qemu:///session"
    async with kit.planned("waits") as plan:
        await own_daemon.end()
        async with kit.driver.launch(plan, {}) as machine:
            await machine.ready()
            environment = Path(f"/proc/{own_daemon.pid}/environ").read_bytes()
            assert machine.handle["mark"].encode() not in environment


async def test_a_domain_whose_owner_is_gone_is_gone(kit, libvirtd):
    async with kit.running("waits") as running:
        os.kill(running.machine.handle["pid"], signal.SIGKILL)
        exit_ = await ended(running.machine)
        assert libvirtd.domains() == []
    assert not exit_.clean
    assert exit_.reason.startswith("libvirt's connection ended")


async def test_a_qemu_that_is_killed_is_told(kit):
    async with kit.running("waits") as running:
        os.kill(emulator_of(running.machine.handle), signal.SIGKILL)
        exit_ = await ended(running.machine)
    assert not exit_.clean
    assert exit_.reason in ("QEMU failed", "QEMU crashed")


@pytest.mark.slow
async def test_a_signal_to_qemu_is_no_power_off(kit):
    async with kit.running("waits") as running:
        os.kill(emulator_of(running.machine.handle), signal.SIGTERM)
        exit_ = await ended(running.machine)
    assert (exit_.clean, exit_.reason) == (False, "a signal ended QEMU")


async def test_the_domain_carries_the_mark_and_is_transient(kit, libvirtd):
    async with kit.running("waits") as running:
        handle = running.machine.handle
        asked = ["virsh", "-c", libvirtd.uri, "-q", f"dumpxml {handle['uuid']}; dominfo {handle['uuid']}"]
        told = (await trio.run_process(asked, capture_stdout=True)).stdout.decode()
        assert f">{handle['mark']}<" in told
        assert "https://kenaz.dev/libvirt/1" in told
        assert re.search(r"Persistent: +no", told)


@pytest.mark.only_where(not Path("/dev/vhost-vsock").exists())
async def test_vsock_without_its_device_is_libvirts_refusal(kit):
    async with kit.planned("waits", transport="vsock") as plan:
        with pytest.raises(DriverError, match=r"vhost-vsock"):
            async with kit.driver.launch(plan, {}):
                pytest.fail("it was launched")


async def test_no_virsh_no_domain(kit, monkeypatch):
    async with kit.planned("waits") as plan:
        monkeypatch.setattr(subprocess, "Popen", _raise_again)
        with pytest.raises(DriverError, match="Resource temporarily unavailable"):
            async with kit.driver.launch(plan, {}):
                pytest.fail("it was launched")


def _raise_again(*args, **kwargs):
    raise BlockingIOError(11, "Resource temporarily unavailable")
