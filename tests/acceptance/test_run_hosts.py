"""`run` on hosts that lack something, with machines that do not start, and with guests that misbehave."""

import json
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")

UP = ["resolving", "allocating", "booting", "connecting"]


def failure(done):
    """The line that says how the session failed."""
    [line] = [line for line in done.stdout.splitlines() if line.startswith("failed: ")]
    return line


def test_without_qemu_auto_falls_to_process_and_says_so(world, tmp_path):
    world.environment["PATH"] = str(tmp_path)
    done = world.run("--session-id", "s1", driver="auto")
    assert (done.returncode, done.stderr) == (0, "")
    head = done.stdout.splitlines()
    assert head[0] == "session s1: process, unix"
    assert "  note: qemu is not used: qemu-system-x86_64 is not installed" in head
    assert any("the driver process isolates nothing" in line for line in head)
    header = world.records("s1")[0]
    assert header["driver"] == "process"
    assert any("qemu is not used" in note for note in header["notes"])


@pytest.mark.parametrize("there", [False, True])
def test_a_qemu_that_cannot_be_run_is_found_before_anything_is_made(world, tmp_path, there):
    world.environment["PATH"] = str(tmp_path)
    options = {"driverOptions.qemu.binary": str(tmp_path / "none")} if there else {}
    done = world.run(driver="qemu", **options)
    assert done.returncode == 3
    assert "the driver qemu cannot run" in done.stderr
    mend = "driverOptions.qemu.binary: the path of QEMU" if there else "apt install qemu-system-x86"
    assert mend in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not world.state.exists()


def test_an_image_that_is_not_there_is_found_before_anything_is_made(world, qemu, tmp_path):
    world.environment["KENAZ_CACHE_DIR"] = str(tmp_path / "cache")
    done = world.run(driver="qemu")
    assert done.returncode == 3
    assert done.stderr.startswith("kenaz-launcher: image demo for x86_64 is not on this machine (")
    assert done.stderr.count("\n") == 1
    assert not world.state.exists()


def test_a_kernel_that_is_none_ends_a_session_by_what_qemu_says(world, qemu, tmp_path):
    image = tmp_path / "image"
    image.mkdir()
    manifest = {
        "schema": 1,
        "name": "broken",
        "tag": "1",
        "arch": "x86_64",
        "kernel": "none",
        "cmdline": "console=ttyS0",
        "console": {"device": "ttyS0", "patterns": []},
        "parts": {},
        "inputs": "0" * 64,
        "packages": {},
    }
    for part, name in (("kernel", "kernel"), ("initrd", "initrd"), ("root", "root.raw")):
        (image / name).write_bytes(bytes(65536))
        manifest["parts"][part] = {"file": name, "size": 65536, "sha256": "0" * 64}
    manifest["parts"]["root"]["format"] = "raw"
    (image / "image.json").write_text(json.dumps(manifest))
    done = world.run("--session-id", "s1", driver="qemu", image=str(image / "image.json"))
    assert done.returncode == 1
    assert failure(done).startswith("failed: VM did not start: QEMU ended with code 1: ")
    assert "linux kernel" in failure(done)
    assert world.path("s1") == ["resolving", "allocating", "booting", "killing", "releasing"]
    assert "nothing left behind" in done.stdout


def test_too_little_memory_ends_a_session_by_a_declared_way(world, qemu):
    done = world.run("--session-id", "s1", driver="qemu", **{"machine.memory": "32MiB"})
    assert done.returncode == 1
    assert world.path("s1")[-1] == "releasing"
    assert "nothing left behind" in done.stdout

    done = world.run(driver="qemu", **{"machine.memory": "1MiB"})
    assert done.returncode == 2
    assert "spec.machine.memory" in done.stderr


@pytest.mark.parametrize(
    ("word", "says", "ending"),
    [
        ("emergency", "guest panicked: kenaz: emergency: asked for", ["running", "killing", "releasing"]),
        (
            "poweroff",
            "VM exited while serving: guest-shutdown: the guest powered off",
            ["running", "releasing"],
        ),
        (
            "reboot",
            "VM exited while serving: guest-reset: the guest asked for a reboot",
            ["running", "releasing"],
        ),
    ],
)
def test_a_guest_that_leaves_is_told_in_one_line(world, qemu, word, says, ending):
    done = world.run("--session-id", "s1", driver="qemu", behaviour=word)
    assert (done.returncode, done.stderr) == (1, "")
    assert failure(done).startswith(f"failed: {says}, ")
    assert world.path("s1") == [*UP, *ending]
    end = world.records("s1")[-1]
    assert (end["kind"], end["state"], end["success"], end["left"]) == ("end", "failed", False, [])
    assert done.stdout.endswith("  nothing left behind\n")
    # Seen before the fixture looks at processes, sockets and files: not a moment later than the exit.
    assert world.left() == []


def test_a_guest_deaf_to_all_is_killed_at_the_deadline(world, qemu):
    # Deadlines that wait for the guest are longer under emulation, and `stopping` is one of them.
    quick = {"timeouts.draining": "200ms", "timeouts.stopping": "2s"}
    done = world.run("--session-id", "s1", driver="qemu", behaviour="hang", **quick)
    assert (done.returncode, done.stderr) == (0, "")
    assert world.path("s1") == [*UP, "running", "draining", "stopping", "killing", "releasing"]
    assert "! guest did not power off" in done.stdout
    records = world.records("s1")
    [stopping] = [r for r in records if r["kind"] == "entered" and r["state"] == "stopping"]
    [killing] = [r for r in records if r["kind"] == "entered" and r["state"] == "killing"]
    waited = killing["t"] - stopping["t"]
    assert stopping["timeout"] <= waited < stopping["timeout"] + 5
    assert (records[-1]["state"], records[-1]["success"], records[-1]["left"]) == ("ended", True, [])
    assert world.left() == []


def test_a_flooding_guest_has_a_session_and_a_bounded_record(world, qemu):
    done = world.run("--session-id", "s1", driver="qemu", behaviour="flood")
    assert (done.returncode, done.stderr) == (0, "")
    assert world.path("s1") == [*UP, "running", "draining", "stopping", "releasing"]
    console = world.directory("s1") / "console.log"
    assert b"flood flood" in console.read_bytes()
    assert console.stat().st_size < 1_200_000
    assert (world.directory("s1") / "journal.jsonl").stat().st_size < 100_000


def test_a_qemu_that_is_given_a_bogus_option_is_quoted(world, qemu, tmp_path):
    wrapper = tmp_path / "qemu"
    # The probe's machines have no disk of ours; only the session's own gets the option.
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *config*) set -- "$@" -bogus ;; esac\nexec {qemu} "$@"\n')
    wrapper.chmod(0o755)
    done = world.run("--session-id", "s1", driver="qemu", **{"driverOptions.qemu.binary": str(wrapper)})
    assert done.returncode == 1
    assert failure(done).startswith("failed: VM did not start: ")
    assert "-bogus: invalid option" in failure(done)
    assert world.path("s1") == ["resolving", "allocating", "booting", "killing", "releasing"]
