"""Real virtio-vsock: QEMU, vhost-device-vsock, and the demo image's agent, which dials CID 2."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
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
LAUNCHER = str(Path(sys.executable).with_name("kenaz-launcher"))
BOUND = 120


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
        self.command = [LAUNCHER, "run", spec, "--session-id", "s1", *sets]
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
        refusals: set[str] = set()
        with trio.fail_after(BOUND):
            while True:
                try:
                    stream = await dial_hybrid(uds, 9000)
                    break
                except TransportError as error:  # hung up on until the guest is up and listens
                    refusals.add(str(error))
                    await trio.sleep(0.1)
            assert refusals == {"the guest does not listen on port 9000"}
            heard = bytearray()
            async with stream, trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, said)
                while len(heard) < len(said):
                    heard += await stream.receive_some()
            return bytes(heard)

    with session.start() as running:
        session.until("acquired", resource="vm")
        helper = session.until("acquired", resource="helper.vhost-device-vsock")
        assert trio.run(dial, helper["handle"]["sockets"][1]) == said
        out, _ = running.communicate(timeout=BOUND)
    assert (running.returncode, "peer 2" in out) == (0, True)
    assert session.left() == []
