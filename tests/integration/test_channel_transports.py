"""Listening sockets of the real kinds, as far as this machine has them."""

import errno
import json
import os
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from kenaz_engine.channel.framing import LengthPrefixed
from kenaz_engine.channel.harness import HarnessError, connect_harness
from kenaz_engine.channel.policy import ToolPolicy
from kenaz_engine.channel.relay import Expected, Limits, ServeEnd, handshake
from kenaz_engine.channel.transports import TransportError, unix, vsock
from kenaz_engine.channel.transports.unix import SUN_PATH, listen_unix
from kenaz_engine.channel.transports.vsock import (
    BACKLOG,
    FIRST_CID,
    LAST_CID,
    PORT_ANY,
    SET_GUEST_CID,
    SharedPort,
    claim_cid,
    listen_vsock,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path / "c.sock"


# UNIX


async def test_who_dials_is_accepted_and_described(path: Path) -> None:
    listener = listen_unix(path)
    assert listener.address == f"unix:{path}"
    assert path.lstat().st_mode & 0o777 == 0o600
    async with await trio.open_unix_socket(path) as dialled:
        accepted = await listener.accept()
        assert accepted.peer == f"uid {os.geteuid()} pid {os.getpid()}"
        await dialled.send_all(b"hello")
        assert await accepted.stream.receive_some() == b"hello"
        await accepted.stream.aclose()
    await listener.aclose()
    assert not path.exists()
    await listener.aclose()


async def test_where_a_socket_that_is_not_bound_has_no_mode_its_file_is_given_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, mode: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fchmod", refuse)  # as on macOS
    monkeypatch.setattr(sys, "platform", "darwin")
    listener = listen_unix(path)
    assert path.lstat().st_mode & 0o777 == 0o600
    await listener.aclose()


async def test_the_accepted_stream_is_one_as_trio_means_it(path: Path) -> None:
    listener = listen_unix(path)

    async def make() -> tuple[trio.abc.Stream, trio.abc.Stream]:
        dialled = await trio.open_unix_socket(path)
        return dialled, (await listener.accept()).stream

    await trio.testing.check_two_way_stream(make, None)
    await listener.aclose()


async def test_other_users_are_closed_and_the_wait_goes_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = iter([os.geteuid() + 4711, os.geteuid()])
    monkeypatch.setattr(unix, "_credentials", lambda connected: (next(users), 1))
    listener = listen_unix(path)
    async with await trio.open_unix_socket(path) as stranger, await trio.open_unix_socket(path):
        accepted = await listener.accept()
        assert accepted.peer == f"uid {os.geteuid()} pid 1"
        assert await stranger.receive_some() == b""
        await accepted.stream.aclose()
    await listener.aclose()


async def test_without_credentials_the_directory_decides(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "SO_PEERCRED")
    listener = listen_unix(path)
    async with await trio.open_unix_socket(path):
        accepted = await listener.accept()
        assert accepted.peer == f"uid {os.geteuid()} pid 0"
        await accepted.stream.aclose()
    await listener.aclose()


class OnMac:
    """A connected socket of macOS, as getsockopt(2) tells of its peer."""

    def __init__(self, uid: int, pid: int) -> None:
        self._uid = uid
        self._pid = pid

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        assert level == 0
        if option == 1:
            assert size == 76
            return struct.pack("IIh", 0, self._uid, 2) + bytes(2) + struct.pack("16I", 20, 12, *[0] * 14)
        assert (option, size) == (2, 4)
        if not self._pid:
            raise OSError(errno.ENOTCONN, "gone")
        return struct.pack("i", self._pid)


@pytest.mark.parametrize("peer", [(501, 4711), (0, 1), (501, 0)])
def test_macos_tells_the_peer_otherwise(peer: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(socket, "SO_PEERCRED")
    assert unix._credentials(OnMac(*peer)) == peer  # type: ignore[arg-type]


async def test_whose_user_is_not_told_is_closed_and_the_wait_goes_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [(os.geteuid(), 1)]

    def credentials(connected: Any) -> tuple[int, int]:
        if len(told) == 1:
            told.append(told[0])
            raise OSError(errno.ENOTCONN, "gone")
        return told.pop()

    monkeypatch.setattr(unix, "_credentials", credentials)
    listener = listen_unix(path)
    async with await trio.open_unix_socket(path) as unknown, await trio.open_unix_socket(path):
        accepted = await listener.accept()
        assert await unknown.receive_some() == b""
        await accepted.stream.aclose()
    await listener.aclose()


async def test_only_what_was_bound_is_unlinked(path: Path) -> None:
    listener = listen_unix(path)
    path.unlink()
    path.write_text("somebody else's")
    await listener.aclose()
    assert path.exists()


def test_a_path_that_is_too_long_says_so(path: Path) -> None:
    size = SUN_PATH - len(os.fsencode(path.parent)) - 1
    long = path.parent / ("x" * size)
    with pytest.raises(
        TransportError, match=rf"{SUN_PATH} bytes; the system allows {SUN_PATH - 1}"
    ) as caught:
        listen_unix(long)
    assert "XDG_RUNTIME_DIR" in caught.value.hint
    assert not long.exists()


async def test_the_longest_path_is_allowed(path: Path) -> None:
    size = SUN_PATH - len(os.fsencode(path.parent)) - 2
    await listen_unix(path.parent / ("x" * size)).aclose()


def test_a_file_that_exists_is_left_alone(path: Path) -> None:
    path.write_text("mine")
    with pytest.raises(TransportError, match="exists already"):
        listen_unix(path)
    assert path.read_text() == "mine"


def test_a_directory_that_others_may_enter_is_refused(path: Path) -> None:
    path.parent.chmod(0o755)
    with pytest.raises(TransportError, match="others may enter") as caught:
        listen_unix(path)
    assert "chmod 700" in caught.value.hint


def test_a_directory_that_is_not_there_is_one_line(path: Path) -> None:
    with pytest.raises(TransportError, match="No such file or directory"):
        listen_unix(path.parent / "none" / "c.sock")


class Failing:
    """A listening socket whose accept fails in the given ways, then gives a connection."""

    def __init__(self, *errors: int, peers: tuple[Any, ...] = ()) -> None:
        self._errors = list(errors)
        self._peers = list(peers)
        self.given: list[Any] = []

    async def accept(self) -> tuple[Any, Any]:
        await trio.lowlevel.checkpoint()
        if self._errors:
            number = self._errors.pop(0)
            raise OSError(number, os.strerror(number))
        self.given.append(self._peers.pop(0))
        return self.given[-1], None

    def close(self) -> None: ...


async def test_a_connection_that_is_gone_before_it_is_taken_is_passed_over() -> None:
    """The second is how Windows's accept says so."""
    gone = Failing(errno.ECONNABORTED, errno.ECONNRESET, peers=("it",))
    assert await unix.accept_socket(gone) == "it"  # type: ignore[arg-type]


@pytest.mark.parametrize(("number", "hint"), [(errno.EMFILE, "ulimit"), (errno.EINVAL, "")])
async def test_an_accept_that_fails_is_one_line(number: int, hint: str) -> None:
    with pytest.raises(TransportError, match="cannot accept") as caught:
        await unix.accept_socket(Failing(number))  # type: ignore[arg-type]
    assert hint in caught.value.hint


# The harness's socket


async def test_guest_and_harness_over_real_sockets(path: Path) -> None:
    expected = Expected(session="s", token="t", tools=ToolPolicy(["*"]))
    framing = LengthPrefixed()

    def frame(**members: Any) -> bytes:
        return framing.encode(json.dumps(members).encode())

    async def guest() -> None:
        stream = await trio.open_unix_socket(path)
        await stream.send_all(
            frame(kind="hello", protocol=1, session="s", token="t", agent="", build="b", capabilities=[])
        )
        await stream.send_all(frame(kind="prompt", id="p1", text="x" * 1_000_000))
        decoder = LengthPrefixed()
        kinds: list[str] = []
        while data := await stream.receive_some():
            kinds += [json.loads(p)["kind"] for p in decoder.feed(bytes(data))]
        assert kinds == ["welcome", "prompt.result", "bye"]
        await stream.aclose()

    async def harness(server: trio.SocketListener) -> None:
        stream = await server.accept()
        decoder = LengthPrefixed()
        kinds: list[str] = []
        while data := await stream.receive_some():
            for payload in decoder.feed(bytes(data)):
                message = json.loads(payload)
                kinds.append(message["kind"])
                if message["kind"] == "prompt":
                    await stream.send_all(frame(kind="prompt.result", id="p1", text="y" * 1_000_000))
                    await stream.send_all(frame(kind="end"))
        assert kinds == ["session.open", "prompt", "session.close"]
        await stream.aclose()

    listener = listen_unix(path)
    listening = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listening.bind(str(path.with_name("h.sock")))
    listening.listen(1)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery, trio.SocketListener(listening) as server:
            nursery.start_soon(guest)
            nursery.start_soon(harness, server)
            channel = await handshake((await listener.accept()).stream, expected)
            link = await connect_harness(f"unix:{path.with_name('h.sock')}", Limits())
            nursery.start_soon(channel.run)
            nursery.start_soon(link.run)
            assert await channel.serve(link) == ServeEnd("harness")
            await channel.aclose()
            await link.aclose("success")
    await listener.aclose()


@pytest.mark.parametrize("address", ["tcp:1", "unix:", "somewhere"])
async def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(HarnessError, match="not the address") as caught:
        await connect_harness(address, Limits())
    assert "unix:PATH" in caught.value.hint


async def test_a_harness_that_is_not_there_is_one_line(path: Path) -> None:
    with pytest.raises(HarnessError, match="no harness listens"):
        await connect_harness(f"unix:{path}", Limits())
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(path))
    with pytest.raises(HarnessError, match=r"cannot be reached: .*refused"):
        await connect_harness(f"unix:{path}", Limits())


# AF_VSOCK. A listen that succeeds proves nothing about guests; who dials is played by fakes here.


needs_vsock = pytest.mark.skipif(not hasattr(socket, "AF_VSOCK"), reason="no AF_VSOCK on this system")


class FakeConnection:
    """A connection from that address; None: gone again."""

    def __init__(self, address: tuple[int, int] | None) -> None:
        self.type = socket.SOCK_STREAM
        self.closed = False
        self.did_shutdown_SHUT_WR = False
        self._address = address

    def getpeername(self) -> tuple[int, int]:
        if self._address is None:
            raise OSError(errno.ENOTCONN, "not connected")
        return self._address

    def setsockopt(self, *_: Any) -> None: ...

    def close(self) -> None:
        self.closed = True


@needs_vsock
async def test_a_port_is_bound_once_for_a_process_and_another_process_hears_of_it() -> None:
    try:
        listener = listen_vsock(PORT_ANY, cid=42)
    except TransportError as exc:
        pytest.skip(str(exc))
    assert 1024 <= listener.port < PORT_ANY
    assert listener.address == f"vsock:{listener.port}"
    other = listen_vsock(listener.port, cid=43)
    with pytest.raises(TransportError, match="another session of this process has CID 43"):
        listen_vsock(listener.port, cid=43)
    await listener.aclose()
    await listener.aclose()
    with pytest.raises(TransportError, match="listened no more for CID 42"):
        await listener.accept()
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as elsewhere:
        with pytest.raises(OSError, match="already in use"):
            elsewhere.bind((vsock.CID_ANY, listener.port))
        await other.aclose()
        elsewhere.bind((vsock.CID_ANY, listener.port))
        with pytest.raises(TransportError, match="cannot listen") as caught:
            listen_vsock(listener.port, cid=43)
        assert "spec.channel.port" in caught.value.hint
        third = listen_vsock(listener.port, cid=43, or_another=True)
        assert third.port != listener.port
        await third.aclose()


async def test_what_comes_for_another_session_is_put_aside_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock.trio, "SocketStream", lambda connected: connected)
    theirs = [FakeConnection((43, port)) for port in range(BACKLOG + 1)]
    mine = FakeConnection((42, 1))
    shared = SharedPort(Failing(peers=(*theirs, mine)), 7881)  # type: ignore[arg-type]
    first, second = shared.join(42), shared.join(43)
    assert (await first.accept()).stream is mine  # type: ignore[comparison-overlap]
    # A guest that dials without end is put aside for no more than a socket would.
    assert [peer.closed for peer in theirs] == [False] * BACKLOG + [True]
    assert (await second.accept()).stream is theirs[0]  # type: ignore[comparison-overlap]
    await second.aclose()
    assert [peer.closed for peer in theirs] == [False] + [True] * BACKLOG
    await first.aclose()


