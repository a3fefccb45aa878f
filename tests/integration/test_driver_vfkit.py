"""The driver vfkit against a stand-in with vfkit's command line, REST interface and traps."""

import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from kenaz_drivers._common.identity import is_alive
from kenaz_drivers.contract import Disk, DriverError, LaunchRequest
from kenaz_drivers.vfkit import driver as module
from kenaz_drivers.vfkit.driver import VfkitDriver
from kenaz_drivers.vfkit.rest import RestClient, RestError, RestRefused
from kenaz_engine.images.config_disk import environment_file, write_config_disk

STANDIN = Path(__file__).parent / "standins/vfkit.py"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
def driver():
    return VfkitDriver()


@pytest.fixture
def vfkit(tmp_path):
    """Makes the program `vfkit`, with or without a trap; its path."""

    def make(trap=""):
        path = tmp_path / f"vfkit-{trap}"
        words = shlex.join([sys.executable, str(STANDIN), *([f"--trap={trap}"] if trap else [])])
        path.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
async def plan_for(driver, vfkit, tmp_path):
    for name in ("kernel", "initrd", "root"):
        (tmp_path / name).write_bytes(b"some bytes")
    variables = {"HARNESS_VM_TOKEN": "t", "KENAZ_SESSION_ID": "s", "KENAZ_CHANNEL": "vsock:2:7881"}
    write_config_disk(tmp_path / "config", {"kenaz.env": environment_file(variables)})

    async def plan(trap="", **changes):
        binary = vfkit(trap)
        capabilities = await driver.probe("x86_64", {"binary": binary})
        assert capabilities.usable
        assert capabilities.reasons[0].text == f"vfkit 0.6.4 at {binary}"
        request = LaunchRequest(
            session="s",
            directory=str(tmp_path),
            runtime=str(tmp_path),
            cpus=1,
            memory=256 << 20,
            transport="vfkit",
            channel=str(tmp_path / "channel.sock"),
            port=7881,
            capabilities=capabilities,
            kernel=str(tmp_path / "kernel"),
            initrd=str(tmp_path / "initrd"),
            cmdline="console=ttyS0",
            disks=(
                Disk("root", str(tmp_path / "root"), "raw"),
                Disk("config", str(tmp_path / "config"), "raw", readonly=True),
            ),
            mark=f"mark-{os.getpid()}",
        )
        return driver.plan(replace(request, **changes))

    return plan


async def test_a_machine_runs_and_hears_its_power_button(driver, plan_for):
    plan = await plan_for()
    [rest] = plan.data["files"]
    Path(rest).touch()  # of a vfkit that was killed: this one would end
    async with driver.launch(plan, {}) as machine:
        await machine.ready()
        assert await RestClient(rest).state() == "VirtualMachineStateRunning"
        await machine.powerdown()
        with trio.fail_after(60):
            ended = await machine.wait()
            said = [data async for data in machine.console()]
        assert (ended.clean, ended.reason, ended.code) == (True, "the guest powered off", 0)
        assert not any(b"level=" in data for data in said)
    assert not Path(rest).exists()


@pytest.mark.parametrize(
    ("trap", "reason"),
    [
        ("", "the launcher cut the power"),
        ("deaf", "the launcher cut the power"),
        ("mute", "SIGKILL killed vfkit"),
        ("refuses", "SIGKILL killed vfkit"),
    ],
)
async def test_the_power_is_cut_in_time_whatever_vfkit_does(driver, plan_for, monkeypatch, trap, reason):
    if reason == "the launcher cut the power":
        monkeypatch.setattr(module, "CUT_GRACE", 20.0)  # a busy vfkit needs longer than it is given
    plan = await plan_for(trap)
    async with driver.launch(plan, {}) as machine:
        if trap == "mute":
            with trio.move_on_after(1):
                await machine.ready()
        else:
            await machine.ready()
        started = time.monotonic()
        await machine.kill()
        assert time.monotonic() - started < 5  # what the lifecycles give to `killing`
        ended = await machine.wait()
        # On a busy host each step may come before the one before it has been heard.
        assert not ended.clean
        assert ended.reason in {reason, "the launcher cut the power", "SIGTERM killed vfkit"}
    assert not is_alive(machine.handle)
    assert not Path(plan.data["rest"]).exists()


