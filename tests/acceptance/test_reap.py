"""Dead sessions and hung ones, as a user meets them: what is given back, what is left alone, and why."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kenaz_drivers._common.identity import identify, is_alive

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")

EXEC = str(Path(__file__).parents[2] / "specs/sessions/exec.yaml")
ESCAPED = "setsid sleep 600 & echo $! > escaped; sleep 600"
"""A guest's command whose child leaves its group and session."""


def die(world: Any, session: str, state: str = "connecting", **options: str) -> None:
    """A session whose launcher is killed in that state; nobody has cleaned up."""
    with world.start("--session-id", session, behaviour="mute", **options) as running:
        world.wait_for(session, state)
        running.kill()
    world.until(lambda: world.processes() == [])


def vm_of(world: Any, session: str) -> dict[str, Any]:
    found = [r for r in world.records(session) if r["kind"] == "acquired" and r["resource"] == "vm"]
    return dict(found[-1]["handle"]) if found else {}


# --- what run does about others -----------------------------------------------------------------------------


def test_run_reaps_what_is_dead_first_and_says_so_in_one_line(world: Any) -> None:
    both = [world.start("--session-id", name, behaviour="mute") for name in ("s1", "s2")]
    for name in ("s1", "s2"):
        world.wait_for(name, "connecting")
    for running in both:
        running.kill()
        running.communicate()
    done = world.run("--session-id", "s3")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "gave back what dead sessions held: s1, s2"
    assert {world.status(name) for name in ("s1", "s2", "s3")} == {"ended"}
    assert world.run().stdout.startswith("session hello-")


def test_run_tells_a_program_what_was_reaped(world: Any) -> None:
    die(world, "s1")
    done = world.run("--session-id", "s1", "--json")  # of the same id, which it needs
    first, second, *_ = map(json.loads, done.stdout.splitlines())
    assert (first["kind"], second["kind"]) == ("reaped", "header")
    [session] = first["sessions"]
    assert (session["id"], session["status"], session["left"]) == ("s1", "reaped", [])
    assert [one["resource"] for one in session["released"]] == ["vm", "config", "socket", "disk", "control"]
    assert done.returncode == 0
    assert (world.status("s1"), world.status("s1~1")) == ("ended", "ended")


def test_run_does_not_fail_for_what_it_cannot_reap(world: Any) -> None:
    die(world, "s1")
    journal = world.directory("s1") / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole.replace(b'"kind":"entered"', b'"kind":"left"', 1))
    done = world.run("--session-id", "s2")
    assert done.returncode == 0
    said = "dead, but not to be reaped: s1 (`kenaz-launcher reap` says why)"
    assert done.stdout.splitlines()[0] == said
    refused = world.run("--session-id", "s1")
    assert refused.returncode == 3
    assert "a dead session has the id 's1', and is not reaped" in refused.stderr
    told = world.call("reap")
    assert told.returncode == 1
    assert told.stdout.startswith("s1: left alone: its journal is damaged: line ")
    assert world.status("s1") == "damaged"
    assert (world.directory("s1") / "control.sock").exists()
    journal.write_bytes(whole)
    assert world.reap()["ok"]


# --- what is there and what is not --------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_done_and_does_nothing(world: Any) -> None:
    die(world, "s1")
    before = {path: path.stat().st_mtime_ns for path in world.directory("s1").rglob("*")}
    done = world.call("reap", "--dry-run")
    assert done.stdout == "s1: dead: would give back vm, config, socket, disk, control\n"
    assert {path: path.stat().st_mtime_ns for path in world.directory("s1").rglob("*")} == before
    assert world.reap("--older-than", "1h") == {"ok": True, "dryRun": False, "sessions": [], "removed": []}
    assert world.status("s1") == "dead"
    done = world.call("reap", "s1")
    assert done.stdout == "s1: reaped: gave back vm, config, socket, disk, control\n"
    assert world.call("reap", "s").stdout == "s1: has ended and left nothing\n"
    assert world.call("reap").stdout == "nothing to reap\n"


def test_a_copy_of_a_living_session_is_dead_and_reaping_it_does_not_touch_the_living(world: Any) -> None:
    """A reboot, as it were: all that was on the disk is there, and nobody holds the lock."""
    with world.start("--session-id", "s1", behaviour="mute") as running:
        world.wait_for("s1", "connecting")
        copied = world.state.with_name("copy")
        files = [p for p in (world.state / "sessions").rglob("*") if p.is_file() or p.is_dir()]
        for path in files:
            target = copied / path.relative_to(world.state)
            if path.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target)
        other = {**world.environment, "KENAZ_STATE_DIR": str(copied)}
        there, world.environment = world.environment, other
        assert world.status("s1") == "dead"
        assert "dead, to be reaped" in world.call("ps").stdout
        told = world.reap()
        assert [one["status"] for one in told["sessions"]] == ["refused"]
        assert f"its journal is that of {world.directory('s1')}" in told["sessions"][0]["message"]
        shutil.rmtree(copied)
        world.environment = there
        assert world.status("s1") == "running"
        assert is_alive(vm_of(world, "s1"))
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=300)
    assert world.status("s1") == "ended"


