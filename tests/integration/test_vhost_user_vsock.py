"""Real virtio-vsock: QEMU, vhost-device-vsock, and the demo image's agent, which dials CID 2."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from kenaz_drivers.qemu.probe import find_vsock_daemon
from kenaz_engine.channel.transports import TransportError
from kenaz_engine.channel.transports.hybrid import dial_hybrid
from kenaz_engine.images.catalog import default_cache, find_image
from kenaz_engine.images.errors import ImageError

ROOT = Path(__file__).parents[2]
LAUNCHER = """
import sys
from kenaz_engine.channel import harness
from kenaz_engine.cli.main import main

harness.QUIET = 60.0  # a guest that is slow is not done
sys.exit(main())
"""
BOUND = 120

PIDFD_GETFD = 438
HELPER = "helper.vhost-device-vsock"


def _ready() -> bool:
    try:
        find_image("demo", "x86_64", default_cache())
    except ImageError:
        return False
    return bool(find_vsock_daemon()[0])


pytestmark = pytest.mark.skipif(
    not _ready(), reason="needs the demo image (`make image`) and vhost-device-vsock (`make test` with cargo)"
)


class Session:
    """A session over vhost-user-vsock in a state directory of its own."""

    def __init__(self, base: Path, *words: str, options: tuple[str, ...] = ()) -> None:
        overrides = [
            "spec.driver=qemu",
            "spec.channel.transport=vhost-user-vsock",
            f"spec.workbench.args={json.dumps(words)}",
            *options,
        ]
        sets = [word for override in overrides for word in ("--set", override)]
        spec = str(ROOT / "specs/sessions/hello.yaml")
        self.command = [sys.executable, "-c", LAUNCHER, "run", spec, "--session-id", "s1", *sets]
        runtime = base / "r"
        runtime.mkdir(mode=0o700)
        self.environment = {
            **os.environ,
            "KENAZ_STATE_DIR": str(base / "s"),
            "XDG_RUNTIME_DIR": str(runtime),
            "NO_COLOR": "1",
        }
        self.base = base
        self.directory = base / "s/sessions/s1"

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True, env=self.environment)

    def run(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command, capture_output=True, text=True, timeout=BOUND, env=self.environment, check=False
        )

    def records(self, *kinds: str) -> list[dict[str, Any]]:
        with contextlib.suppress(OSError, ValueError):
            lines = (self.directory / "journal.jsonl").read_text().splitlines()
            return [r for r in map(json.loads, lines) if not kinds or r["kind"] in kinds]
        return []

    def until(self, kind: str, **fields: Any) -> dict[str, Any]:
        deadline = time.monotonic() + BOUND
        while time.monotonic() < deadline:
            for record in self.records(kind):
                if fields.items() <= record.items():
                    return record
            time.sleep(0.02)
        raise AssertionError(f"no {kind} with {fields}")

    def left(self) -> list[str]:
        """Files and processes that are still there."""
        kept = {"journal.jsonl", "console.log", ".creating", "lock"}
        files = [str(path) for path in self.base.rglob("*") if not path.is_dir() and path.name not in kept]
        mark = str(self.base).encode()
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = process.read_bytes()
                files += [words.decode()] if mark in words else []
        return files


@pytest.fixture
def base() -> Iterator[Path]:
    """Short, because a socket's path has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="kenaz-") as directory:
        yield Path(directory)


def test_a_guest_dials_by_vsock_and_all_is_given_back(base: Path) -> None:
    session = Session(base, "once:exit:7", "demo", options=("spec.lifecycle=standard-reconnect",))
    done = session.run()
    assert (done.returncode, done.stderr) == (0, "")
    assert "session s1: qemu (tcg), vhost-user-vsock, image demo" in done.stdout
    # An agent that dies is a connection that ends, and the next one dials anew.
    assert "the guest is back" in done.stdout
    assert "fs.read answered; fs.delete refused (denied)" in done.stdout
    made = {r["id"]: r for r in session.records("intent")}
    names = [r["resource"] for r in made.values()]
    helper = names.index("helper.vhost-device-vsock") + 1
    assert names.index("socket") + 1 in made[helper]["uses"]
    assert helper in made[names.index("vm") + 1]["uses"]
    argv = made[names.index("vm") + 1]["intent"]["argv"]
    assert any(word.startswith("memory-backend-memfd,") for word in argv)
    assert "vhost-user-vsock-pci,chardev=vsock" in argv
    released = [r["resource"] for r in session.records("released")]
    assert released.index("vm") < released.index("helper.vhost-device-vsock") < released.index("socket")
    assert session.left() == []


