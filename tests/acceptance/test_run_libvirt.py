"""Whole sessions in domains of a real libvirt: by each way to reach it, and with nothing left of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="libvirtd runs on Linux")

EMULATED = {"driver": "libvirt", "driverOptions.libvirt.accel": "tcg"}
AS_ROOT = sys.platform == "linux" and os.geteuid() == 0


@pytest.fixture
def options(qemu: str, libvirtd: Any) -> Iterator[dict[str, str]]:
    """What a session needs to run there; in the end no domain is left."""
    yield {**EMULATED, "driverOptions.libvirt.uri": libvirtd.uri}
    assert libvirtd.domains() == []


def test_a_session_runs_from_hello_to_nothing_left(world: Any, options: dict[str, str]) -> None:
    done = world.run("--json", "--session-id", "v", behaviour="bye", **options)
    assert done.returncode == 0, done.stdout + done.stderr
    machine = next(r for r in world.records("v") if r["kind"] == "intent" and r["resource"] == "vm")
    assert machine["intent"]["uri"] == options["driverOptions.libvirt.uri"]
    acquired = next(r for r in world.records("v") if r["kind"] == "acquired" and r["resource"] == "vm")
    assert acquired["handle"]["uuid"] in " ".join(machine["intent"]["argv"])
    [ended] = [r for r in world.records("v") if r["kind"] == "event" and r["type"] == "vm.exited"]
    assert ended["data"] == {"clean": True, "message": "the guest powered off"}


def test_plan_shows_the_domain_and_doctor_the_daemon(
    world: Any, options: dict[str, str], libvirtd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = world.plan(**options)
    assert shown.returncode == 0, shown.stderr
    assert "--autodestroy" in shown.stdout
    domain = shown.stdout[shown.stdout.index("  <domain") : shown.stdout.index("</domain>") + 9]
    if shutil.which("xmllint"):
        file = world.state.parent / "domain.xml"
        file.write_text(domain.strip())
        subprocess.run(["virt-xml-validate", str(file), "domain"], check=True, capture_output=True)
    assert "<domain" in json.loads(world.plan("--json", **options).stdout)["command"]["stdin"]
    world.environment["LIBVIRT_DEFAULT_URI"] = libvirtd.uri
    told = world.call("doctor", "--driver", "libvirt", "--json")
    [driver] = json.loads(told.stdout)["drivers"]
    assert driver["usable"]
    assert driver["transports"] == ["virtio-serial"]
    assert driver["reasons"][0]["text"].startswith("libvirt ")


def test_a_daemon_that_does_not_run_is_told_in_one_line(world: Any, qemu: str) -> None:
    uri = f"qemu+unix:///session?socket={world.runtime}/nobody"
    done = world.run(**{**EMULATED, "driverOptions.libvirt.uri": uri})
    assert done.returncode == 3
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert "does not answer" in line
    assert "start libvirt's daemon" in line


@pytest.mark.slow
def test_over_tcp_as_if_it_were_far_away(world: Any, options: dict[str, str], libvirtd: Any) -> None:
    options["driverOptions.libvirt.uri"] = f"qemu+tcp://127.0.0.1:{libvirtd.port}/session"
    done = world.run("--session-id", "v", behaviour="bye", **options)
    assert done.returncode == 0, done.stdout + done.stderr


def within(libvirtd: Any, command: list[str]) -> list[str]:
    """The same command where that daemon is the host's own."""
    enter = ["nsenter", f"--target={libvirtd.pid}", "--mount", f"--wd={Path.cwd()}"]
    user = ["--user", "--preserve-credentials"] if libvirtd.kind == "session" else []
    return [*enter, *user, *command]


@pytest.mark.only_where(AS_ROOT)
@pytest.mark.parametrize("kind", [pytest.param("session", marks=pytest.mark.slow), "system"])
def test_by_the_names_that_people_use(
    world: Any, qemu: str, request: pytest.FixtureRequest, kind: str
) -> None:
    """`qemu:///session` for a user who is not root, `qemu:///system` for root: QEMU runs as who asked."""
    daemon = request.getfixturevalue("libvirtd" if kind == "session" else "system_libvirtd")
    if kind == "session":
        (world.runtime / "libvirt").symlink_to(daemon.socket.parent)
    options = {**EMULATED, "driverOptions.libvirt.uri": f"qemu:///{kind}"}
    done = subprocess.run(
        within(daemon, world.command("--session-id", "v", behaviour="bye", **options)),
        env=world.environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert daemon.domains() == []


def test_a_killed_launcher_leaves_no_domain_and_its_reaper_says_so(
    world: Any, options: dict[str, str], libvirtd: Any
) -> None:
    with world.start("--session-id", "v", **options) as running:
        world.wait_for("v", "connecting")
        [uuid] = libvirtd.domains()
        running.send_signal(signal.SIGKILL)
    world.until(lambda: libvirtd.domains() == [])  # libvirt ends what its owner leaves
    [told] = world.reap()["sessions"]
    assert told["status"] == "reaped"
    assert uuid


@pytest.mark.slow
def test_a_domain_that_somebody_destroys_ends_the_session(
    world: Any, options: dict[str, str], libvirtd: Any, harness: Any
) -> None:
    silent = harness(lambda message: [])
    words = ("--session-id", "v", "--harness", silent.address)
    with world.start(*words, behaviour="idle", **options) as running:
        world.wait_for("v", "running")
        [uuid] = libvirtd.domains()
        subprocess.run(["virsh", "-c", libvirtd.uri, "destroy", uuid], check=True, capture_output=True)
        running.wait(60)
        assert running.returncode == 1
    [ended] = [r for r in world.records("v") if r["kind"] == "event" and r["type"] == "vm.exited"]
    assert ended["data"]["clean"] is False
