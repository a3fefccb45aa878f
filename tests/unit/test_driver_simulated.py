"""The scripted machine, on virtual time."""

import json
import tempfile
from pathlib import Path

import pytest
import trio

from kenaz_drivers.contract import Capabilities, Disk, DriverError, LaunchRequest
from kenaz_drivers.simulated.driver import SimulatedDriver


@pytest.fixture
def driver():
    return SimulatedDriver()


@pytest.fixture
def directory():
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@pytest.fixture
async def plan_for(driver, directory):
    (directory / "kenaz.env").write_text(
        "# made by a test\nHARNESS_VM_TOKEN='to ken'\nKENAZ_WORKBENCH_BUILD=7\n"
    )
    capabilities = await driver.probe("x86_64", {})

    def plan(transport="unix", config=True, **script):
        request = LaunchRequest(
            session="sim",
            directory=str(directory),
            runtime=str(directory),
            cpus=1,
            memory=1,
            transport=transport,
            channel=str(directory / "channel"),
            port=7881,
            capabilities=capabilities,
            disks=(Disk("config", str(directory), "directory"),) if config else (),
            options={"script": script},
        )
        return driver.plan(request)

    return plan


@pytest.fixture
async def listener(directory):
    with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM) as listening:
        await listening.bind(str(directory / "channel"))
        listening.listen()
        yield trio.SocketListener(listening)


async def receive(stream):
    data = b""
    while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
        data += await stream.receive_some(1)
    return json.loads(data[4:])


async def send(stream, message):
    body = json.dumps(message).encode()
    await stream.send_all(len(body).to_bytes(4, "big"))
    await stream.send_all(body)


async def test_it_needs_nothing_and_isolates_nothing_real(driver):
    capabilities = await driver.probe("aarch64", {})
    assert isinstance(capabilities, Capabilities)
    assert capabilities.usable
    assert capabilities.arch == "aarch64"


async def test_a_whole_life(driver, plan_for, listener, autojump_clock):
    plan = plan_for(
        ready=1, dial=2, powerdown=3, console=[{"at": 0.5, "line": "a"}, {"at": 1.5, "line": "b"}]
    )
    async with driver.launch(plan, {}) as machine:
        await machine.ready()
        assert trio.current_time() == 1
        async with await listener.accept() as stream:
            assert trio.current_time() == 2
            hello = await receive(stream)
            assert (hello["kind"], hello["token"], hello["build"]) == ("hello", "to ken", "7")
            await send(stream, {"kind": "welcome"})
            await send(stream, {"kind": "ping", "id": 3})
            assert await receive(stream) == {"kind": "pong", "id": 3}
            await send(stream, {"kind": "drain", "deadline": 5})
            assert await receive(stream) == {"kind": "bye", "reason": "drained"}
            await machine.powerdown()
            assert (await machine.wait()).clean
            assert trio.current_time() == 5
            assert await stream.receive_some() == b""
        assert [line async for line in machine.console()] == [b"a\n", b"b\n"]


async def test_the_machine_may_refuse_to_start_or_end_first(driver, plan_for, autojump_clock):
    async with driver.launch(plan_for(refuse="no memory", dial=None), {}) as machine:
        with pytest.raises(DriverError, match="no memory"):
            await machine.ready()
    async with driver.launch(plan_for(ready=None, dial=None), {}) as machine:
        with trio.move_on_after(1000) as scope:
            await machine.ready()
        assert scope.cancelled_caught
        await machine.kill()
        with pytest.raises(DriverError, match="the power was cut"):
            await machine.ready()


@pytest.mark.parametrize("clean", [True, False])
async def test_it_may_end_by_itself(driver, plan_for, autojump_clock, clean):
    late = [{"at": 99, "line": "never"}]
    async with driver.launch(plan_for(dial=None, exit=7, clean=clean, console=late), {}) as machine:
        ended = await machine.wait()
        await trio.sleep(200)
        assert [line async for line in machine.console()] == []
    assert (ended.clean, ended.code) == (clean, 0 if clean else 1)


async def test_a_hung_guest_ignores_the_button_and_dies_by_the_handle(driver, plan_for, autojump_clock):
    async with driver.launch(plan_for(dial=None, powerdown=None), {}) as machine:
        await machine.powerdown()
        with trio.move_on_after(1000) as scope:
            await machine.wait()
        assert scope.cancelled_caught
        await driver.release(machine.handle)
        assert not (await machine.wait()).clean
        await driver.release(machine.handle)
    await driver.release(machine.handle)


async def test_nobody_listens(driver, plan_for, autojump_clock):
    async with driver.launch(plan_for(), {}) as machine:
        assert "could not dial" in (await machine.wait()).reason


@pytest.mark.parametrize("reply", [b"\0\0\0\1{", None])
async def test_a_launcher_that_hangs_up_or_talks_nonsense(driver, plan_for, listener, autojump_clock, reply):
    async with driver.launch(plan_for(), {}) as machine:
        async with await listener.accept() as stream:
            await receive(stream)
            if reply:
                await stream.send_all(reply)
                assert await stream.receive_some() == b""
        with trio.move_on_after(10) as scope:
            await machine.wait()
        assert scope.cancelled_caught


async def test_plans_without_a_channel_or_config_are_refused(plan_for):
    with pytest.raises(DriverError):
        plan_for(transport="vsock")
    with pytest.raises(DriverError):
        plan_for(config=False)


async def test_errors_of_the_user_come_out_as_they_are(driver, plan_for):
    with pytest.raises(ZeroDivisionError):
        async with driver.launch(plan_for(dial=None), {}):
            raise ZeroDivisionError
