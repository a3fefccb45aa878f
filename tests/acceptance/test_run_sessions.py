"""`run` as a user sees it: whole sessions with the driver `process`, and what they leave."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HELLO = str(ROOT / "specs/sessions/hello.yaml")
LAUNCHER = str(Path(sys.executable).with_name("kenaz-launcher"))
BOUND = 60

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")


class World:
    """A state directory of its own, and a look at what is on this host besides."""

    def __init__(self, base: Path) -> None:
        self.state = base / "s"
        self.runtime = base / "r"
        self.runtime.mkdir(mode=0o700)
        self.environment = {
            **os.environ,
            "KENAZ_STATE_DIR": str(self.state),
            "XDG_RUNTIME_DIR": str(self.runtime),
            "NO_COLOR": "1",
        }

    def command(self, *words: str, **options: str) -> list[str]:
        spec = {"driver": "process", **options}
        overrides = [word for name, value in spec.items() for word in ("--set", f"spec.{name}={value}")]
        return [LAUNCHER, "run", HELLO, *overrides, *words]

    def run(self, *words: str, behaviour: str = "", **options: str) -> subprocess.CompletedProcess[str]:
        extra = {"workbench.args": json.dumps([behaviour])} if behaviour else {}
        return subprocess.run(
            self.command(*words, **extra, **options),
            capture_output=True,
            text=True,
            timeout=BOUND,
            env=self.environment,
            check=False,
        )

    def start(self, *words: str, behaviour: str, **options: str) -> subprocess.Popen[str]:
        options = {"workbench.args": json.dumps([behaviour]), **options}
        return subprocess.Popen(
            self.command(*words, **options),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
        )

    def left(self) -> list[str]:
        """All that is still there: processes, sockets of the kernel, files other than the record."""
        kept = {"journal.jsonl", "console.log", ".creating"}
        roots = (self.state, self.runtime)
        files = [str(p) for root in roots for p in root.rglob("*") if p.is_file() or p.is_socket()]
        found = [name for name in files if Path(name).name not in kept]
        found += [str(p) for p in self.runtime.glob("kenaz/*")]
        marks = [str(root).encode() for root in roots]
        sockets = Path("/proc/net/unix").read_bytes().splitlines()
        found += [line.decode() for line in sockets if any(mark in line for mark in marks)]
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = process.read_bytes()
            except OSError:
                continue
            if any(mark in words for mark in marks):
                found.append(words.decode("utf-8", "replace"))
        return found

    def records(self, session: str) -> list[dict[str, Any]]:
        text = (self.state / "sessions" / session / "journal.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def path(self, session: str) -> list[str]:
        return [record["state"] for record in self.records(session) if record["kind"] == "entered"]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    assert world.left() == []


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOUND
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def in_state(world: World, session: str, state: str) -> Callable[[], bool]:
    def holds() -> bool:
        try:
            return state in world.path(session)
        except (OSError, ValueError):
            return False

    return holds


WAY_UP = ["resolving", "allocating", "booting", "connecting"]
WAY_DOWN = ["draining", "stopping", "releasing"]


def test_a_session_goes_the_graceful_way_and_leaves_nothing(world: World) -> None:
    done = world.run("--session-id", "s1")
    assert (done.returncode, done.stderr) == (0, "")
    assert world.path("s1") == [*WAY_UP, "running", *WAY_DOWN]
    assert "tool fs.delete: denied" in done.stdout
    assert done.stdout.endswith("  nothing left behind\n")


def test_a_quick_bye_is_heard_by_the_state_that_serves(world: World) -> None:
    done = world.run("--session-id", "s1", behaviour="bye")
    assert done.returncode == 0
    assert world.path("s1") == [*WAY_UP, "running", "stopping", "releasing"]


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        ("exit:3", "failed: VM exited while serving: the agent ended with code 3"),
        ("panic", "Kernel panic - not syncing: asked for"),
        ("emergency", "kenaz: emergency: asked for"),
    ],
)
def test_a_guest_that_fails_is_told_in_one_line(world: World, behaviour: str, says: str) -> None:
    done = world.run(behaviour=behaviour)
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("failed: ")]
    assert says in line
    assert "nothing left behind" in done.stdout


def test_a_guest_that_never_dials_ends_by_the_timeout(world: World) -> None:
    done = world.run("--session-id", "s1", behaviour="mute", **{"timeouts.connecting": "500ms"})
    assert done.returncode == 1
    assert world.path("s1") == [*WAY_UP, "killing", "releasing"]
    assert "failed: guest did not dial in time" in done.stdout


def test_a_guest_that_hangs_is_killed(world: World) -> None:
    quick = {"timeouts.draining": "200ms", "timeouts.stopping": "200ms"}
    done = world.run("--session-id", "s1", behaviour="hang", **quick)
    assert done.returncode == 0
    assert world.path("s1")[-4:] == ["draining", "stopping", "killing", "releasing"]
    assert "! guest did not power off" in done.stdout


def test_a_flooded_console_is_bounded(world: World) -> None:
    done = world.run("--session-id", "s1", behaviour="flood")
    assert done.returncode == 0
    assert (world.state / "sessions/s1/console.log").stat().st_size < 1_200_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_ends_a_session_gracefully(world: World, number: signal.Signals) -> None:
    running = world.start("--session-id", "s1", behaviour="mute")
    until(in_state(world, "s1", "connecting"))
    running.send_signal(number)
    out, _ = running.communicate(timeout=BOUND)
    assert running.returncode == 130
    assert world.path("s1") == [*WAY_UP, "stopping", "releasing"]
    assert "interrupted: end; once more to abort" in out


def test_two_signals_abort(world: World) -> None:
    running = world.start("--session-id", "s1", "--set", "spec.timeouts.draining=60s", behaviour="hang")
    until(in_state(world, "s1", "draining"))
    running.send_signal(signal.SIGINT)
    until(lambda: any(r.get("data", {}).get("by") == "signal" for r in world.records("s1")))
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=BOUND)
    assert running.returncode == 130
    assert world.path("s1")[-2:] == ["killing", "releasing"]


def test_the_id_of_a_living_session_is_refused_and_of_an_ended_one_reused(world: World) -> None:
    running = world.start("--session-id", "s1", behaviour="mute")
    until(in_state(world, "s1", "connecting"))
    refused = world.run("--session-id", "s1")
    assert refused.returncode == 3
    assert refused.stderr.startswith("kenaz-launcher: a living session has the id 's1'")
    assert refused.stderr.count("\n") == 1
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=BOUND)
    assert world.run("--session-id", "s1").returncode == 0
    assert sorted(p.name for p in (world.state / "sessions").glob("s1*")) == ["s1", "s1~1"]


def test_a_long_state_directory_has_its_sockets_elsewhere(world: World) -> None:
    world.state = world.state / ("a" * 110)
    world.environment["KENAZ_STATE_DIR"] = str(world.state)
    done = world.run("--session-id", "s1")
    assert done.returncode == 0
    made = [r for r in world.records("s1") if r["kind"] == "acquired" and r["resource"] == "runtime"]
    assert made[0]["handle"]["path"].startswith(str(world.runtime / "kenaz/s1-"))
    world.environment["XDG_RUNTIME_DIR"] = str(world.state)
    refused = world.run("--session-id", "s2")
    assert refused.returncode == 3
    assert "a socket's path would be too long" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_reader_that_goes_does_not_take_the_session_with_it(world: World) -> None:
    with world.start("--session-id", "s1", "--json", behaviour="mute") as running:
        assert running.stdout is not None
        running.stdout.readline()
        running.stdout.close()
        assert running.wait(BOUND) == 1
    assert world.records("s1")[-1]["kind"] == "end"


FULL = """
mount -t tmpfs -o size=64k tmpfs "$1" || exit 77
shift
dd if=/dev/zero of="$KENAZ_STATE_DIR/fill" bs=1k count="$1" 2>/dev/null
shift
"$@"; code=$?
find "$KENAZ_STATE_DIR" \\( -type f -o -type s \\) ! -name fill
exit $code
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounts in a namespace of its own"
)
@pytest.mark.parametrize(
    ("filled", "code", "says"),
    [(64, 3, "cannot be made"), (44, 1, "its record is incomplete"), (52, 1, "No space left on device")],
)
def test_a_full_disk_ends_a_session_by_a_clear_line(world: World, filled: int, code: int, says: str) -> None:
    world.state.mkdir()
    inner = [str(world.state), str(filled), *world.command()]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", FULL, "sh", *inner],
        capture_output=True,
        text=True,
        timeout=BOUND,
        env=world.environment,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    kept = {"journal.jsonl", "console.log", ".creating"}
    files = [line for line in done.stdout.splitlines() if line.startswith(str(world.state))]
    assert {Path(name).name for name in files} <= kept