@pytest.mark.parametrize(
    ("state", "verdict"),
    [("connecting", "VM exited before it dialled"), ("running", "VM exited while serving")],
)
def test_a_daemon_that_dies_ends_the_session_with_a_clear_line(base: Path, state: str, verdict: str) -> None:
    session = Session(base, "idle")
    with session.start() as running:
        session.until("entered", state=state)
        pid = session.until("acquired", resource="helper.vhost-device-vsock")["handle"]["pid"]
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        out, _ = running.communicate(timeout=BOUND)
    assert running.returncode == 1
    assert time.monotonic() - killed < 20
    assert f"failed: {verdict}: SIGKILL killed vhost-device-vsock" in out
    assert session.left() == []


def test_a_daemon_that_takes_its_arguments_for_wrong_and_exits_with_0_is_quoted(base: Path) -> None:
    daemon = base / "daemon"
    daemon.write_text(f'#!/bin/sh\nexec {find_vsock_daemon()[0]} --uds-path=x "$@" --guest-cid=many\n')
    daemon.chmod(0o755)
    session = Session(base, "idle", options=(f"spec.driverOptions.qemu.vsockDaemon={daemon}",))
    done = session.run()
    daemon.unlink()
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("failed: VM did not start")]
    assert "vhost-device-vsock ended with code" in line
    assert session.left() == []


def test_a_daemon_that_is_not_there_is_told_before_anything_is_made(base: Path) -> None:
    session = Session(base, "idle", options=("spec.driverOptions.qemu.vsockDaemon=/none",))
    done = session.run()
    assert done.returncode == 3
    assert "has no transport vhost-user-vsock here: /none is no program" in done.stderr
    assert "cargo install --locked --version" in done.stderr
    assert not session.directory.exists()


def test_a_launcher_that_is_killed_takes_the_daemon_with_it(base: Path) -> None:
    session = Session(base, "idle")
    with session.start() as running:
        session.until("entered", state="connecting")
        pid = session.until("acquired", resource="helper.vhost-device-vsock")["handle"]["pid"]
        running.kill()
    deadline = time.monotonic() + BOUND
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


ECHO = """
import socket
with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listening:
    listening.bind((socket.VMADDR_CID_ANY, 9000))
    listening.listen()
    print("listening", flush=True)
    connected, peer = listening.accept()
    with connected:
        print("peer", peer[0], flush=True)
        while data := connected.recv(65536):
            connected.sendall(data)
"""
"""What the guest runs: answers whoever dials its port 9000 with what was said."""


def test_the_host_dials_a_port_of_the_guest_through_the_daemon(base: Path) -> None:
    session = Session(
        base,
        *("python3.11", "-c", ECHO),
        options=("spec.lifecycle=ephemeral-exec", "spec.timeouts={running: 60s}"),
    )
    said = os.urandom(1 << 18)

    async def dial(uds: str) -> bytes:
        with trio.fail_after(BOUND):
            with pytest.raises(TransportError, match="the guest does not listen on port 9001"):
                await dial_hybrid(uds, 9001)
            heard = bytearray()
            async with await dial_hybrid(uds, 9000) as stream, trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, said)
                while len(heard) < len(said):
                    heard += await stream.receive_some()
            return bytes(heard)

    with session.start() as running:
        helper = session.until("acquired", resource=HELPER)
        session.until("channel", message="exec.output")  # not before: see what `hybrid` says of this daemon
        assert trio.run(dial, helper["handle"]["sockets"][1]) == said
        out, _ = running.communicate(timeout=BOUND)
    assert (running.returncode, "peer 2" in out) == (0, True)
    assert session.left() == []


FLOOD = "import sys\nwhile True: sys.stdout.write('\\0' * 99_991)"
"""Six bytes of JSON for each: frames of more than a machine writes at once."""


