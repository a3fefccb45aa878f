"""`run` on hosts that really run short of something: a clear line with its mend each time, and nothing left.

File systems are mounted in a mount namespace of the tests' own, which the kernel takes down with them.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's mounts, limits and /proc")

ODD_DISK = Path(__file__).with_name("odd_disk.py")
LAUNCHER = str(Path(sys.executable).with_name("kenaz-launcher"))
EXEC = str(Path(__file__).parents[2] / "specs/sessions/exec.yaml")
KIB = 1024

OPEN_FILES = "raise the limit of open files: ulimit -n"
FILE_SIZE = "raise the limit of the size of files: ulimit -f"
STATE = "set KENAZ_STATE_DIR to another directory"

Done = subprocess.CompletedProcess[str]


# --- hosts --------------------------------------------------------------------------------------------------

_CLONE_NEWNS, _MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x20000, 1, 32, 4096, 16384, 1 << 18


def _call(function: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


def mount(source: str | Path, target: str | Path, kind: str = "", flags: int = 0, data: str = "") -> None:
    words = [os.fsencode(word) for word in (source, target, kind)]
    _call("mount", *words, ctypes.c_ulong(flags), data.encode())


@pytest.fixture(scope="session")
def mounts() -> None:
    """From here on, what is mounted is seen by the tests and their children alone."""
    try:
        _call("unshare", _CLONE_NEWNS)
        mount("none", "/", flags=_MS_REC | _MS_PRIVATE)
    except OSError as exc:
        pytest.skip(f"needs root, to mount in a namespace of its own ({exc})")


class Disk:
    """A tmpfs of some size. It rounds all files up to pages of 4 KiB."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        path.mkdir(exist_ok=True)
        mount("tmpfs", path, "tmpfs", data=f"size={size},mode=700")

    def fill(self, leave: int = 0) -> None:
        """Takes all room but `leave` bytes."""
        with (self.path / "filling").open("wb", buffering=0) as file:
            while (room := shutil.disk_usage(self.path).free - leave) > 0:
                file.write(bytes(min(64 * KIB, room)))

    def empty(self) -> None:
        (self.path / "filling").unlink()

    def forbid_writing(self) -> None:
        mount("none", self.path, flags=_MS_REMOUNT | _MS_RDONLY)

    def unmount(self) -> None:
        _call("umount2", os.fsencode(self.path), 2)


@pytest.fixture
def disk(mounts: None, tmp_path: Path) -> Iterator[Callable[..., Disk]]:
    made: list[Disk] = []

    def make(path: Path, size: int = 4 << 20) -> Disk:
        made.append(Disk(path, size))
        return made[-1]

    yield make
    for one in made:
        one.unmount()