async def test_a_listener_learns_later_whom_it_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock.trio, "SocketStream", lambda connected: connected)
    early, mine = FakeConnection((42, 1)), FakeConnection((42, 2))
    shared = SharedPort(Failing(peers=(early, mine)), 7881)  # type: ignore[arg-type]
    other, listener = shared.join(43), shared.join(-1)
    with pytest.raises(vsock.TransportError, match="another session of this process has CID 43"):
        listener.expect(43)
    with trio.move_on_after(0):
        await other.accept()
    listener.expect(42)
    assert (await listener.accept()).peer == "cid 42"
    await listener.aclose()
    await other.aclose()


async def test_only_the_expected_guest_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock.trio, "SocketStream", lambda connected: connected)
    loopback, gone, sibling, mine = (
        FakeConnection(address) for address in ((1, 5), None, (43, 5), (42, 1025))
    )
    peers = (loopback, gone, sibling, mine)
    listener = SharedPort(Failing(errno.ECONNABORTED, peers=peers), 7881).join(42)  # type: ignore[arg-type]
    accepted = await listener.accept()
    assert accepted.stream is mine  # type: ignore[comparison-overlap]
    assert accepted.peer == "cid 42"
    assert [peer.closed for peer in peers] == [True, True, True, False]


async def test_a_system_without_vsock_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "AF_VSOCK", raising=False)
    with pytest.raises(TransportError, match="no AF_VSOCK") as caught:
        listen_vsock(7881, cid=3)
    assert "virtio-serial" in caught.value.hint