def of_the_channel(pid: int) -> socket.socket | None:
    """Another descriptor of that socket of a process of ours in which much waits to be read."""
    process = os.pidfd_open(pid)
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            own = ctypes.CDLL(None).syscall(PIDFD_GETFD, process, int(name), 0)
            if own < 0:
                continue
            with contextlib.suppress(OSError):  # no socket, or one that listens
                if struct.unpack("i", fcntl.ioctl(own, termios.FIONREAD, bytes(4)))[0] >= 1 << 16:
                    return socket.socket(fileno=own)
            os.close(own)
    finally:
        os.close(process)
    return None


def stopped_within_a_frame(launcher: int) -> socket.socket:
    """Stops it until what waits for it ends within a frame, and no more comes. Returns its channel.

    Where the socket happens to be full at the end of a frame, it takes another try."""
    soon = time.monotonic() + BOUND
    while True:
        assert time.monotonic() < soon
        os.kill(launcher, signal.SIGSTOP)
        while (channel := of_the_channel(launcher)) is None:
            assert time.monotonic() < soon
            time.sleep(0.02)
        before = b""
        while (said := peek(channel)) != before:
            before = said
            time.sleep(1)
        if is_cut(said):
            return channel
        channel.close()
        os.kill(launcher, signal.SIGCONT)
        time.sleep(0.05)  # or it is stopped again before it has run at all


def peek(channel: socket.socket) -> bytes:
    return channel.recv(1 << 22, socket.MSG_PEEK)


def is_cut(said: bytes) -> bool:
    """Whether that ends within a frame. It may begin within one, too."""
    return not said.endswith(b'"}')


@pytest.mark.parametrize(
    "transport", ["virtio-serial", pytest.param("vhost-user-vsock", marks=pytest.mark.slow)]
)
def test_a_frame_that_is_cut_by_the_death_of_its_machine(base: Path, transport: str) -> None:
    """The launcher is stopped until the machine waits within a frame; then the machine is killed."""
    session = Session(
        base,
        *("python3.11", "-c", FLOOD),
        options=("spec.lifecycle=ephemeral-exec", f"spec.channel.transport={transport}"),
    )
    with session.start() as running:
        session.until("channel", message="exec.output")
        channel = stopped_within_a_frame(running.pid)
        os.kill(session.until("acquired", resource="vm")["handle"]["pid"], signal.SIGKILL)
        ended = select.poll()
        ended.register(channel, select.POLLRDHUP)
        assert ended.poll(BOUND * 1000)
        assert is_cut(peek(channel))
        channel.close()
        os.kill(running.pid, signal.SIGCONT)
        out, _ = running.communicate(timeout=BOUND)
    assert running.returncode == 1
    assert "failed: VM exited before the command was done: SIGKILL killed QEMU" in out
    whole = [r for r in session.records("channel") if r.get("message") == "exec.output"]
    assert {r["outcome"] for r in whole} == {"taken"}
    assert session.left() == []


STRANGER = """
import json, socket, sys
hello = {"kind": "hello", "protocol": 1, "session": sys.argv[1], "token": sys.argv[2]}
data = json.dumps({**hello, "agent": "", "build": "", "capabilities": []}).encode()
for cid in map(int, sys.argv[3:]):
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as dialling:
        dialling.settimeout(10)
        try:
            dialling.connect((cid, 7881))
            dialling.sendall(len(data).to_bytes(4, "big") + data)
            answer = json.loads(dialling.recv(4096)[4:])
            print(cid, answer["kind"], answer["code"], flush=True)
        except OSError as error:
            print(cid, "unreached", flush=True)
"""
"""Says the hello of another session to whoever hears."""