@contextmanager
def odd_disk(mountpoint: Path, *words: str) -> Iterator[Path]:
    """Serves one at `mountpoint`; gives the directory that it is served from."""
    if not os.access("/dev/fuse", os.W_OK):
        pytest.skip("needs /dev/fuse")
    backing = mountpoint.with_name("backing")
    backing.mkdir()
    mountpoint.mkdir()
    command = [sys.executable, str(ODD_DISK), str(backing), str(mountpoint), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        try:
            deadline = time.monotonic() + 30
            while not os.path.ismount(mountpoint):
                assert server.poll() is None, server.communicate()[0]
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield backing
        finally:
            _call("umount2", os.fsencode(mountpoint), 2)
            server.communicate(timeout=30)


def execute(words: Sequence[str], environment: dict[str, str]) -> Done:
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def command(world: Any, *words: str) -> Done:
    """Another command of the launcher."""
    return execute([LAUNCHER, *words], world.environment)


def limited(name: int, value: int, command: Sequence[str], environment: dict[str, str]) -> Done:
    """Runs a command under a resource limit, soft and hard. Coverage, which writes files, is left out."""
    unmeasured = {name: value for name, value in environment.items() if not name.startswith("COVERAGE_")}
    return subprocess.run(
        command,
        preexec_fn=partial(resource.setrlimit, name, (value, value)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        env=unmeasured,
        check=False,
    )


def without_privileges(command: Sequence[str]) -> list[str]:
    """Permissions hold for root too, once it has no capabilities."""
    if os.geteuid() != 0:
        return list(command)
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv (util-linux), for as root permissions hold nobody back")
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]


# --- what is expected ---------------------------------------------------------------------------------------


def refusal(done: Done) -> str:
    """The one line by which a session was refused before it began."""
    assert done.returncode == 3, (done.stdout, done.stderr)
    [line] = done.stderr.splitlines()
    assert "\nfailed: " not in done.stdout
    return line.removeprefix("kenaz-launcher: ")


def failure(done: Done) -> tuple[str, str]:
    """The line by which a session failed, without its time, and what there is to do."""
    assert (done.returncode, done.stderr) == (1, ""), (done.stdout, done.stderr)
    lines = done.stdout.splitlines()
    [line] = [line for line in lines if line.startswith("failed: ")]
    mend = next((line.partition("what to do: ")[2] for line in lines if "what to do: " in line), "")
    assert lines[-1] == "  nothing left behind"
    return line.removeprefix("failed: ").rpartition(", ")[0], mend


def said(done: Done) -> tuple[str, str]:
    """How a session failed or was refused: the line, and the mend, which must be there."""
    assert not any(word in done.stdout + done.stderr for word in ("Traceback", "internal error", "defect"))
    if done.returncode == 3:
        line, _, mend = refusal(done).rpartition(" (")
        return line, mend.removesuffix(")")
    line, mend = failure(done)
    return (line, mend) if mend else (line.rpartition(" (")[0], line.rpartition(" (")[2].removesuffix(")"))


def nothing_of_it(world: Any) -> bool:
    """A session that could not begin has no directory either."""
    return not (world.state / "sessions").exists() or not [
        path for path in (world.state / "sessions").iterdir() if path.name != ".creating"
    ]


# --- no room ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "room", [0, 4, 12, 20, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 16, 24, 28, 32))]
)
def test_a_state_directory_with_little_room_ends_a_session_by_a_clear_line(world, disk, room):
    small = disk(world.state, 64 * KIB)
    small.fill(leave=room * KIB)
    done = world.run("--session-id", "s1")
    if done.returncode == 0:
        assert room >= 24
        return
    line, mend = said(done)
    assert "No space left on device" in line
    assert mend.startswith("make room there")
    if done.returncode == 3:
        assert nothing_of_it(world)
    assert world.left() == [str(small.path / "filling")] or world.left() == []


