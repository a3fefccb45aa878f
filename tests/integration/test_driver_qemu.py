"""What is QEMU's own, against the real one under TCG; the rest is in test_driver_conformance.py.

The guests are a few bytes of real-mode code each.
"""

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from kenaz_drivers._common.identity import is_alive
from kenaz_drivers.contract import Disk, DriverError, LaunchRequest
from kenaz_drivers.qemu import driver as driver_module
from kenaz_drivers.qemu.driver import QemuDriver

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"
)

ACTIONS = {
    # An empty interrupt table and an interrupt: triple fault, which is a reset. si points at six zero bytes.
    "reset": "2e0f011c cc f4 ebfd",
    "hang": "fa f4 ebfd",
}


def guest_code(action, text=b"up\n"):
    """Position-independent code: prints `text` on COM1, then acts."""
    act = bytes.fromhex(ACTIONS[action])
    # cld; call next; next: pop si; add si, text - next; mov dx, 0x3f8
    # more: lodsb cs:[si]; test al, al; jz act; out dx, al; jmp more
    head = bytes.fromhex("fc e80000 5e 81c6 0000 baf803 2eac 84c0 7403 ee ebf7")
    distance = len(head) + len(act) - 4
    head = head.replace(b"\x81\xc6\0\0", b"\x81\xc6" + distance.to_bytes(2, "little"))
    return head + act + text + bytes(7)


def pvh_kernel(text=b"up\n"):
    """A 32-bit ELF file that QEMU starts by its PVH note; prints `text`, counts a while, and resets.

    Of a guest that ends before the monitor is negotiated QEMU tells no reason, hence the counting.
    """
    base = 0x100000
    # cld; call next; next: pop esi; add esi, text - next; mov edx, 0x3f8
    # more: lodsb; test al, al; jz act; out dx, al; jmp more; act: mov ecx, 2**28; loop $; lidt [esi]; int3
    code = bytes.fromhex(
        "fc e800000000 5e 81c6 1a000000 ba f8030000 ac 84c0 7403 ee ebf8 b900000010 e2fe 0f011e cc f4 ebfd"
    )
    code = code.replace(b"\x81\xc6\x1a\0\0\0", b"\x81\xc6" + struct.pack("<I", len(code) - 6))
    code += text + bytes(7)
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", base)
    start = 52 + 2 * 32
    header = b"\x7fELF\1\1\1".ljust(16, b"\0")
    header += struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, base, 52, 0, 0, 52, 32, 2, 40, 0, 0)
    load = struct.pack("<8I", 1, start, base, base, len(code), len(code), 5, 4096)
    noted = struct.pack("<8I", 4, start + len(code), 0, 0, len(note), len(note), 4, 4)
    return header + load + noted + code + note


@pytest.fixture(scope="session")
def probe_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
async def driver(probe_cache, monkeypatch):
    monkeypatch.setenv("KENAZ_CACHE_DIR", str(probe_cache))
    return QemuDriver()


@pytest.fixture
async def plan_for(driver, tmp_path):
    """Makes plans for guests: a boot sector on q35, on microvm a kernel that resets."""
    channel = tmp_path / "ch,an"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(channel))
    listener.listen()
    capabilities = await driver.probe("x86_64", {"accel": "tcg"})

    def plan(action, machine="q35", **changes):
        disk, kernel = tmp_path / "a disk, of sorts", ""
        disk.write_bytes(guest_code(action).ljust(510, b"\0") + b"\x55\xaa" + bytes(4 << 20))
        if machine == "microvm":
            kernel = str(tmp_path / "kernel")
            Path(kernel).write_bytes(pvh_kernel().ljust(8192, b"\0"))
        request = LaunchRequest(
            session="test",
            directory=str(tmp_path),
            runtime=str(tmp_path),
            cpus=1,
            memory=32 << 20,
            transport="virtio-serial",
            channel=str(channel),
            port=7881,
            capabilities=capabilities,
            kernel=kernel,
            disks=(Disk("root", str(disk), "raw"),),
            options={"machine": machine},
        )
        return driver.plan(replace(request, **changes))

    yield plan
    listener.close()


async def read(machine, until):
    """What the console says up to `until`."""
    seen = b""
    with trio.fail_after(60):
        async for data in machine.console():
            seen += data
            if until in seen:
                return seen
    pytest.fail(f"the console ended after {seen!r}")


@pytest.mark.parametrize("machine_type", ["q35", "microvm"])
async def test_a_guest_runs_prints_and_asks_for_a_reboot(driver, plan_for, machine_type):
    async with driver.launch(plan_for("reset", machine_type), {}) as machine:
        await machine.ready()
        await read(machine, b"up\n")
        with trio.fail_after(60):
            ended = await machine.wait()
    assert (ended.clean, ended.code) == (False, 0)
    assert ended.reason == "guest-reset: the guest asked for a reboot"


async def test_a_guest_that_hangs_is_killed_and_killing_twice_is_once(driver, plan_for, monkeypatch):
    monkeypatch.setattr(driver_module, "QUIT_GRACE", 20.0)
    async with driver.launch(plan_for("hang"), {}) as machine:
        await machine.ready()
        await machine.powerdown()
        started = time.monotonic()
        await machine.kill()
        assert time.monotonic() - started < 5  # what the lifecycles give to `killing`
        await machine.kill()
        assert (await machine.wait()).reason == "host-qmp-quit: the launcher ended QEMU"
        assert not (await machine.wait()).clean
        with pytest.raises(DriverError, match="the power button does not work"):
            await machine.powerdown()