@pytest.mark.slow
def test_a_machine_reaches_no_session_but_its_own(base: Path) -> None:
    """Two machines at once. One knows all of the other's session, and says so to every CID there may be."""
    other = Session(base, "idle")
    with other.start() as serving:
        other.until("entered", state="running")
        config = (other.directory / "config.raw").read_bytes()
        token = re.search(rb'HARNESS_VM_TOKEN="([^"]+)"', config)[1].decode()  # type: ignore[index]
        (base / "2").mkdir()
        session = Session(
            base / "2",
            *("python3.11", "-c", STRANGER, "s1", token, "1", "2", "3", "4", "5", "42"),
            options=("spec.lifecycle=ephemeral-exec",),
        )
        done = session.run()
        assert done.returncode == 0, done.stdout
        # The daemon of this machine connects to this session's socket, which has its guest already.
        assert "2 refused already_connected" in done.stdout
        assert done.stdout.count("unreached") == 5
        daemons = [
            next(r["intent"]["argv"] for r in one.records("intent") if r["resource"] == HELPER)
            for one in (session, other)
        ]
        # Both are CID 3, each to its own daemon with its own sockets.
        assert set(daemons[0][1:]).isdisjoint(daemons[1][1:])
        serving.send_signal(signal.SIGINT)
        out, _ = serving.communicate(timeout=BOUND)
    heard = [r for r in other.records("channel") if r["direction"] == "from-guest"]
    assert [r["message"] for r in heard] == ["hello", "bye"]
    assert "nothing left behind" in out
    assert session.left() == []


# What vhost-device-vsock 0.3.0 does otherwise than a kernel, and why the transport is as it is.

TRAPS = """
import errno, socket, time
def dialling(port):
    made = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    made.settimeout(60)
    try:
        made.connect((2, port))
    except OSError as error:
        return errno.errorcode[error.errno]
    return made
print("nobody:", dialling(9009), flush=True)
half = dialling(9001)
half.sendall(b"before")
half.shutdown(socket.SHUT_WR)
print("after the half close:", half.recv(5), flush=True)
half.close()
with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listening:
    listening.bind((socket.VMADDR_CID_ANY, 9000))
    listening.listen()
    dialling(9002).close()
    connected, _ = listening.accept()
    print("first words:", connected.recv(100), flush=True)
"""


@pytest.fixture(scope="module")
def traps() -> Iterator[dict[str, Any]]:
    """What the guest saw (`guest`) and what the host did, from one machine."""
    with tempfile.TemporaryDirectory(prefix="kenaz-") as directory:
        session = Session(
            Path(directory),
            *("python3.11", "-c", TRAPS),
            options=("spec.lifecycle=ephemeral-exec", "spec.timeouts={running: 60s}"),
        )
        seen: dict[str, Any] = {}
        with session.start() as running:
            uds = session.until("acquired", resource=HELPER)["handle"]["sockets"][1]
            listeners = {port: socket.socket(socket.AF_UNIX) for port in (9001, 9002)}
            for port, listening in listeners.items():
                listening.settimeout(BOUND)
                listening.bind(f"{uds}_{port}")
                listening.listen()
            half, _ = listeners[9001].accept()
            with half:
                seen["before"] = half.recv(100)
                half.settimeout(1)
                try:
                    seen["half close"] = half.recv(100)
                except TimeoutError:
                    seen["half close"] = None
                half.sendall(b"still")
                half.settimeout(BOUND)
                seen["full close"] = half.recv(100)
            listeners[9002].accept()[0].close()  # the guest listens now
            with socket.socket(socket.AF_UNIX) as dialled:
                dialled.settimeout(BOUND)
                dialled.connect(uds)
                dialled.sendall(b"CONNECT 9000\nlost")
                seen["answer"] = dialled.recv(100)
                dialled.sendall(b"kept")
                out, _ = running.communicate(timeout=BOUND)
            for listening in listeners.values():
                listening.close()
        seen["guest"] = out
        yield seen


@pytest.mark.slow
def test_a_dial_that_nobody_hears_is_not_refused_and_ends_by_its_time(traps: dict[str, Any]) -> None:
    assert "nobody: ETIMEDOUT" in traps["guest"]


@pytest.mark.slow
def test_a_half_close_does_not_reach_the_host_and_a_full_one_does(traps: dict[str, Any]) -> None:
    assert (traps["before"], traps["half close"], traps["full close"]) == (b"before", None, b"")
    assert "after the half close: b'still'" in traps["guest"]


@pytest.mark.slow
def test_what_follows_connect_before_its_answer_is_lost(traps: dict[str, Any]) -> None:
    assert traps["answer"] == b"OK 9000\n"
    assert "first words: b'kept'" in traps["guest"]


def test_the_daemon_exits_with_0_where_its_arguments_are_wrong() -> None:
    command = [find_vsock_daemon()[0], "--guest-cid=3", "--socket=x"]  # and no path for its sockets
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    assert (done.returncode, done.stdout[:24]) == (0, "Error parsing arguments:")
