"""A port behind two secrets: who is heard on it, and whom one believes. It is the same on every system."""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from kenaz_drivers.host import PATIENCE, dial_loopback
from kenaz_engine.channel.harness import connect_harness
from kenaz_engine.channel.protocol import Limits
from kenaz_engine.channel.transports import Accepted, TransportError, virtio_serial
from kenaz_engine.channel.transports.local import require_private_directories
from kenaz_engine.channel.transports.loopback import CALLERS, LoopbackListener, listen_loopback, listen_owned

OPEN: list[trio.abc.Stream] = []
"""What the tests have dialled and been given: closed with the listener."""


@asynccontextmanager
async def listening(directory: Path) -> AsyncIterator[tuple[LoopbackListener, Path]]:
    path = directory / "c"
    listener = listen_loopback(path)
    try:
        yield listener, path
    finally:
        while OPEN:
            await trio.aclose_forcefully(OPEN.pop())
        await listener.aclose()
        assert not path.exists()


async def dial(path: Path, *, says: bytes = b"") -> trio.SocketStream:
    """A caller that knows the port, and says what it likes."""
    stream = await trio.open_tcp_stream("127.0.0.1", json.loads(path.read_bytes())["port"])
    OPEN.append(stream)
    if says:
        await stream.send_all(says)
    return stream


async def accepted(listener: LoopbackListener, path: Path) -> tuple[Accepted, trio.SocketStream]:
    """The two ends of a connection by somebody who has read the file."""
    ends: dict[str, Any] = {}

    async def dialled() -> None:
        ends["theirs"] = await dial_loopback(path)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(dialled)
        ends["ours"] = await listener.accept()
    OPEN.extend((ends["ours"].stream, ends["theirs"]))
    return ends["ours"], ends["theirs"]


async def test_who_can_read_the_file_is_heard(tmp_path: Path) -> None:
    async with listening(tmp_path) as (listener, path):
        assert listener.address == f"loopback:{path}"
        if sys.platform != "win32":
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        ours, theirs = await accepted(listener, path)
        assert "knew the secret" in ours.peer
        await theirs.send_all(b"from there")
        assert await ours.stream.receive_some() == b"from there"
        await ours.stream.send_all(b"from here")
        assert await theirs.receive_some() == b"from here"


@pytest.mark.parametrize("said", [b"secret\n", b"\n", b"x" * 200, b"\xff\n"])
async def test_who_says_something_else_is_not_answered(tmp_path: Path, said: bytes) -> None:
    async with listening(tmp_path) as (listener, path):
        stranger = await dial(path, says=said)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.accept)
            with trio.fail_after(5), suppress(trio.BrokenResourceError):  # closed with something unread
                assert await stranger.receive_some() == b""
            nursery.cancel_scope.cancel()


async def test_what_follows_the_secret_is_for_whoever_accepts(tmp_path: Path) -> None:
    async with listening(tmp_path) as (listener, path):
        ask = json.loads(path.read_bytes())["ask"].encode()
        await dial(path, says=ask + b"\nand more")
        async with (await listener.accept()).stream as stream:
            assert await stream.receive_some() == b"and more"


async def test_who_says_nothing_holds_nobody_up(tmp_path: Path) -> None:
    async with listening(tmp_path) as (listener, path):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.accept)
            for _ in range(CALLERS + 3):
                await dial(path)
            nursery.cancel_scope.cancel()
        with trio.fail_after(PATIENCE / 2):
            for _ in range(3):
                await accepted(listener, path)


async def test_one_that_is_about_to_prove_itself_is_not_lost_when_another_is_given(tmp_path: Path) -> None:
    async with listening(tmp_path) as (listener, path):
        ask = json.loads(path.read_bytes())["ask"].encode()
        slow = await dial(path, says=ask[:10])
        await accepted(listener, path)
        await slow.send_all(ask[10:] + b"\n")
        with trio.fail_after(5):
            async with (await listener.accept()).stream as stream:
                await stream.send_all(b"welcome")
                assert b"\n" in await slow.receive_some()


async def test_who_has_proven_itself_and_is_gone_ends_no_wait(tmp_path: Path) -> None:
    async with listening(tmp_path) as (listener, path):
        ask = json.loads(path.read_bytes())["ask"].encode()
        callers = [await dial(path, says=ask + b"\n") for _ in range(3)]
        first = await listener.accept()
        OPEN.append(first.stream)
        for caller in callers:
            if caller.socket.getsockname() != first.stream.socket.getpeername():
                caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
                caller.socket.close()
        with trio.fail_after(5):
            _, theirs = await accepted(listener, path)
            await theirs.send_all(b"x")


