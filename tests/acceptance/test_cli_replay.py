"""Sessions on real parts, replayed: what was recorded is what would be decided again, each time.

(conftest.py replays what every other acceptance test leaves.)
"""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kenaz_engine.images.catalog import default_cache, find_image
from kenaz_engine.images.errors import ImageError

ROOT = Path(__file__).parents[2]
LAUNCHER = str(Path(sys.executable).with_name("kenaz-launcher"))
HELLO = str(ROOT / "specs/sessions/hello.yaml")
BOUND = 300


def _ready() -> bool:
    try:
        find_image("demo", "x86_64", default_cache())
    except ImageError:
        return False
    return shutil.which("qemu-system-x86_64") is not None


DRIVERS = [
    "process",
    pytest.param(
        "qemu", marks=pytest.mark.skipif(not _ready(), reason="needs QEMU and the demo image (`make image`)")
    ),
]

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "KENAZ_STATE_DIR": str(home), "NO_COLOR": "1", "TERM": "xterm"}


@pytest.fixture
def launch(environment: dict[str, str]) -> Launch:
    def launch(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [LAUNCHER, *argv], capture_output=True, text=True, timeout=BOUND, env=environment, check=False
        )

    return launch


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_session_replays_exactly(driver: str, launch: Launch, home: Path) -> None:
    done = launch("run", HELLO, "--session-id", "one", "--set", f"spec.driver={driver}")
    assert done.returncode == 0, done.stdout + done.stderr
    journal = home / "sessions/one/journal.jsonl"
    count = journal.read_bytes().count(b"\n")
    replayed = launch("replay", "one")
    assert (replayed.returncode, replayed.stderr) == (0, "")
    assert replayed.stdout.startswith(f"{journal}: replays: {count} records, ")
    assert replayed.stdout.count("\n") == 1
    assert launch("replay", "one", "--lifecycle", "standard").returncode == 0
    way = launch("graph", "--journal", "one").stdout
    assert "(5) at " in way
    assert way.splitlines()[-1].split()[-1] == "ended"


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_session_whose_launcher_is_killed_replays_to_there(
    driver: str, launch: Launch, home: Path, environment: dict[str, str]
) -> None:
    argv = [LAUNCHER, "run", HELLO, "--session-id", "one", "--set", f"spec.driver={driver}", "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if b'"kind": "entered"' in line and b'"connecting"' in line:
                break
        running.send_signal(signal.SIGKILL)
    replayed = launch("replay", "one")
    assert replayed.returncode == 0, replayed.stdout
    assert "the session has not ended, or its launcher died: it stops at record " in replayed.stdout


def test_a_changed_lifecycle_is_told_from_history(launch: Launch, home: Path, tmp_path: Path) -> None:
    assert launch("run", HELLO, "--session-id", "one", "--set", "spec.driver=process").returncode == 0
    text = (ROOT / "specs/kenaz_specs/lifecycles/standard.yaml").read_text()
    other = tmp_path / "other.yaml"
    other.write_text(text.replace("      done: draining", "      done: stopping"))
    done = launch("replay", "one", "--lifecycle", str(other))
    assert (done.returncode, done.stderr) == (1, "")
    assert (
        "`done` in `running`: history leads to `draining`, the lifecycle leads to `stopping`" in done.stdout
    )
    assert f"lifecycle standard of {other}; line 65: to `stopping`" in done.stdout


def test_a_changed_byte_is_found(launch: Launch, home: Path, tmp_path: Path) -> None:
    assert launch("run", HELLO, "--session-id", "one", "--set", "spec.driver=process").returncode == 0
    lines = (home / "sessions/one/journal.jsonl").read_bytes().splitlines(keepends=True)
    lines[9] = lines[9].replace(b'"t":', b'"t": ')
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_bytes(b"".join(lines))
    done = launch("replay", str(damaged))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"kenaz-launcher: {damaged}:11: does not follow from the line before it")


def test_step_asks_on_a_terminal(launch: Launch, environment: dict[str, str]) -> None:
    journal = str(ROOT / "tests/journals/qemu-hello.journal.jsonl")
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [LAUNCHER, "replay", journal, "--step"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as stepping:
        os.close(theirs)
        os.write(ours, b"\n\nq\n")
        shown, deadline = b"", time.monotonic() + BOUND
        while time.monotonic() < deadline:
            try:
                chunk = os.read(ours, 1 << 16)
            except OSError:  # the other end has gone
                break
            shown += chunk
        assert stepping.wait(BOUND) == 0
    os.close(ours)
    assert b"looked at no further than record 2" in shown


def test_a_pipe_that_is_shut_is_no_failure(environment: dict[str, str]) -> None:
    journal = ROOT / "tests/journals/qemu-hello.journal.jsonl"
    done = subprocess.run(
        f"'{LAUNCHER}' replay '{journal}' --step | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=BOUND,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
