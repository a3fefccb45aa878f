"""A whole session of Hyper-V: the real engine and driver, and stand-ins for PowerShell and AF_HYPERV."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio

import kenaz_engine.guest
from kenaz_engine.channel.harness import DemoHarness
from kenaz_engine.channel.transports import TransportError
from kenaz_engine.channel.transports.unix import UnixListener, listen_unix
from kenaz_engine.images.config_disk import write_config_disk
from kenaz_engine.session import activities, endpoint
from kenaz_engine.session.launch import Result, Session
from kenaz_engine.session.leftovers import leftovers
from kenaz_engine.session.prepare import prepare
from kenaz_engine.session.reap import sweep
from kenaz_engine.spec.resolve import load_session

STANDIN = Path(__file__).parent / "standins/powershell.py"
AGENT = Path(kenaz_engine.guest.__file__).with_name("agent.py")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the stand-in is for Linux"),
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed"),
]


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *words], check=True, stdout=subprocess.DEVNULL)


class World:
    """A host with Hyper-V, and the guest of its machine."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.state = place / "machines"
        self.listened: list[tuple[int, str, str]] = []
        self.powershell = place / "powershell"
        words = shlex.join([sys.executable, str(STANDIN), str(self.state)])
        self.powershell.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        self.powershell.chmod(0o755)
        self.disk = place / "disk.img"
        self.disk.write_bytes(os.urandom(1 << 20) + bytes(7 << 20))

    def machines(self) -> Any:
        return json.loads(self.state.read_text() or "{}") if self.state.exists() else {}

    def listen(self, port: int, *, machine: str) -> UnixListener:
        """Instead of `listen_hyperv`: notes for whom is listened, and whether it runs already."""
        self.listened.append((port, machine, self.machines()[machine]["State"]))
        return listen_unix(self.place / "guest")

    def write(self, path: Path, files: Mapping[str, bytes]) -> None:
        """The config disk, of which the guest reads a copy."""
        write_config_disk(path, files)
        text = files["kenaz.env"].decode()
        assert 'KENAZ_CHANNEL="vsock:2:7881"' in text
        (self.place / "env").write_text(text.replace("vsock:2:7881", f"unix:{self.place / 'guest'}"))

    async def guest(self) -> None:
        """Dials when its machine runs."""
        while not any(made["State"] == "Running" for made in self.machines().values()):
            await trio.sleep(0.02)
        await trio.run_process([sys.executable, "-I", str(AGENT), "--env", str(self.place / "env")])

    async def run(
        self, *, guest: bool = True, observe: Callable[[Any], None] = lambda record: None
    ) -> Result:
        options = {"hyperv": {"powershell": str(self.powershell)}}
        spec = f"""
apiVersion: kenaz.dev/v1
kind: Session
metadata: {{name: h, id: h}}
spec:
  driver: hyperv
  image: {self.disk}
  machine: {{disk: 64MiB, memory: 64MiB}}
  tools: {{allow: ["fs.*"], deny: ["fs.delete"]}}
  timeouts: {{connecting: {"20s" if guest else "1s"}}}
  driverOptions: {json.dumps(options)}
"""
        prepared = await prepare(load_session(spec, "spec.yaml", overrides=(), environment={}))
        said: list[str] = []

        async def connect() -> DemoHarness:
            await trio.lowlevel.checkpoint()
            return DemoHarness(said.append)

        session = Session(prepared, connect, lambda stream, text: None, (observe,))
        async with trio.open_nursery() as nursery:
            if guest:
                nursery.start_soon(self.guest)
            result = await session.run()
            nursery.cancel_scope.cancel()
        return result


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("KENAZ_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("KENAZ_CACHE_DIR", str(tmp_path / "cache"))
    world = World(tmp_path)
    tmp_path.chmod(0o700)
    monkeypatch.setattr(endpoint, "listen_hyperv", world.listen)
    monkeypatch.setattr(activities, "write_config_disk", world.write)
    return world


async def test_a_session_of_hyper_v_from_its_image_to_nothing_left(world: World) -> None:
    seen: list[Mapping[str, Any]] = []

    def observe(record: Mapping[str, Any]) -> None:
        if record["kind"] == "acquired" and record["resource"] == "vm":
            seen.extend(world.machines().values())
            root = world.place / "state/sessions/h/root.vhdx"
            assert root.read_text() == f"vhdxfile {64 << 20}"  # made of the base by the driver's script

    result = await world.run(observe=observe)
    assert (result.outcome.success, result.outcome.verdict) == (True, "")
    [machine] = seen
    assert world.listened == [(7881, machine["Id"], "Off")]  # before it could dial
    assert machine["log"]["dvd"]["Path"].endswith("/config.iso")
    assert world.machines() == {}
    assert leftovers(result.journal) == []
    assert {path.name for path in result.directory.iterdir()} == {"journal.jsonl", "console.log"}
    [base] = (world.place / "cache/vhdx").glob("*.vhdx")
    qemu_img("compare", "-f", "raw", "-F", "vhdx", world.disk, base)


async def test_a_port_that_is_not_registered_fails_the_session_and_leaves_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(port: int, *, machine: str) -> UnixListener:
        raise TransportError("Hyper-V service: cannot listen", hint="as an administrator, once: a key")

    monkeypatch.setattr(endpoint, "listen_hyperv", refuse)
    result = await world.run(guest=False)
    assert result.outcome.verdict == "VM did not start: Hyper-V service: cannot listen"
    assert world.machines() == {}
    assert {path.name for path in result.directory.iterdir()} == {"journal.jsonl", "console.log"}


KILLED = """
import sys, trio
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.integration.test_session_hyperv import World, activities, endpoint
world = World(Path(sys.argv[1]))
endpoint.listen_hyperv, activities.write_config_disk = world.listen, world.write
trio.run(lambda: world.run(guest=False))
"""


@pytest.mark.parametrize("kill", ["after", "before"])
async def test_what_a_killed_launcher_left_is_reaped(world: World, kill: str) -> None:
    """At the machine's record: one that is known by its id, and one that nobody saw made."""
    told = await world.run(guest=False, observe=lambda record: None)
    [number] = [
        record["seq"]
        for record in map(json.loads, told.journal.read_text().splitlines())
        if record["kind"] == "acquired" and record["resource"] == "vm"
    ]
    environment = {**os.environ, "KENAZ_TEST_KILL": f"{kill}:{number}"}
    root = Path(__file__).parents[2]
    done = await trio.run_process(
        [sys.executable, "-c", KILLED, str(world.place), str(root)], env=environment, check=False, cwd=root
    )
    assert done.returncode == -9
    assert len(world.machines()) == 1
    [reaped] = (await sweep()).sessions
    assert (reaped.status, reaped.message) == ("reaped", "")
    assert world.machines() == {}
    directory = world.place / "state/sessions/h"
    assert {path.name for path in directory.iterdir()} == {"journal.jsonl", "console.log"}