async def test_a_stopped_qemu_dies_too(driver, plan_for):
    async with driver.launch(plan_for("hang"), {}) as machine:
        await machine.ready()
        os.kill(machine.handle["pid"], signal.SIGSTOP)
        started = time.monotonic()
    assert time.monotonic() - started < 4
    assert (await machine.wait()).reason == "SIGKILL killed QEMU"


async def test_a_stopped_qemu_does_not_answer_in_time(driver, plan_for, monkeypatch):
    monkeypatch.setattr(driver_module, "GREETING_DEADLINE", 0.2)
    monkeypatch.setattr(driver_module, "COMMAND_DEADLINE", 0.2)
    async with driver.launch(plan_for("hang"), {}) as machine:
        os.kill(machine.handle["pid"], signal.SIGSTOP)
        with pytest.raises(DriverError, match="QEMU does not answer within"):
            await machine.ready()
        with pytest.raises(DriverError, match="QEMU does not answer"):
            await machine.powerdown()


async def test_an_option_that_qemu_refuses_comes_with_its_words(driver, plan_for):
    plan = plan_for("hang")
    plan = replace(plan, argv=(*plan.argv, "-device", "no-such-device"))
    async with driver.launch(plan, {}) as machine:
        with pytest.raises(DriverError, match=r"ended with code 1: .*no-such-device") as caught:
            await machine.ready()
        assert "no-such-device" in caught.value.log[-1]
        assert "kenaz-launcher plan" in caught.value.hint
        assert (await machine.wait()).code == 1


async def test_a_disk_in_use_is_named_with_the_mend(driver, plan_for):
    plan = plan_for("hang")
    async with driver.launch(plan, {}) as first:
        await first.ready()
        async with driver.launch(plan, {}) as second:
            with pytest.raises(DriverError) as caught:
                await second.ready()
    assert caught.value.hint == "another machine uses this disk; end that one first"


async def test_a_missing_qemu_is_an_error_of_ready(driver, plan_for):
    plan = plan_for("hang")
    plan = replace(plan, argv=("/nowhere/qemu", *plan.argv[1:]))
    async with driver.launch(plan, {}) as machine:
        with pytest.raises(DriverError, match="cannot start /nowhere/qemu: No such file") as caught:
            await machine.ready()
    assert "driverOptions.qemu.binary" in caught.value.hint


async def test_a_descriptor_that_is_not_given_is_refused_before_anything_starts(driver, plan_for):
    plan = plan_for("hang", transport="vsock", cid=42)
    with pytest.raises(DriverError, match="an open descriptor for vhost-vsock"):
        async with driver.launch(plan, {}):
            pytest.fail("it was launched")


async def test_no_process_means_no_leak_either(driver, plan_for, monkeypatch):
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(subprocess, "Popen", _raise_again)
    with pytest.raises(DriverError, match="Resource temporarily unavailable"):
        async with driver.launch(plan_for("hang"), {}):
            pytest.fail("it was launched")
    assert len(os.listdir("/proc/self/fd")) == before


def _raise_again(*args, **kwargs):
    raise BlockingIOError(11, "Resource temporarily unavailable")


async def test_the_machine_dies_with_a_launcher_that_is_killed(plan_for, tmp_path):
    plan = plan_for("hang")
    script = textwrap.dedent(
        f"""
        import json, sys, trio
        from kenaz_drivers.contract import LaunchPlan
        from kenaz_drivers.qemu.driver import QemuDriver
        plan = LaunchPlan("qemu", {plan.argv!r}, {dict(plan.environment)!r}, {dict(plan.descriptors)!r})
        async def main():
            async with QemuDriver().launch(plan, {{}}) as machine:
                await machine.ready()
                print(json.dumps(machine.handle), flush=True)
                await trio.sleep_forever()
        trio.run(main)
        """
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        handle = json.loads(await trio.to_thread.run_sync(launcher.stdout.readline))
        assert is_alive(handle)
        # trio ends idle worker threads after ten seconds; a machine started from one would go with it.
        with trio.CancelScope(deadline=trio.current_time() + 11):
            while is_alive(handle):
                await trio.sleep(0.2)
            pytest.fail("the machine did not outlive trio's idle threads")
        launcher.kill()
        with trio.fail_after(30):
            while is_alive(handle):
                await trio.sleep(0.01)


async def test_qemu_parses_odd_paths_as_we_mean_them(driver, plan_for, tmp_path):
    odd = tmp_path / "a,b ,,c=d:e 'f' ü"
    odd.mkdir()
    disk = odd / "x,format=qcow2,y"
    disk.write_bytes(bytes(65536))
    config = odd / "config,iso"
    config.write_bytes(bytes(65536))
    disks = (Disk("root", str(disk), "raw"), Disk("config", str(config), "raw", readonly=True))
    plan = plan_for("hang", disks=disks)
    async with driver.launch(plan, {}) as machine:
        await machine.ready()
        links = {
            os.readlink(f"/proc/{machine.handle['pid']}/fd/{n}") for n in range(3, 30) if _open(machine, n)
        }
    assert {str(disk), str(config)} <= links


def _open(machine, number):
    return os.path.lexists(f"/proc/{machine.handle['pid']}/fd/{number}")


async def test_the_descriptors_of_the_launcher_stay_with_the_launcher(driver, plan_for, tmp_path):
    secret = tmp_path / "secret"
    with secret.open("wb") as file:
        os.set_inheritable(file.fileno(), True)
        async with driver.launch(plan_for("hang"), {}) as machine:
            await machine.ready()
            directory = Path(f"/proc/{machine.handle['pid']}/fd")
            assert str(secret) not in {os.readlink(link) for link in directory.iterdir()}
            environment = Path(f"/proc/{machine.handle['pid']}/environ").read_bytes()
    assert not any(line.startswith((b"KENAZ", b"HOME", b"PATH")) for line in environment.split(b"\0"))
