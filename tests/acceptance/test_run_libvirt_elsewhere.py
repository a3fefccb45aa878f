"""Whole sessions on another host, as it were: a libvirtd that sees none of our files, and is reached by TCP.

See tests/libvirt_daemon.py for what makes it another host. That its QEMU runs there is seen from outside.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest

from kenaz_engine.images.catalog import default_cache, find_image
from kenaz_engine.session.console import HEAD_BYTES, TAIL_BYTES

AS_ROOT = sys.platform == "linux" and os.geteuid() == 0
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="libvirtd runs on Linux"),
    pytest.mark.only_where(AS_ROOT),
]

THERE = "kenaz-elsewhere"
"""That host's name; see libvirt_daemon.py."""

Options = dict[str, str]


@pytest.fixture
def options(qemu: str, elsewhere_libvirtd: Any) -> Iterator[Options]:
    """What a session needs to run there; in the end nothing of it is left there but its image."""
    yield options_for(elsewhere_libvirtd.uri)
    assert elsewhere_libvirtd.domains() == []
    assert sessions_own(elsewhere_libvirtd) == []


def options_for(uri: str, pool: str = "default") -> Options:
    values = {"accel": "tcg", "uri": uri, "pool": pool}
    return {"driver": "libvirt", **{f"driverOptions.libvirt.{name}": value for name, value in values.items()}}


def sessions_own(daemon: Any, pool: str = "default") -> list[str]:
    """The volumes there that are no image's."""
    return sorted(name for name in daemon.volumes(pool) if not re.fullmatch("kenaz-[0-9a-f]{64}", name))


def images() -> set[str]:
    image = find_image("demo", "x86_64", default_cache())
    return {f"kenaz-{part.sha256}" for part in image.parts.values()}


