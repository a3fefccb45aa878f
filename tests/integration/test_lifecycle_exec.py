"""The lifecycle ephemeral-exec: one command, its output and its exit code, on real guests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kenaz_engine.guest.build import build

SPEC = Path(__file__).parents[2] / "specs/sessions/exec.yaml"
SECONDS = 240.0

Record = dict[str, Any]

needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-system-x86_64") is None or shutil.which("apt-get") is None,
    reason="needs QEMU and a Debian host",
)


def environment(state: Path) -> dict[str, str]:
    return {**os.environ, "XDG_STATE_HOME": str(state)}


def command(driver: str, *argv: str, **settings: str) -> list[str]:
    settings = {"spec.driver": driver, "spec.workbench.args": json.dumps(argv), **settings}
    pairs = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return [sys.executable, "-m", "kenaz_engine.cli.main", "run", str(SPEC), "--json", *pairs]


Execute = Callable[..., tuple[int, Record, str, str]]


@pytest.fixture
def execute(tmp_path: Path) -> Execute:
    """Runs a command in a guest: exit code of `run`, its result, what the command wrote, the journal."""

    def run(driver: str, *argv: str, **settings: str) -> tuple[int, Record, str, str]:
        ran = subprocess.run(
            command(driver, *argv, **settings),
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert ran.stdout, ran.stderr
        result = json.loads(ran.stdout.splitlines()[-1])
        assert result["kind"] == "result"
        assert result["left"] == []
        return ran.returncode, result, ran.stderr, Path(result["journal"]).read_text()

    return run


def test_a_command_that_succeeds_is_a_success(execute: Execute) -> None:
    status, result, wrote, journal = execute("process", "sh", "-c", "echo out; echo 'CANARY err' >&2")
    assert (status, result["success"], result["exit_code"]) == (0, True, 0)
    assert sorted(wrote.splitlines()) == ["CANARY err", "out"]
    assert "CANARY" not in journal.split("\n", 1)[1], "output is not for the journal"


def test_a_command_that_fails_is_a_failure_with_its_code(execute: Execute) -> None:
    status, result, _, _ = execute("process", "sh", "-c", "exit 3")
    assert (status, result["success"], result["exit_code"]) == (1, False, 3)
    assert result["verdict"] == "the command failed: exit code 3"


def test_a_command_ended_by_a_signal_counts_from_128(execute: Execute) -> None:
    assert execute("process", "sh", "-c", "kill -KILL $$")[1]["exit_code"] == 128 + signal.SIGKILL


def test_a_command_that_is_not_there_is_no_command_that_failed(execute: Execute) -> None:
    status, result, _, _ = execute("process", "no-such-program")
    assert (status, result["exit_code"]) == (1, None)
    assert result["verdict"] == "the command could not be run: no-such-program: not_started"


def test_words_of_the_demo_are_no_words_here(execute: Execute) -> None:
    assert execute("process", "mute")[1]["verdict"].startswith("the command could not be run: mute")


def test_the_environment_is_the_workbenchs(execute: Execute) -> None:
    granted = {"spec.workbench.env.COLOUR": "blue"}
    assert execute("process", "sh", "-c", 'echo "$COLOUR $HARNESS_VM_TOKEN."', **granted)[2] == "blue .\n"


def test_much_output_is_shown_in_part_and_does_not_stop_the_command(execute: Execute) -> None:
    _, result, wrote, _ = execute("process", "sh", "-c", "yes CANARY | head -c 5000000; exit 4")
    assert result["exit_code"] == 4
    assert wrote.endswith("(only the first 262144 characters of the output are shown)\n")
    assert len(wrote) < 270_000


def test_what_is_no_text_is_replaced_and_no_line_commands_the_terminal(execute: Execute) -> None:
    wrote = execute("process", "printf", r"\377\033[2J\303\251")[2]
    assert "\x1b" not in wrote
    assert "\N{REPLACEMENT CHARACTER}" in wrote
    assert wrote.endswith("é\n")


def test_what_the_command_left_running_ends_with_it(execute: Execute, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    assert execute("process", "sh", "-c", f"sleep 600 & echo $! > {pid}")[0] == 0
    assert is_gone(int(pid.read_text()))


def test_a_command_that_takes_too_long_is_ended(execute: Execute, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = f"trap '' TERM; echo $$ > {pid}; while :; do sleep 600; done"
    status, result, _, _ = execute("process", "sh", "-c", script, **{"spec.timeouts.running": "8s"})
    assert (status, result["verdict"]) == (1, "the command took too long")
    assert is_gone(int(pid.read_text()))


@pytest.mark.parametrize("killed", ["launcher", "agent"])
def test_nothing_outlives_a_kill(tmp_path: Path, killed: str) -> None:
    """A command's group has a minder that hears of it when the agent ends, however that happens."""
    pid, parent = tmp_path / "pid", tmp_path / "parent"
    script = f"echo $PPID > {parent}; echo $$ > {pid}; sleep 600; echo not reached"
    with subprocess.Popen(
        command("process", "sh", "-c", script), env=environment(tmp_path), stdout=subprocess.DEVNULL
    ) as launcher:
        deadline = time.monotonic() + SECONDS
        while not (pid.exists() and pid.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if killed == "launcher":
            launcher.kill()
        else:
            status = Path(f"/proc/{parent.read_text().strip()}/status").read_text()
            agent = next(line for line in status.splitlines() if line.startswith("PPid:"))
            os.kill(int(agent.split()[1]), signal.SIGKILL)
        launcher.wait(SECONDS)
    assert is_gone(int(pid.read_text()))
    reap = [sys.executable, "-m", "kenaz_engine.cli.main", "reap"]
    subprocess.run(reap, env=environment(tmp_path), check=True, capture_output=True)


def test_a_command_beyond_a_frame_is_not_sent(execute: Execute) -> None:
    result = execute("process", "echo", "x" * 4096, **{"spec.channel.limits.frame": "4KiB"})[1]
    assert result["verdict"] == "the command could not be run: the command does not fit in a frame"


def test_without_a_command_nothing_is_begun(tmp_path: Path) -> None:
    ran = subprocess.run(
        command("process"), env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert "the lifecycle `ephemeral-exec` runs a command, and there is none" in ran.stderr
    assert not (tmp_path / "kenaz").exists()


@needs_qemu
def test_a_command_in_a_machine(execute: Execute) -> None:
    build("x86_64")
    status, result, wrote, _ = execute("qemu", "sh", "-c", "busybox uname -s; echo err >&2; exit 3")
    assert (status, result["exit_code"]) == (1, 3)
    assert sorted(wrote.splitlines()) == ["Linux", "err"]
    assert result["verdict"] == "the command failed: exit code 3"


def is_gone(pid: int) -> bool:
    """Whether the process ends, as one does that was killed."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False