def test_the_same_directory_after_a_reboot_is_dead_and_reaped(world: Any) -> None:
    """The boot's own name is another, so no process of the journal can still be there."""
    die(world, "s1")
    session = world.directory("s1")
    (session / "lock").unlink()  # dropped
    (session / "control.sock").unlink()  # sockets of a runtime directory are gone then
    assert world.status("s1") == "dead"
    assert [one["status"] for one in world.reap()["sessions"]] == ["reaped"]


def test_what_runs_is_left_alone_however_many_reap_at_once(world: Any) -> None:
    with world.start("--session-id", "s1", behaviour="mute") as running:
        world.wait_for("s1", "connecting")
        die_one = subprocess.Popen(
            world.command("--session-id", "d4", behaviour="mute"),
            env=world.environment,
            stdout=subprocess.DEVNULL,
        )
        world.wait_for("d4", "connecting")
        die_one.kill()
        die_one.wait()
        with ThreadPoolExecutor(4) as pool:
            told = list(pool.map(lambda _: world.reap(), range(4)))
        reaped = [one["id"] for each in told for one in each["sessions"] if one["status"] == "reaped"]
        assert reaped == ["d4"]
        assert [one["status"] for one in world.reap("d4")["sessions"]] == ["ended"]
        named = world.reap("s1")
        assert (named["ok"], named["sessions"][0]["status"]) == (False, "running")
        assert world.status("s1") == "running"
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=300)
    assert [r["kind"] for r in world.records("d4")].count("reap") == 1


# --- processes ----------------------------------------------------------------------------------------------


def escaped(world: Any, session: str) -> dict[str, Any]:
    """The child that a guest's command has let go, by its handle."""
    file = world.directory(session) / "root/escaped"
    world.until(lambda: file.is_file() and file.read_text().endswith("\n"))
    child = identify(int(file.read_text()))
    world.until(lambda: os.getsid(child["pid"]) == child["pid"])  # its number is told before it leaves
    return child


def test_a_child_that_left_its_guest_is_found_by_its_mark(world: Any) -> None:
    args = json.dumps(["sh", "-c", ESCAPED])
    with world.start("--session-id", "s1", spec=EXEC, **{"workbench.args": args}) as running:
        child = escaped(world, "s1")
        running.kill()
    assert is_alive(child)
    world.until(lambda: not is_alive(vm_of(world, "s1")))
    assert is_alive(child)
    assert world.reap()["ok"]
    assert not is_alive(child)


def test_a_child_that_left_its_guest_ends_with_the_session(world: Any) -> None:
    args = json.dumps(["sh", "-c", ESCAPED])
    with world.start("--session-id", "s1", spec=EXEC, **{"workbench.args": args}) as running:
        child = escaped(world, "s1")
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=300)
    assert not is_alive(child)


def test_a_helper_that_outlives_its_machine_is_ended(world: Any, qemu: str, tmp_path: Path) -> None:
    helped = tmp_path / "qemu"
    helper = f'[ -z "$KENAZ_MARK" ] || (setsid sleep 600 & echo $! > {tmp_path}/helper)'
    helped.write_text(f'#!/bin/sh\n{helper}\nexec {qemu} "$@"\n')
    helped.chmod(0o755)
    options = {"driver": "qemu", "driverOptions.qemu.accel": "tcg", "driverOptions.qemu.binary": str(helped)}
    with world.start("--session-id", "s1", behaviour="idle", **options) as running:
        world.wait_for("s1", "connecting")
        running.kill()
    child = identify(int((tmp_path / "helper").read_text()))
    world.until(lambda: not is_alive(vm_of(world, "s1")))
    assert is_alive(child)
    assert world.reap()["ok"]
    assert not is_alive(child)


@pytest.mark.parametrize("stopped", [False, True])
def test_qemu_goes_with_its_launcher_also_when_it_is_stopped(world: Any, qemu: str, stopped: bool) -> None:
    options = {"driver": "qemu", "driverOptions.qemu.accel": "tcg"}
    with world.start("--session-id", "s1", behaviour="idle", **options) as running:
        world.wait_for("s1", "connecting")
        if stopped:
            os.kill(vm_of(world, "s1")["pid"], signal.SIGSTOP)
        running.kill()
    world.until(lambda: not is_alive(vm_of(world, "s1")))
    assert world.reap()["ok"]