class Filler:
    """A harness that fills the disk in mid session, and says so much then that the journal needs more."""

    def __init__(self, small: Disk) -> None:
        self._small = small

    def __call__(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        if message["kind"] == "prompt" and "hello" in message["text"]:
            self._small.fill()
            return [{"kind": "prompt", "id": f"h{n}", "text": "and?"} for n in range(16)]
        return [{"kind": "prompt", "id": f"{message['id']}x", "text": "and?"}] if "id" in message else []


@pytest.mark.parametrize("driver", ["process", pytest.param("qemu", marks=pytest.mark.slow)])
def test_a_disk_that_fills_in_mid_session_ends_it_cleanly(world, harness, disk, driver, request):
    if driver == "qemu":
        request.getfixturevalue("qemu")
    small = disk(world.state)
    far = harness(Filler(small))
    running = world.start("--session-id", "s1", "--harness", far.address, driver=driver)
    out, err = running.communicate(timeout=300)
    far.was_cut_off()
    done = Done([], running.returncode, out, err)
    line, mend = said(done)
    assert line.endswith("the journal could not be written: No space left on device")
    assert mend == "make room there"
    assert "  its record is incomplete: the end of the journal is missing" in out.splitlines()
    assert world.left() == []
    # What a journal without an end may hide is nobody's to guess: it counts as dead until it is reaped.
    small.empty()
    assert command(world, "ps", "--json").stdout.count('"dead"') == 1
    reaped = command(world, "reap")
    assert (reaped.returncode, reaped.stderr) == (0, ""), reaped.stdout
    assert reaped.stdout.startswith("s1: reaped")
    assert world.records("s1")[-1]["kind"] == "end"
    assert '"dead"' not in command(world, "ps", "--all", "--json").stdout


@pytest.mark.slow
def test_a_guest_whose_disk_finds_no_room_hears_of_it(world, qemu, disk):
    """QEMU by itself would stop the machine, and wait for somebody who makes room."""
    disk(world.state, 24 << 20)
    script = "busybox dd if=/dev/zero of=/big bs=1M count=64 conv=fsync"
    options = {"workbench.args": json.dumps(["sh", "-c", script]), "timeouts.running": "3m"}
    done = world.run("--session-id", "s1", spec=EXEC, driver="qemu", **options)
    assert (done.returncode, done.stderr) == (1, "")
    assert "took too long" not in done.stdout
    # The disk took all there was, so the launcher may find no room for its journal either.
    assert "exit" in failure(done)[0] or "No space left on device" in failure(done)[0], done.stdout
    assert done.stdout.endswith("  nothing left behind\n")


def test_a_cache_without_room_stops_no_session_and_gets_no_scraps(world, qemu, disk, tmp_path):
    small = disk(tmp_path / "cache", 64 * KIB)
    with_image(small)
    (small.path / "probe").mkdir()
    small.fill()
    world.environment["KENAZ_CACHE_DIR"] = str(small.path)
    planned = world.plan(driver="qemu")
    assert (planned.returncode, planned.stderr) == (0, "")
    assert list((small.path / "probe").iterdir()) == []


def test_a_read_only_cache_stops_no_session(world, qemu, disk, tmp_path):
    small = disk(tmp_path / "cache")
    with_image(small)
    small.forbid_writing()
    world.environment["KENAZ_CACHE_DIR"] = str(small.path)
    done = world.run("--session-id", "s1", driver="qemu", behaviour="bye")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("  nothing left behind\n")


def with_image(small: Disk) -> None:
    from kenaz_engine.images.catalog import default_cache

    (small.path / "images").symlink_to(default_cache() / "images")


@pytest.mark.parametrize(
    ("fault", "says"),
    [("full", "MiB are needed on the file system of"), ("read-only", "you may not write to")],
)
def test_an_image_for_which_the_cache_has_no_place_is_not_half_there(world, disk, tmp_path, fault, says):
    source = tmp_path / "source"
    source.mkdir()
    make_image(source, 1 << 20)
    small = disk(tmp_path / "cache", 2 << 20)
    if fault == "read-only":
        small.forbid_writing()
    world.environment["KENAZ_CACHE_DIR"] = str(small.path)
    done = command(world, "image", "pull", (source / "image.json").as_uri())
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert says in line
    assert line.endswith(")")
    # What has come may be gone on with; it is no image of any name.
    assert "small" not in command(world, "image", "ls").stdout
    assert [path for path in small.path.glob("images/refs/**/*") if path.is_file()] == []


def make_image(directory: Path, size: int) -> None:
    import hashlib

    parts = {}
    for part in ("kernel", "initrd", "root"):
        content = part.encode().ljust(size, b".")
        (directory / f"{part}.raw").write_bytes(content)
        parts[part] = {"file": f"{part}.raw", "size": size, "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {
        "schema": 1,
        "name": "small",
        "tag": "1",
        "arch": "x86_64",
        "kernel": "none",
        "cmdline": "console=ttyS0",
        "console": {"device": "ttyS0", "patterns": []},
        "parts": {**parts, "root": {**parts["root"], "format": "raw"}},
        "inputs": "0" * 64,
        "packages": {},
    }
    (directory / "image.json").write_text(json.dumps(manifest))


# --- places that cannot be written --------------------------------------------------------------------------


def test_a_read_only_state_directory_is_refused(world, disk):
    disk(world.state).forbid_writing()
    assert refusal(world.run("--session-id", "s1")) == (
        f"the state directory {world.state}/sessions/s1 cannot be made: Read-only file system "
        f"(have it mounted writable, or {STATE})"
    )


def test_a_home_that_cannot_be_written_is_refused_and_can_be_done_without(world, tmp_path):
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    given = {name: world.environment.pop(name) for name in ("KENAZ_STATE_DIR", "XDG_RUNTIME_DIR")}
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        world.environment.pop(name, None)
    world.environment["HOME"] = str(home)
    run = without_privileges(world.command("--session-id", "s1"))
    refused = execute(run, world.environment)
    assert refusal(refused) == (
        f"the state directory {home}/.local/state/kenaz/sessions/s1 cannot be made: Permission denied "
        f"(give yourself access to it, or {STATE})"
    )
    done = execute(run, {**world.environment, **given})
    assert (done.returncode, done.stderr) == (0, "")
    assert list(home.iterdir()) == []


def test_a_runtime_directory_that_cannot_be_written_is_refused(world):
    world.state = world.state / ("a" * 110)
    world.environment["KENAZ_STATE_DIR"] = str(world.state)
    world.runtime.chmod(0o500)
    line = refusal(execute(without_privileges(world.command("--session-id", "s1")), world.environment))
    assert line.startswith(f"the control socket {world.runtime}/kenaz/s1-")
    assert line.endswith(
        "/control.sock cannot be made: Permission denied "
        "(give yourself access to it, or set XDG_RUNTIME_DIR to another directory)"
    )
    assert nothing_of_it(world)


def test_a_disk_that_turns_read_only_in_mid_session_is_told_and_reaped_later(world, mounts):
    with odd_disk(world.state) as backing:
        running = world.start("--session-id", "s1", behaviour="hang", **{"timeouts.draining": "2s"})
        world.wait_for("s1", "draining")
        mark = backing.with_name("backing.read-only")
        mark.touch()
        out, err = running.communicate(timeout=300)
        assert (running.returncode, err) == (1, "")
        assert "the journal could not be written: Read-only file system (have it mounted writable)" in out
        assert "  its record is incomplete: the end of the journal is missing" in out.splitlines()
        # Files cannot go now, and that is said of each; what is no file is gone.
        left = [line.split(": ")[1] for line in out.splitlines() if line.startswith("  left behind: ")]
        assert sorted(left) == ["the config", "the control", "the disk", "the socket"]
        assert not [name for name in world.left() if "agent.py" in name]
        mark.unlink()
        reaped = command(world, "reap")
        assert (reaped.returncode, reaped.stderr) == (0, ""), reaped.stdout
        assert [name for name in world.left() if ODD_DISK.name not in name] == []


# --- a file system without locks ----------------------------------------------------------------------------


def test_a_state_directory_without_locks_is_refused(world, mounts):
    with odd_disk(world.state, "no-locks"):
        mend = f"(have it mounted with locks, or {STATE})"
        assert refusal(world.run("--session-id", "s1")) == (
            f"the state directory {world.state}/sessions/s1 cannot be made: "
            f"locks (flock) do not work there: No locks available {mend}"
        )
        assert nothing_of_it(world)
        # A session that is there nevertheless: of a time when locks worked.
        session = world.state / "sessions/s0"
        session.mkdir()
        (session / "lock").touch()
        for words in (["ps"], ["reap"], ["end", "s0"]):
            done = command(world, *words)
            assert "locks (flock) do not work there" in done.stdout + done.stderr, words
            assert done.returncode in (1, 3), words
            assert done.stderr.count("\n") <= 1, words
            assert "internal error" not in done.stderr, words
        shutil.rmtree(session)


# --- limits -------------------------------------------------------------------------------------------------

LEAST = 5
"""Open files with which Python itself starts: its three, and two."""

ENOUGH = {"process": 27, "qemu": 30}
"""Open files with which a session surely runs."""

QUICK_LIMITS = [8, 12, *range(14, 18), 19]


@pytest.mark.parametrize(
    ("driver", "limits"),
    [
        ("process", QUICK_LIMITS),
        pytest.param("process", range(LEAST, ENOUGH["process"] + 1), marks=pytest.mark.slow),
        pytest.param("qemu", range(LEAST, ENOUGH["qemu"] + 1), marks=pytest.mark.slow),
    ],
)
def test_whatever_step_finds_no_open_files_ends_a_session_by_a_declared_way(world, driver, limits, request):
    if driver == "qemu":
        request.getfixturevalue("qemu")
    ways = set()
    for limit in limits:
        id_ = f"s{limit}"
        run = world.command("--session-id", id_, driver=driver, behaviour="bye")
        done = limited(resource.RLIMIT_NOFILE, limit, run, world.environment)
        assert world.left() == [], limit
        if done.returncode == 0:
            ways.add("succeeded")
            continue
        line, mend = said(done)
        assert "oo many open files" in line, (limit, done.stderr)
        assert mend == OPEN_FILES, (limit, line)
        if done.returncode == 3:
            ways.add(line.replace(id_, "ID").partition(" cannot be ")[0].partition(": Too many")[0])
            assert not world.directory(id_).exists(), limit
        else:
            ways.add(tuple(world.path(id_)))
            assert world.records(id_)[-1]["left"] == [], limit
    # The limits hit one step after the other.
    assert len(ways) >= 4
    assert ("succeeded" in ways) == (limits is not QUICK_LIMITS)


def sizes_of_a_journal(world: Any) -> list[int]:
    """The size of a journal after each of its records."""
    assert world.run("--session-id", "whole", behaviour="bye").returncode == 0
    sizes = [0]
    for line in (world.directory("whole") / "journal.jsonl").read_bytes().splitlines(keepends=True):
        sizes.append(sizes[-1] + len(line))
    return sizes


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 17])
def test_a_journal_that_cannot_grow_ends_a_session_cleanly_at_every_record(world, stride):
    sizes = sizes_of_a_journal(world)
    ways = set()
    # Half a record more than fits: the last line is torn, too.
    for number, size in list(enumerate(sizes[:-1]))[::stride]:
        id_ = f"s{number}"
        run = world.command("--session-id", id_, behaviour="bye")
        done = limited(resource.RLIMIT_FSIZE, size + 100, run, world.environment)
        # Those before it could not be reaped under this limit, and are dead until the end of this test.
        assert [item for item in world.left() if item.rpartition("/")[2] != "lock" or id_ in item] == [], (
            number
        )
        if done.returncode == 0:  # its machine's end came in between, and took a record less: all fits
            assert number >= len(sizes) - 4, done.stdout
            continue
        line, mend = said(done)
        assert "the journal could not be written: File too large" in line + mend, number
        assert FILE_SIZE in line + mend, number
        if done.returncode == 3:
            assert not world.directory(id_).exists(), number
        else:
            ways.add(tuple(json.loads(text)["state"] for text in entered(world.directory(id_))))
            assert "  its record is incomplete: the end of the journal is missing" in done.stdout
    assert len(ways) >= 2
    # What is left of the records is no hindrance to anybody.
    reaped = command(world, "reap")
    assert (reaped.returncode, reaped.stderr) == (0, ""), reaped.stdout