async def test_who_says_nothing_is_given_up(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with listening(tmp_path) as (listener, path):
        stranger = await dial(path)
        with trio.move_on_after(PATIENCE + 1) as scope:
            await listener.accept()
        assert scope.cancelled_caught
        assert await stranger.receive_some() == b""


async def test_a_listener_that_is_closed_says_so(tmp_path: Path) -> None:
    async with listening(tmp_path) as (listener, _), trio.open_nursery() as nursery:

        async def accept() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await listener.accept()

        nursery.start_soon(accept)
        await trio.testing.wait_all_tasks_blocked()
        await listener.aclose()


async def test_somebody_else_who_has_the_port_since_is_not_believed(tmp_path: Path) -> None:
    """A launcher was killed, its file is still there, and another program was given its port."""
    path = tmp_path / "c"
    thief = socket.create_server(("127.0.0.1", 0))
    path.write_text(json.dumps({"port": thief.getsockname()[1], "ask": "a" * 43, "answer": "b" * 43}))
    taken = trio.SocketListener(trio.socket.from_stdlib_socket(thief))

    async def answers(word: bytes) -> None:
        async with await taken.accept() as stream:
            await stream.send_all(word)

    for word in (b"a" * 43 + b"\n", b"{}\n", b""):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answers, word)
            with pytest.raises(ConnectionAbortedError, match="does not know the secret"):
                await dial_loopback(path)
    await taken.aclose()


async def test_where_nobody_listens_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with pytest.raises(FileNotFoundError):
        await dial_loopback(path)
    path.touch()
    with pytest.raises(FileNotFoundError, match="nothing is written"):
        await dial_loopback(path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path.write_text(json.dumps({"port": port, "ask": "a", "answer": "b"}))
    with pytest.raises(ConnectionRefusedError):
        await dial_loopback(path)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"port": "1", "ask": "", "answer": ""}', '{"port": 0, "ask": "a", "answer": "b"}'],
)
async def test_a_file_of_something_else_is_no_address(tmp_path: Path, text: str) -> None:
    (tmp_path / "c").write_text(text)
    with pytest.raises(OSError, match="names no port and secrets"):
        await dial_loopback(tmp_path / "c")


async def test_a_file_that_is_there_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("somebody's")
    with pytest.raises(TransportError, match="exists already"):
        listen_loopback(tmp_path / "c")
    assert (tmp_path / "c").read_text() == "somebody's"
    with pytest.raises(TransportError, match="cannot listen"):
        listen_loopback(tmp_path / "none" / "c")


async def test_a_file_that_is_another_s_by_now_stays(tmp_path: Path) -> None:
    listener = listen_loopback(tmp_path / "c")
    os.rename(tmp_path / "c", tmp_path / "moved")  # noqa: PTH104  # the listener's own goes with it
    (tmp_path / "c").write_text("somebody's")
    await listener.aclose()
    assert (tmp_path / "c").read_text() == "somebody's"


async def test_a_harness_can_listen_so(tmp_path: Path) -> None:
    async with listening(tmp_path) as (listener, path), trio.open_nursery() as nursery:

        async def harness() -> None:
            async with (await listener.accept()).stream as stream:
                assert b"session.open" in await stream.receive_some()

        nursery.start_soon(harness)
        link = await connect_harness(f"loopback:{path}", Limits())
        async with trio.open_nursery() as running:
            running.start_soon(link.run)
            link.open("s", "", [])
            assert await link.receive() is None
            await link.aclose("success")
            running.cancel_scope.cancel()


def test_a_python_that_keeps_nobody_out_of_directories_is_refused() -> None:
    require_private_directories((3, 12, 4))
    require_private_directories((3, 13, 0))
    with pytest.raises(TransportError, match="no directory") as caught:
        require_private_directories((3, 12, 3))
    assert "3.12.4" in caught.value.hint


async def test_a_program_that_can_say_no_secret_is_known_by_its_process() -> None:
    """QEMU on Windows: whoever else connects, and were he first, is turned away."""
    owners: dict[int, int] = {}
    listener = listen_owned(lambda here, there: owners.get(here, 0) if there == listener.port else 0)
    assert listener.address == f"tcp:127.0.0.1:{listener.port}"
    stranger = await trio.open_tcp_stream("127.0.0.1", listener.port)
    qemu = await trio.open_tcp_stream("127.0.0.1", listener.port)
    owners |= {stranger.socket.getsockname()[1]: 6, qemu.socket.getsockname()[1]: 7}
    with trio.move_on_after(0.05):
        await listener.accept()
        raise AssertionError("nobody is expected yet")
    listener.expect(7)
    accepted = await listener.accept()
    assert accepted.peer == "process 7"
    with trio.fail_after(5):
        assert await stranger.receive_some() == b""
        await qemu.send_all(b"x")
        assert await accepted.stream.receive_some() == b"x"
    for stream in (stranger, qemu, accepted.stream):
        await stream.aclose()
    await listener.aclose()


async def test_a_serial_port_can_be_such_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = listen_owned(lambda here, there: 7)
    monkeypatch.setattr(virtio_serial, "listen_owned", lambda: listener)
    port = virtio_serial.listen_serial_port()
    assert port.port_address == f"127.0.0.1:{listener.port}"
    port.expect(7)
    async with await trio.open_tcp_stream("127.0.0.1", listener.port) as qemu:
        await qemu.send_all(b"x")
        async with (await port.accept()).stream as stream:
            assert await stream.receive_some() == b"x"
    await port.aclose()