def test_a_guest_that_is_stopped_ends_by_the_deadlines_of_its_session(world: Any, qemu: str) -> None:
    options = {"driver": "qemu", "driverOptions.qemu.accel": "tcg", "timeouts.stopping": "1s"}
    with world.start("--session-id", "s1", behaviour="idle", **options) as running:
        world.wait_for("s1", "connecting")
        os.kill(vm_of(world, "s1")["pid"], signal.SIGSTOP)
        assert world.call("end", "s1").returncode == 0
        running.communicate(timeout=300)
    assert world.path("s1")[-3:] == ["stopping", "killing", "releasing"]
    assert world.status("s1") == "ended"


def test_the_whole_group_killed_at_once_leaves_what_reap_gives_back(world: Any) -> None:
    with subprocess.Popen(
        world.command("--session-id", "s1", behaviour="mute"),
        env=world.environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as running:
        world.wait_for("s1", "connecting")
        os.killpg(running.pid, signal.SIGKILL)
    world.until(lambda: world.processes() == [])
    assert world.reap()["ok"]


def test_a_terminal_that_is_closed_ends_the_session_gracefully(world: Any) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        ["setsid", "--ctty", *world.command("--session-id", "s1", behaviour="mute")],
        env=world.environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as running:
        os.close(theirs)
        world.wait_for("s1", "connecting")
        os.close(ours)
        running.wait(60)
    assert world.path("s1")[-2:] == ["stopping", "releasing"]
    asked = {r["data"]["by"] for r in world.records("s1") if r["kind"] == "event" and r["type"] == "end"}
    assert asked <= {"signal", "output"}
    assert world.status("s1") == "ended"


def test_under_nohup_a_session_outlives_its_terminal(world: Any) -> None:
    command = world.command("--session-id", "s1", behaviour="mute")
    with subprocess.Popen(["nohup", *command], env=world.environment, stdout=subprocess.DEVNULL) as running:
        world.wait_for("s1", "connecting")
        running.send_signal(signal.SIGHUP)
        running.send_signal(signal.SIGTERM)
        running.wait(60)
    assert [r["type"] for r in world.records("s1") if r.get("data", {}).get("by") == "signal"] == ["end"]


# --- a session that hangs -----------------------------------------------------------------------------------


def test_kill_ends_a_launcher_that_answers_nothing_and_only_it(world: Any) -> None:
    """It leads a group, as that of a shell's pipeline; the others in it are not ours."""
    command = subprocess.list2cmdline(world.command("--session-id", "s1", behaviour="mute"))
    with subprocess.Popen(
        ["sh", "-c", f"sleep 600 & {command} >/dev/null & wait"],
        env=world.environment,
        start_new_session=True,
    ) as shell:
        world.wait_for("s1", "connecting")
        launcher = world.records("s1")[0]["process"]
        os.kill(launcher["pid"], signal.SIGSTOP)
        begun = time.monotonic()
        assert "`kenaz-launcher kill s1` ends it all the same" in world.call("end", "s1").stderr
        assert world.status("s1") == "running"
        done = world.call("kill", "s1")
        assert done.stdout.splitlines() == [
            f"s1: process {launcher['pid']}, which held it, did not answer and was killed",
            "s1: reaped: gave back vm, config, socket, disk, control",
        ]
        assert (done.returncode, done.stderr) == (0, "")
        assert time.monotonic() - begun < 60
        assert not is_alive(launcher)
        assert shell.poll() is None
        os.killpg(shell.pid, signal.SIGKILL)
    assert world.status("s1") == "ended"


def test_kill_aborts_a_session_that_listens(world: Any) -> None:
    with world.start("--session-id", "s1", behaviour="hang") as running:
        world.wait_for("s1", "running")
        done = world.call("kill", "--all")
        assert (done.returncode, done.stdout) == (0, "s1: aborted\n")
        running.communicate(timeout=300)
    assert "killing" in world.path("s1")
    assert world.call("kill", "s1").stderr == "kenaz-launcher: session s1 has ended already\n"
    assert world.call("kill", "--all").stdout == "no session runs\n"


def test_the_journal_can_be_followed_while_the_session_hangs_until_it_is_reaped(world: Any) -> None:
    with world.start("--session-id", "s1", behaviour="mute") as running:
        world.wait_for("s1", "connecting")
        running.send_signal(signal.SIGSTOP)
        with subprocess.Popen(
            [str(Path(sys.executable).with_name("kenaz-launcher")), "logs", "-f", "s1"],
            env=world.environment,
            stdout=subprocess.PIPE,
            text=True,
        ) as following:
            assert following.stdout is not None
            while "entered connecting" not in (line := following.stdout.readline()):
                assert line
            assert world.call("kill", "s1").returncode == 0
            following.communicate(timeout=300)
        assert following.returncode == 0
        running.wait(60)
