"""A virtio-serial port: whoever opens it, and what the one before left there. A socket plays QEMU at first;
the real one, with real agents that die, comes after."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from kenaz_drivers.contract import Disk, LaunchRequest, Machine
from kenaz_drivers.qemu.driver import QemuDriver
from kenaz_engine.channel.framing import MARK
from kenaz_engine.channel.policy import ToolPolicy
from kenaz_engine.channel.relay import Bye, ChannelEnd, Expected, GuestChannel, Lost, handshake
from kenaz_engine.channel.transports.unix import dial_unix
from kenaz_engine.channel.transports.virtio_serial import SerialPort, listen_serial
from kenaz_engine.images.catalog import default_cache, find_image
from kenaz_engine.images.config_disk import environment_file, write_config_disk
from kenaz_engine.images.disks import create_disk
from kenaz_engine.images.errors import ImageError
from kenaz_engine.images.manifest import Image
from kenaz_engine.session.endpoint import watch_port


class Whole(trio.abc.Stream):
    """A port and its first writer as one: closing what a writer has leaves the port open."""

    def __init__(self, port: SerialPort, stream: trio.abc.Stream) -> None:
        self._port, self._stream = port, stream

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return bytes(await self._stream.receive_some(max_bytes))

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            await self._port.aclose()


class Port:
    """The port, the hypervisor's side of its socket, and the stream of its first writer."""

    def __init__(self, port: SerialPort, guest: trio.SocketStream, first: trio.abc.Stream) -> None:
        self.port, self.guest, self.first = port, guest, first

    async def next(self) -> trio.abc.Stream:
        await self.first.aclose()
        self.first = (await self.port.accept()).stream
        return self.first


@pytest.fixture
async def port(tmp_path: Path) -> AsyncIterator[Port]:
    tmp_path.chmod(0o700)
    port = listen_serial(tmp_path / "c")
    assert port.address == f"unix:{tmp_path / 'c'}"
    async with await dial_unix(tmp_path / "c") as guest:
        yield Port(port, guest, (await port.accept()).stream)
        await port.aclose()
    await port.aclose()


async def test_the_stream_is_one_as_trio_means_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    number = 0

    async def make() -> tuple[trio.abc.Stream, trio.abc.Stream]:
        nonlocal number
        number += 1
        port = listen_serial(tmp_path / str(number))
        guest = await dial_unix(tmp_path / str(number))
        stream = (await port.accept()).stream

        return Whole(port, stream), guest

    await trio.testing.check_two_way_stream(make, None)


async def test_nobody_else_can_dial_once_the_hypervisor_has(port: Port, tmp_path: Path) -> None:
    assert not (tmp_path / "c").exists()


async def test_a_writer_that_closes_is_read_to_its_end(port: Port) -> None:
    await port.guest.send_all(MARK + b"hello")
    assert await port.first.receive_some() == MARK + b"hello"
    await port.guest.send_all(b"last words")
    port.port.guest_closed()
    assert await port.first.receive_some() == b"last words"
    assert await port.first.receive_some() == b""
    assert await port.first.receive_some() == b""


async def test_whoever_waits_hears_of_the_end(port: Port) -> None:
    await port.guest.send_all(MARK)
    assert await port.first.receive_some() == MARK
    heard: list[bytes] = []

    async def read() -> None:
        heard.append(await port.first.receive_some())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        assert heard == []
        port.port.guest_closed()
    assert heard == [b""]


async def test_a_port_that_was_opened_and_closed_in_silence_means_nothing(port: Port) -> None:
    port.port.guest_closed()
    await port.guest.send_all(MARK + b"hello")
    assert await port.first.receive_some() == MARK + b"hello"


async def test_a_close_is_not_that_of_the_writer_who_has_begun_since(port: Port) -> None:
    await port.guest.send_all(MARK + b"one")
    assert await port.first.receive_some() == MARK + b"one"
    await port.guest.send_all(b" and its end" + MARK + b"two")
    port.port.guest_closed()
    assert await port.first.receive_some() == b" and its end" + MARK + b"two"
    assert port.port.openings == 2
    await port.guest.send_all(b" goes on")
    assert await port.first.receive_some() == b" goes on"


@pytest.mark.parametrize("cut", range(12))
async def test_what_was_left_before_the_mark_is_dropped_however_it_is_cut(port: Port, cut: int) -> None:
    await port.guest.send_all(MARK + b"one")
    assert await port.first.receive_some() == MARK + b"one"
    stream = await port.next()
    left = b"\0\0\0\x02{}" + b"\0\0" + MARK + b"hello"
    received = b""

    async def read() -> None:
        nonlocal received
        while len(received) < len(MARK + b"hello"):
            received += await stream.receive_some()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await port.guest.send_all(left[:cut])
        await trio.testing.wait_all_tasks_blocked()
        await port.guest.send_all(left[cut:])
    assert received == MARK + b"hello"
    assert port.port.openings == 2