async def test_a_kernel_without_vsock_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "AF_VSOCK", 9999, raising=False)
    with pytest.raises(TransportError, match="cannot be used"):
        listen_vsock(7881, cid=3)


class Kernel:
    """Grants CIDs as vhost-vsock does."""

    def __init__(self, *taken: int, error: int = errno.EADDRINUSE) -> None:
        self.taken = set(taken)
        self.error = error
        self.asked: list[int] = []

    def ioctl(self, file: int, request: int, argument: bytes) -> int:
        os.fstat(file)
        assert request == SET_GUEST_CID
        (cid,) = struct.unpack("=Q", argument)
        self.asked.append(cid)
        if cid in self.taken or not self.taken:
            raise OSError(self.error, os.strerror(self.error))
        return 0


@pytest.fixture
def device(tmp_path: Path) -> str:
    path = tmp_path / "vhost-vsock"
    path.touch()
    return str(path)


def test_a_taken_cid_leads_to_the_next_and_past_the_end_to_the_first(device: str) -> None:
    kernel = Kernel(LAST_CID - 1, LAST_CID, FIRST_CID)
    claim = claim_cid(device=device, ioctl=kernel.ioctl, first=LAST_CID - 1)
    assert claim.cid == 4
    assert kernel.asked == [LAST_CID - 1, LAST_CID, 3, 4]
    assert not os.get_inheritable(claim.file)
    os.close(claim.file)


def test_the_first_cid_is_drawn_from_the_allowed_ones(device: str) -> None:
    drawn = set()
    for _ in range(20):
        claim = claim_cid(device=device, ioctl=Kernel(1).ioctl)
        os.close(claim.file)
        drawn.add(claim.cid)
    assert len(drawn) > 10
    assert all(FIRST_CID <= cid <= LAST_CID for cid in drawn)


@pytest.mark.parametrize(
    ("error", "text"), [(errno.EADDRINUSE, "none of 4096"), (errno.EFAULT, "cannot be claimed")]
)
def test_a_claim_that_fails_closes_the_device(device: str, error: int, text: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(TransportError, match=text):
        claim_cid(device=device, ioctl=Kernel(error=error).ioctl)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_device_that_is_no_vhost_vsock_is_one_line(device: str) -> None:
    with pytest.raises(TransportError, match="cannot be claimed: Inappropriate ioctl"):
        claim_cid(device=device)


def test_a_device_that_is_not_there_names_the_module(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="No such file") as caught:
        claim_cid(device=str(tmp_path / "none"))
    assert "vhost_vsock" in caught.value.hint