async def test_a_power_button_that_is_refused_says_so(driver, plan_for, monkeypatch):
    async with driver.launch(await plan_for("refuses"), {}) as machine:
        await machine.ready()
        with pytest.raises(DriverError, match="power button does not work: Error Domain=VZErrorDomain"):
            await machine.powerdown()
    monkeypatch.setattr(module, "COMMAND_DEADLINE", 0.2)
    async with driver.launch(await plan_for("mute"), {}) as machine:
        while not Path(machine.handle["files"][0]).exists():
            await trio.sleep(0.01)
        said = "cannot be asked"
        while "cannot be asked" in said:  # its socket is there before it listens
            with pytest.raises(DriverError, match="power button does not work: ") as caught:
                await machine.powerdown()
            said = str(caught.value)
        assert "vfkit does not answer" in said


async def test_a_machine_without_its_channel_is_ended_at_once(driver, plan_for):
    async with driver.launch(await plan_for("no-channel"), {}) as machine:
        with trio.fail_after(60):
            ended = await machine.wait()
        assert not ended.clean
        assert "gave the guest no channel" in ended.reason
        assert "error exposing vsock port 7881" in ended.reason


@pytest.mark.parametrize(
    ("trap", "changes", "words", "hint"),
    [
        ("broken", {}, "Internal Virtualization error", "plan"),
        ("", {"disks": ()}, "code 1", "plan"),
        ("", {"disks": (Disk("root", "/no/such/disk", "raw"),)}, "No such file", "plan"),
    ],
)
async def test_a_machine_that_does_not_start_says_why(driver, plan_for, trap, changes, words, hint):
    async with driver.launch(await plan_for(trap, **changes), {}) as machine:
        with pytest.raises(DriverError) as caught:
            await machine.ready()
    assert words in f"{caught.value} {caught.value.log}"
    assert hint in caught.value.hint


async def test_a_machine_that_never_runs_is_given_up(driver, plan_for, monkeypatch):
    monkeypatch.setattr(module, "READY_DEADLINE", 1.0)
    async with driver.launch(await plan_for("stuck"), {}) as machine:
        with pytest.raises(DriverError, match="no running machine within 1 s"):
            await machine.ready()


async def test_vfkit_that_crashes_is_no_clean_end(driver, plan_for):
    async with driver.launch(await plan_for("panic"), {}) as machine:
        with trio.fail_after(60):
            ended = await machine.wait()
    assert (ended.clean, ended.code) == (False, 2)
    assert "fatal error" in ended.reason


async def test_a_machine_is_released_by_its_handle_alone_and_twice(driver, plan_for):
    plan = await plan_for()
    async with driver.launch(plan, {}) as machine:
        await machine.ready()
        handle = dict(machine.handle)
        await driver.release(handle)
        await driver.release(handle)
        assert not is_alive(handle)
        assert not Path(plan.data["rest"]).exists()
        assert (await machine.wait()).reason == "SIGKILL killed vfkit"
    async with driver.launch(plan, {}) as machine:
        await machine.ready()
        await driver.release({"mark": handle["mark"]})
        assert not is_alive(machine.handle)


async def test_a_program_that_does_not_exist_is_told(driver, plan_for):
    plan = await plan_for()
    async with driver.launch(replace(plan, argv=("/no/such/vfkit", *plan.argv[1:])), {}) as machine:
        with pytest.raises(DriverError, match="ended with code 127: cannot start") as caught:
            await machine.ready()
        assert "driverOptions.vfkit.binary" in caught.value.hint


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (b"", RestError, "cannot be asked"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull", RestError, "no JSON object"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", RestError, "does not say"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{not json", RestError, "no JSON object"),
        (b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", RestRefused, "HTTP status 503"),
    ],
)
async def test_what_is_no_answer_of_vfkit(tmp_path, answer, kind, words):
    path = str(tmp_path / "r")
    listening = trio.socket.socket(trio.socket.AF_UNIX)
    await listening.bind(path)
    listening.listen(1)

    async def serve():
        accepted, _ = await listening.accept()
        async with trio.SocketStream(accepted) as stream:
            await stream.receive_some()
            try:
                await stream.send_all(answer)
            except trio.BrokenResourceError:
                return

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        with pytest.raises(kind, match=words):
            await RestClient(path).state()
    listening.close()


async def test_programs_that_are_no_vfkit_are_not_used(driver, tmp_path):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho hello\n")
    for mode, words in ((0o644, "is no program"), (0o755, "does not say its version like vfkit")):
        program.chmod(mode)
        found = await driver.probe("x86_64", {"binary": str(program)})
        assert not found.usable
        assert words in found.reasons[0].text