def emulators(uuid: str) -> list[Path]:
    """The processes that run that domain."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].endswith(b"/qemu-system-x86_64") and uuid.encode() in words:
            found.append(process)
    return found


def pool_of_its_own(daemon: Any, name: str) -> Callable[[], None]:
    """Makes a pool there that has nothing; returns what removes it."""
    daemon.virsh(f"pool-define-as {name} dir --target /var/lib/libvirt/{name}; pool-build {name}")
    daemon.virsh(f"pool-start {name}")

    def remove() -> None:
        for volume in daemon.volumes(name):
            daemon.virsh("vol-delete", "--pool", name, volume)
        daemon.virsh(f"pool-destroy {name}; pool-undefine {name}")

    return remove


def test_a_session_runs_there_from_hello_to_nothing_left(
    world: Any, options: Options, elsewhere_libvirtd: Any, harness: Any
) -> None:
    seen: list[tuple[list[str], list[bool]]] = []

    def answer(message: dict[str, Any]) -> list[dict[str, Any]]:
        match message["kind"]:
            case "tool.invoke":
                return [{"kind": "tool.result", "id": message["id"], "result": {"text": "contents"}}]
            case "prompt" if "fs.read" in message["text"]:
                [uuid] = elsewhere_libvirtd.domains()
                [process] = emulators(uuid)
                daemon = Path(f"/proc/{elsewhere_libvirtd.pid}")
                namespaces = [
                    [os.readlink(of / "ns" / kind) for kind in ("mnt", "uts")]
                    for of in (process, daemon, Path("/proc/self"))
                ]
                same = [namespaces[0] == namespaces[1], namespaces[0] == namespaces[2]]
                root = process / "root"
                same += [(root / str(world.directory("v")).lstrip("/")).exists()]
                same += [(root / str(default_cache()).lstrip("/")).exists()]
                same += [process.stat().st_uid == 0]
                seen.append((sessions_own(elsewhere_libvirtd), same))
                return [{"kind": "prompt.result", "id": message["id"], "text": "well done"}, {"kind": "end"}]
            case "prompt":
                much = [{"kind": "prompt.delta", "id": message["id"], "text": "x" * 200_000}] * 20
                return [*much, {"kind": "prompt.result", "id": message["id"], "text": "hello"}]
            case _:
                return []

    far = harness(answer)
    words = {"workbench.args": '["no-such-word", "demo"]'}
    done = world.run("--session-id", "v", "--harness", far.address, **options, **words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("  nothing left behind\n")
    far.finish()
    assert far.kinds == ["session.open", "prompt", "tool.invoke", "prompt", "session.close"]
    # QEMU was there, as another user, and there was nothing of ours.
    [(volumes, same)] = seen
    assert same == [True, False, False, False, False]
    records = world.records("v")
    intent = next(r for r in records if r["kind"] == "intent" and r["resource"] == "vm")["intent"]
    handle = next(r for r in records if r["kind"] == "acquired" and r["resource"] == "vm")["handle"]
    assert intent["volumes"] == handle["volumes"]
    assert volumes == sorted(handle["volumes"]) == [f"kenaz-{handle['mark']}-{r}" for r in ("config", "root")]
    assert handle["mark"].startswith("v-")
    assert not any(r["kind"] == "intent" and r["resource"] == "disk" for r in records)
    [ended] = [r for r in records if r["kind"] == "event" and r["type"] == "vm.exited"]
    assert ended["data"] == {"clean": True, "message": "the guest powered off"}
    assert "no-such-word" in (world.directory("v") / "console.log").read_text()


def test_the_image_goes_there_once_and_two_at_once_are_no_trouble(
    worlds: Any, qemu: str, elsewhere_libvirtd: Any
) -> None:
    remove = pool_of_its_own(elsewhere_libvirtd, "fresh")
    options = options_for(elsewhere_libvirtd.uri, "fresh")
    # An upload of the root disk has broken off before.
    root = find_image("demo", "x86_64", default_cache()).parts["root"]
    elsewhere_libvirtd.virsh("vol-create-as", "fresh", f"kenaz-{root.sha256}", str(root.size))
    made = [worlds() for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        ran = list(
            threads.map(lambda world: world.run("--session-id", "v", behaviour="bye", **options), made)
        )
    assert [done.returncode for done in ran] == [0, 0], ran
    assert sum(f"kernel to {THERE} 100% of " in done.stdout for done in ran) == 1
    assert set(elsewhere_libvirtd.volumes("fresh")) == images()
    for name in images():
        file = Path(f"/proc/{elsewhere_libvirtd.pid}/root/var/lib/libvirt/fresh") / name
        digest = subprocess.run(["sha256sum", str(file)], check=True, capture_output=True, text=True).stdout
        assert f"kenaz-{digest.split()[0]}" == name
    again = worlds().run("--session-id", "v", behaviour="bye", **options)
    assert again.returncode == 0, again.stdout
    assert f"to {THERE}" not in again.stdout
    remove()


@pytest.mark.parametrize(
    "state", ["resolving", pytest.param("booting", marks=pytest.mark.slow), "connecting"]
)
def test_of_a_killed_launcher_reap_leaves_nothing_there(
    world: Any, options: Options, elsewhere_libvirtd: Any, state: str
) -> None:
    with world.start("--session-id", "v", behaviour="mute", **options) as running:
        world.wait_for("v", state)
        running.send_signal(signal.SIGKILL)
    world.until(lambda: elsewhere_libvirtd.domains() == [])  # libvirt ends what its owner leaves
    left = sessions_own(elsewhere_libvirtd)
    assert len(left) == 2 if state == "connecting" else len(left) <= 2
    [told] = world.reap()["sessions"]
    assert told["status"] == "reaped"
    assert sessions_own(elsewhere_libvirtd) == []


def test_a_launch_that_fails_half_way_leaves_nothing_there(
    world: Any, options: Options, elsewhere_libvirtd: Any
) -> None:
    done = world.run("--session-id", "v", **{"machine.memory": "1TiB"}, **options)
    assert done.returncode == 1
    assert "VM did not start: " in done.stdout
    assert "give the machine less memory" in done.stdout
    assert "nothing left behind" in done.stdout
    assert sessions_own(elsewhere_libvirtd) == []


def test_a_host_that_is_gone_is_told_and_reaped_when_it_is_back(
    world: Any, options: Options, elsewhere_libvirtd: Any
) -> None:
    """The daemon of a host that cannot be reached: a port that leads there, and then no more."""
    with Forwarded(elsewhere_libvirtd.port) as forwarded:
        options["driverOptions.libvirt.uri"] = f"qemu+tcp://127.0.0.1:{forwarded.port}/system"
        with world.start("--session-id", "v", behaviour="mute", **options) as running:
            world.wait_for("v", "connecting")
            forwarded.cut()
            said, _ = running.communicate(timeout=300)
        assert running.returncode == 1
        assert "left behind" in said
        assert "the vm" in said
        world.until(lambda: elsewhere_libvirtd.domains() == [], bound=60)
        assert len(sessions_own(elsewhere_libvirtd)) == 2
        forwarded.mend()
        [told] = world.reap()["sessions"]
        assert told["status"] == "reaped", told


def test_a_host_that_swallows_what_it_is_sent_holds_up_nobody_for_long(
    world: Any, options: Options, elsewhere_libvirtd: Any
) -> None:
    """It takes 17 s, of 5 for the state `killing` and 15 for the release of the machine."""
    with Forwarded(elsewhere_libvirtd.port) as forwarded:
        options["driverOptions.libvirt.uri"] = f"qemu+tcp://127.0.0.1:{forwarded.port}/system"
        with world.start("--session-id", "v", behaviour="mute", **options) as running:
            world.wait_for("v", "connecting")
            forwarded.swallow()
            running.send_signal(signal.SIGINT)
            world.wait_for("v", "stopping")
            begun = time.monotonic()
            running.send_signal(signal.SIGINT)
            said, _ = running.communicate(timeout=300)
            assert time.monotonic() - begun < 30
        assert "left behind: the vm: " in said
        forwarded.cut()
        world.until(lambda: elsewhere_libvirtd.domains() == [], bound=60)
        assert len(sessions_own(elsewhere_libvirtd)) == 2
        forwarded.mend()
        [told] = world.reap()["sessions"]
        assert told["status"] == "reaped", told


class Forwarded:
    """A port of 127.0.0.1 that leads to another, until it is cut."""

    def __init__(self, port: int) -> None:
        with socket.socket() as probing:
            probing.bind(("127.0.0.1", 0))
            self.port = probing.getsockname()[1]
        self._to = port

    def __enter__(self) -> Self:
        self.mend()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()

    def mend(self) -> None:
        program = [sys.executable, "-c", FORWARD, str(self.port), str(self._to)]
        self._running = subprocess.Popen(program, stdout=subprocess.PIPE)
        assert self._running.stdout is not None
        self._running.stdout.readline()

    def swallow(self) -> None:
        """From now on whoever dials is let in, and nothing of what comes goes on."""
        self._running.send_signal(signal.SIGSTOP)

    def cut(self) -> None:
        self._running.kill()
        self._running.communicate()


FORWARD = """
import sys, trio
async def main(port, to):
    async def serve(near):
        async with near, await trio.open_tcp_stream("127.0.0.1", to) as far, trio.open_nursery() as nursery:
            async def pump(one, other):
                try:
                    async for data in one:
                        await other.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass
                nursery.cancel_scope.cancel()
            nursery.start_soon(pump, near, far)
            nursery.start_soon(pump, far, near)
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_tcp, serve, port)
        print("ready", flush=True)