async def test_a_guest_that_writes_no_marks_is_told_by_its_first_bytes(port: Port) -> None:
    await port.guest.send_all(b"one")
    assert await port.first.receive_some() == b"one"
    port.port.guest_closed()
    assert await port.first.receive_some() == b""
    stream = await port.next()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(port.port.next_opening, 1)
        await port.guest.send_all(b"two")
        assert await stream.receive_some() == b"two"
    assert port.port.openings == 2


async def test_the_next_writer_is_for_whoever_asks_when_the_one_before_is_given_up(port: Port) -> None:
    found: list[trio.abc.Stream] = []

    async def ask() -> None:
        found.append((await port.port.accept()).stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        assert found == []
        await port.first.aclose()
        await port.first.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await port.first.receive_some()
    with pytest.raises(trio.ClosedResourceError):
        await port.first.send_all(b"x")
    await found[0].send_all(b"for the next")
    assert await port.guest.receive_some() == b"for the next"


async def test_the_end_of_the_machine_is_the_end_of_the_stream(port: Port) -> None:
    await port.guest.aclose()
    assert await port.first.receive_some() == b""


# The real port: QEMU and the demo image, whose agent is killed


FLOOD_AND_DIE = """
read -r _ _ _ agent _ </proc/$PPID/stat
busybox setsid sh -c "busybox sleep 3; kill -9 $agent" &
busybox yes "$(busybox seq 1 9)"
"""
"""Has the agent write as fast as it can, and kills it, whatever becomes of this command; the agent's own
supervisor starts another."""

DIE_FOR_GOOD = """
busybox sleep 2
read -r _ _ _ agent _ </proc/$PPID/stat
read -r _ _ _ supervisor _ </proc/$agent/stat
kill -9 "$supervisor" "$agent"
"""

SECONDS = 300.0


@pytest.fixture
def image() -> Image:
    try:
        return find_image("demo", "x86_64", default_cache())
    except ImageError:
        pytest.skip("needs the demo image (`make image`)")


@asynccontextmanager
async def real_guest(image: Image) -> AsyncIterator[tuple[Machine, SerialPort]]:
    """A machine of the driver qemu whose agent waits for commands, and the port that it dials."""
    driver = QemuDriver()
    capabilities = await driver.probe("x86_64", {"accel": "tcg"})
    if not capabilities.usable:
        pytest.skip("needs QEMU")
    with tempfile.TemporaryDirectory(prefix="kenaz-") as directory:
        base = Path(directory)
        variables = {
            "KENAZ_SESSION_ID": "s",
            "HARNESS_VM_TOKEN": "t",
            "KENAZ_CHANNEL": "virtio-serial:dev.kenaz.channel",
        }
        write_config_disk(base / "config", {"kenaz.env": environment_file(variables)})
        await create_disk(
            base / "root", "qcow2", base=image.root, base_format=image.root_format, size=1 << 30
        )
        request = LaunchRequest(
            session="s",
            directory=directory,
            runtime=directory,
            cpus=1,
            memory=256 << 20,
            transport="virtio-serial",
            channel=str(base / "c"),
            port=7881,
            capabilities=capabilities,
            kernel=str(image.kernel),
            initrd=str(image.initrd),
            cmdline=image.cmdline,
            disks=(
                Disk("root", str(base / "root"), "qcow2"),
                Disk("config", str(base / "config"), "raw", readonly=True),
            ),
        )
        port = listen_serial(base / "c")
        async with driver.launch(driver.plan(request), {}) as machine, trio.open_nursery() as nursery:
            nursery.start_soon(read_console, machine)
            await machine.ready()
            yield machine, port
            nursery.cancel_scope.cancel()
        await port.aclose()


async def read_console(machine: Machine) -> None:
    async for _ in machine.console():
        pass


async def greet(port: SerialPort) -> GuestChannel:
    expected = Expected(
        session="s", token="t", tools=ToolPolicy([]), capabilities=frozenset({"exec"}), one_stream=True
    )
    return await handshake((await port.accept()).stream, expected)


async def test_what_a_killed_agent_left_in_the_port_does_not_bother_the_next(image: Image) -> None:
    with trio.fail_after(SECONDS):
        async with real_guest(image) as (_machine, port):
            channel = await greet(port)
            flooding = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(channel.run)
                nursery.start_soon(
                    channel.execute, ["sh", "-c", FLOOD_AND_DIE], lambda stream, text: flooding.set()
                )
                await flooding.wait()
                nursery.cancel_scope.cancel()
            # Nobody reads: what the agent wrote, and half of what it was writing, stays on the way.
            await channel.aclose()
            again = await greet(port)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(again.run)
                assert await again.drain(60) == Bye("drained")
                await again.aclose()
            assert port.openings >= 2


async def test_an_agent_that_dies_for_good_shows_as_a_port_that_closes(image: Image) -> None:
    with trio.fail_after(SECONDS):
        async with real_guest(image) as (machine, port):
            channel = await greet(port)
            ends: list[ChannelEnd] = []

            async def run() -> None:
                ends.append(await channel.run())

            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch_port, machine, port)
                nursery.start_soon(channel.execute, ["sh", "-c", DIE_FOR_GOOD], lambda stream, text: None)
                await run()
                nursery.cancel_scope.cancel()
            assert ends == [Lost("the guest closed the channel without a bye")]
            await channel.aclose()
