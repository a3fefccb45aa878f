"""Sockets that the launcher dials, and those of vfkit; the other side is played by real sockets here.

The real vhost-device-vsock is in test_vhost_user_vsock.py, a real kernel in test_kernel_vsock.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from kenaz_engine.channel.transports import TransportError
from kenaz_engine.channel.transports.hybrid import dial_hybrid, guest_path, listen_hybrid
from kenaz_engine.channel.transports.unix import UnixListener, dial_unix, listen_unix
from kenaz_engine.channel.transports.vfkit import clear_vfkit, dial_vfkit, listen_vfkit

MakeStreams = Callable[[], Awaitable[tuple[trio.abc.Stream, trio.abc.Stream]]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path / "v"


async def read_line(stream: trio.abc.Stream) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += await stream.receive_some(1)
    return line


async def device(listener: UnixListener, answer: bytes, *, heard: list[bytes]) -> trio.abc.Stream:
    """What Firecracker does at its socket: one connection that asked for a port."""
    stream = (await listener.accept()).stream
    heard.append(await read_line(stream))
    await stream.send_all(answer)
    return stream


def maker(listener: UnixListener, path: Path) -> MakeStreams:
    async def make() -> tuple[trio.abc.Stream, trio.abc.Stream]:
        found: list[trio.abc.Stream] = []

        async def serve() -> None:
            found.append(await device(listener, b"OK 1073741824\n", heard=[]))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            dialled = await dial_hybrid(path, 52)
        return dialled, found[0]

    return make


async def test_a_guest_that_dials_is_connected_to_the_path_of_its_port(path: Path) -> None:
    listener = listen_hybrid(path, 7881)
    assert guest_path(path, 7881) == f"{path}_7881"

    async def make() -> tuple[trio.abc.Stream, trio.abc.Stream]:
        dialled = await dial_unix(f"{path}_7881")
        return dialled, (await listener.accept()).stream

    await trio.testing.check_two_way_stream(make, None)
    await listener.aclose()


async def test_a_stream_to_a_port_of_the_guest_is_one_as_trio_means_it(path: Path) -> None:
    listener = listen_unix(path)
    await trio.testing.check_two_way_stream(maker(listener, path), None)
    await listener.aclose()


async def test_the_line_comes_in_one_piece_and_nothing_of_the_answer_is_lost(path: Path) -> None:
    listener = listen_unix(path)
    heard: list[bytes] = []

    async def answer() -> None:
        await (await device(listener, b"OK 52\nfirst words", heard=heard)).aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        stream = await dial_hybrid(path, 52)
        assert await stream.receive_some() == b"first words"
        await stream.aclose()
    assert heard == [b"CONNECT 52\n"]
    await listener.aclose()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "does not listen on port 52"),
        (b"OK", "no vsock device"),
        (b"OK many\n", "no vsock device"),
        (b"HTTP/1.1 400 Bad Request\r\n", "no vsock device"),
        (b"O" * 100, "no vsock device"),
    ],
)
async def test_an_answer_that_is_none_is_one_line(path: Path, answer: bytes, said: str) -> None:
    listener = listen_unix(path)

    async def refuse() -> None:
        await (await device(listener, answer, heard=[])).aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(refuse)
        with pytest.raises(TransportError, match=said):
            await dial_hybrid(path, 52)
    await listener.aclose()


async def test_a_device_that_does_not_answer_is_waited_for_no_longer_than_told(path: Path) -> None:
    listener = listen_unix(path)
    with pytest.raises(TransportError, match=r"no answer about port 52 within 0\.05 s"):
        await dial_hybrid(path, 52, deadline=0.05)
    await listener.aclose()


async def test_a_device_that_hangs_up_at_once_is_one_line(path: Path) -> None:
    """As vhost-device-vsock does while the guest's driver is not up."""
    listener = listen_unix(path)

    async def hang_up() -> None:
        await trio.aclose_forcefully((await listener.accept()).stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hang_up)
        with pytest.raises(TransportError, match="does not listen on port 52"):
            await dial_hybrid(path, 52)
    await listener.aclose()


async def test_a_device_that_is_not_there_is_one_line(path: Path) -> None:
    with pytest.raises(TransportError, match="cannot be dialled: No such file"):
        await dial_hybrid(path, 52)


# vfkit


async def test_vfkit_connects_for_a_guest_that_dials(path: Path) -> None:
    listener = listen_vfkit(path)

    async def make() -> tuple[trio.abc.Stream, trio.abc.Stream]:
        dialled = await dial_unix(path)
        return dialled, (await listener.accept()).stream

    await trio.testing.check_two_way_stream(make, None)
    await listener.aclose()


def test_a_path_that_vfkit_cannot_be_told_is_refused(path: Path) -> None:
    with pytest.raises(TransportError, match="no path with a comma"):
        listen_vfkit(path.parent / "a,b")


async def test_the_socket_of_vfkit_is_waited_for(path: Path) -> None:
    made: list[UnixListener] = []

    async def vfkit() -> None:
        made.append(listen_unix(path))
        async with (await made[0].accept()).stream as stream:
            await stream.send_all(b"from the guest")

    async with trio.open_nursery() as nursery:

        async def dial() -> None:
            async with await dial_vfkit(path, deadline=10) as stream:
                assert await stream.receive_some() == b"from the guest"

        nursery.start_soon(dial)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(vfkit)
    await made[0].aclose()


async def test_a_socket_that_vfkit_never_makes_is_one_line(path: Path) -> None:
    with pytest.raises(TransportError, match=r"vfkit made no socket there within 0\.05 s"):
        await dial_vfkit(path, deadline=0.05)


async def test_a_socket_that_may_not_be_dialled_is_not_waited_for(path: Path) -> None:
    with pytest.raises(TransportError, match="Not a directory"):
        path.touch()
        await dial_vfkit(path / "s", deadline=60)


async def test_what_a_vfkit_left_is_removed_and_nothing_else(path: Path) -> None:
    clear_vfkit(path)
    listener = listen_unix(path)
    clear_vfkit(path)
    assert not path.exists()
    await listener.aclose()
    path.write_text("mine")
    with pytest.raises(TransportError, match="is no socket"):
        clear_vfkit(path)
    assert path.read_text() == "mine"