trio.run(main, *map(int, sys.argv[1:]))
"""


def test_a_pool_that_is_missing_inactive_or_full_is_told_in_one_line(
    world: Any, qemu: str, elsewhere_libvirtd: Any
) -> None:
    options = options_for(elsewhere_libvirtd.uri, "none")
    done = world.run(**options)
    assert (done.returncode, done.stdout) == (3, "")
    [line] = done.stderr.splitlines()
    assert f"cannot be put on {THERE}: Storage pool not found" in line
    assert "driverOptions.libvirt.pool" in line

    elsewhere_libvirtd.virsh("pool-define-as idle dir --target /var/lib/libvirt/idle")
    done = world.run(**{**options, "driverOptions.libvirt.pool": "idle"})
    elsewhere_libvirtd.virsh("pool-undefine idle")
    assert (done.returncode, done.stdout) == (3, "")
    [line] = done.stderr.splitlines()
    assert f"the storage pool idle on {THERE} is not active" in line
    assert "pool-start idle" in line

    there = ["nsenter", f"--target={elsewhere_libvirtd.pid}", "--mount"]
    subprocess.run([*there, "mkdir", "/var/lib/libvirt/tiny"], check=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", "/var/lib/libvirt/tiny"]
    subprocess.run([*there, *mount], check=True)
    elsewhere_libvirtd.virsh("pool-create-as tiny dir --target /var/lib/libvirt/tiny")
    done = world.run("--session-id", "f", **{**options, "driverOptions.libvirt.pool": "tiny"})
    left = elsewhere_libvirtd.volumes("tiny")
    elsewhere_libvirtd.virsh("pool-destroy", "tiny")
    subprocess.run([*there, "umount", "/var/lib/libvirt/tiny"], check=True)
    assert done.returncode == 1
    assert f"cannot be put into the storage pool tiny on {THERE}" in done.stdout
    assert "No space left on device" in done.stdout
    assert left == []


def test_plan_and_doctor_tell_where_it_runs(world: Any, options: Options, elsewhere_libvirtd: Any) -> None:
    before = elsewhere_libvirtd.volumes()
    shown = world.plan("--session-id", "v", **options)
    assert shown.returncode == 0, shown.stderr
    assert f"machines run on {THERE}; its storage pool default has " in shown.stdout
    assert f"the machine runs on {THERE}: " in shown.stdout
    assert "/var/lib/libvirt/default/kenaz-v-root" in shown.stdout
    assert str(default_cache()) not in shown.stdout
    assert elsewhere_libvirtd.volumes() == before
    # Nobody is taken there who does not say so.
    world.environment["LIBVIRT_DEFAULT_URI"] = elsewhere_libvirtd.uri
    told = json.loads(world.call("doctor", "--driver", "libvirt", "--json").stdout)
    [driver] = told["drivers"]
    assert not driver["usable"]
    assert f"is on {THERE}, where sessions are placed only by name" in driver["reasons"][0]["text"]


@pytest.fixture
def ssh_uri(elsewhere_libvirtd: Any, tmp_path: Path) -> Iterator[str]:
    """That host by SSH: an sshd of its own, on a port of 127.0.0.1, with keys of its own."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if sshd is None:
        pytest.skip("needs sshd (Debian: openssh-server)")
    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True
        )
    place = Path(f"/proc/{elsewhere_libvirtd.pid}/root/etc/libvirt")
    shutil.copy(tmp_path / "host", place / "host_key")
    shutil.copy(tmp_path / "user.pub", place / "authorized_keys")
    with socket.socket() as probing:
        probing.bind(("127.0.0.1", 0))
        port = probing.getsockname()[1]
    values = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": "/etc/libvirt/host_key",
        "AuthorizedKeysFile": "/etc/libvirt/authorized_keys",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "yes",
    }
    words = [word for name, value in values.items() for word in ("-o", f"{name}={value}")]
    enter = ["nsenter", f"--target={elsewhere_libvirtd.pid}", "--mount", "--uts"]
    with subprocess.Popen(
        [*enter, sshd, "-D", "-f", "/dev/null", *words], stderr=subprocess.DEVNULL
    ) as running:
        deadline = time.monotonic() + 10
        while True:
            with socket.socket() as dialling:
                if dialling.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        known, ssh = tmp_path / "known_hosts", tmp_path / "ssh"
        known.write_text(f"[127.0.0.1]:{port} {(tmp_path / 'host.pub').read_text()}")
        ssh.write_text(f'#!/bin/sh\nexec ssh -o UserKnownHostsFile={known} "$@"\n')
        ssh.chmod(0o755)
        yield f"qemu+ssh://root@127.0.0.1:{port}/system?keyfile={tmp_path}/user&command={ssh}"
        running.terminate()


def test_by_ssh(world: Any, options: Options, elsewhere_libvirtd: Any, ssh_uri: str) -> None:
    options["driverOptions.libvirt.uri"] = ssh_uri
    done = world.run("--session-id", "v", behaviour="bye", **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("  nothing left behind\n")
    with world.start("--session-id", "k", behaviour="mute", **options) as running:
        world.wait_for("k", "connecting")
        assert len(elsewhere_libvirtd.domains()) == 1
        running.send_signal(signal.SIGKILL)
    world.until(lambda: elsewhere_libvirtd.domains() == [])
    [told] = world.reap()["sessions"]
    assert told["status"] == "reaped"


@pytest.mark.slow
def test_a_console_that_floods_stays_within_bounds(world: Any, options: Options) -> None:
    done = world.run("--session-id", "v", behaviour="flood", **options)
    assert done.returncode == 0, done.stdout + done.stderr
    size = (world.directory("v") / "console.log").stat().st_size
    assert 10_000 < size <= HEAD_BYTES + TAIL_BYTES + 100