def entered(directory: Path) -> list[bytes]:
    """Of a journal with a torn end."""
    whole = (directory / "journal.jsonl").read_bytes().rpartition(b"\n")[0].splitlines()
    return [line for line in whole if b'"kind": "entered"' in line or b'"kind":"entered"' in line]


# --- clocks -------------------------------------------------------------------------------------------------


@pytest.fixture
def wall_clock(world: Any, tmp_path: Path) -> Iterator[Callable[[float], None]]:
    """Steps the wall clock of what `world` runs, by libfaketime, to so many seconds from now. The machine's
    own clock cannot be set for one process: time namespaces have no CLOCK_REALTIME. The monotonic clock is
    left as it is, for that is what the kernel promises of it."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not found:
        pytest.skip("needs libfaketime")
    file = tmp_path / "wall-clock"
    world.environment |= {
        "LD_PRELOAD": str(found[0]),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }

    def step(seconds: float) -> None:
        new = file.with_name("wall-clock.new")
        new.write_text(f"{seconds:+.0f}\n")
        new.replace(file)

    step(0)
    yield step
    # What is killed cannot remove its own.
    for litter in Path("/dev/shm").glob("*faketime_*_*"):
        if not Path("/proc", litter.name.rpartition("_")[2]).exists():
            litter.unlink(missing_ok=True)


YEARS = 365 * 86400.0


def test_a_wall_clock_that_steps_changes_no_deadline_and_no_order(world, wall_clock):
    quick = {"timeouts.draining": "2s", "timeouts.stopping": "5s"}
    started = time.monotonic()
    running = world.start("--session-id", "s1", behaviour="hang", **quick)
    world.wait_for("s1", "draining")
    wall_clock(10 * YEARS)
    world.wait_for("s1", "stopping")
    wall_clock(-20 * YEARS)
    out, err = running.communicate(timeout=300)
    assert (running.returncode, err) == (0, ""), out
    assert out.endswith("  nothing left behind\n")
    took = time.monotonic() - started
    records = world.records("s1")
    assert records[-1]["kind"] == "end"
    walls = [record["wall"] for record in records]
    # The wall clock has stepped, there and back, and nothing else has.
    steps = [later - sooner for sooner, later in pairwise(walls)]
    assert max(steps) > 9 * YEARS
    assert min(steps) < -29 * YEARS
    times = [record["t"] for record in records]
    assert times == sorted(times)
    assert 7 <= records[-1]["seconds"] <= took
    waited = {r["state"]: r["t"] for r in records if r["kind"] == "entered"}
    assert 2 <= waited["stopping"] - waited["draining"] < 10
    # It began ten years and more after what is now.
    [shown] = json.loads(command(world, "ps", "--all", "--json").stdout)
    assert (shown["status"], shown["age"]) == ("ended", 0)
    assert command(world, "logs", "s1").returncode == 0
    assert command(world, "replay", "s1").returncode == 0


def test_a_step_of_the_wall_clock_hides_no_dead_session(world, wall_clock):
    wall_clock(10 * YEARS)
    running = world.start("--session-id", "s1", behaviour="mute")
    world.wait_for("s1", "connecting")
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=300)
    wall_clock(-10 * YEARS)
    reaped = command(world, "reap")
    assert (reaped.returncode, reaped.stderr) == (0, ""), reaped.stdout
    assert reaped.stdout.startswith("s1: reaped")
    times = [record["t"] for record in world.records("s1")]
    assert times == sorted(times)
