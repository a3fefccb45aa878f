"""The commands around `run`, as a user starts them."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPECS = ROOT / "specs"
LAUNCHER = Path(sys.executable).with_name("kenaz-launcher")
BOUND = 300

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    home = {"KENAZ_STATE_DIR": str(tmp_path / "state"), "KENAZ_CACHE_DIR": str(tmp_path / "cache")}
    return {**os.environ, **home, "HOME": str(tmp_path), "TERM": "xterm"} | {"NO_COLOR": ""}


@pytest.fixture
def launch(environment: dict[str, str]) -> Launch:
    def launch(*argv: str | bytes, stdin: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        command = [os.fsencode(LAUNCHER), *(os.fsencode(word) for word in argv)]
        return subprocess.run(
            command,
            input=stdin,
            check=False,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=BOUND,
            env=environment,
            cwd=cwd,
        )

    return launch


def test_all_that_is_shipped_is_valid(launch: Launch) -> None:
    files = sorted(map(str, [*SPECS.glob("sessions/*.yaml"), *SPECS.glob("kenaz_specs/lifecycles/*.yaml")]))
    assert len(files) >= 4
    done = launch("validate", *files)
    assert done.returncode == 0
    assert [line.split(": ")[:2] for line in done.stdout.splitlines()] == [[file, "ok"] for file in files]


def test_validate_imports_nothing_that_takes_long(launch: Launch, environment: dict[str, str]) -> None:
    code = "import sys; from kenaz_engine.cli.main import main; main(sys.argv[1:]); print(*sys.modules)"
    for file in ("sessions/hello.yaml", "kenaz_specs/lifecycles/standard.yaml"):
        argv = [sys.executable, "-c", code, "validate", str(SPECS / file)]
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=BOUND, env=environment, check=True
        )
        loaded = set(done.stdout.splitlines()[-1].split())
        assert "kenaz_engine.lifecycle.analysis" in loaded
        heavy = {"trio", "httpx", "transitions", "platformdirs", "importlib.metadata", "jsonschema"}
        assert not loaded & heavy


def test_the_spec_may_come_from_stdin(launch: Launch) -> None:
    spec = (SPECS / "sessions/simulated.yaml").read_text()
    assert launch("validate", "-", stdin=spec).stdout.startswith("<stdin>: ok: ")
    assert "driver simulated: named by <stdin>:8:11" in launch("plan", "-", stdin=spec).stdout
    assert launch("graph", "-", "--format", "dot", stdin=spec).stdout.startswith('digraph "standard" {')


def test_plan_of_a_process_makes_nothing(launch: Launch, tmp_path: Path) -> None:
    done = launch("plan", "specs/sessions/hello.yaml", "--set", "spec.driver=process", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    plan = json.loads(done.stdout)
    assert plan["driver"]["name"] == "process"
    assert plan["isolates"] is False
    assert plan["command"]["argv"][0] == sys.executable
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["validate"], 2),
        (["validate", b"\xff\x1b[2J.yaml"], 2),
        (["validate", "x\ny.yaml"], 2),
        (["validate", "/"], 2),
        (["graph", b"\xff"], 2),
        (["graph", "nothing"], 2),
        (["plan", "none.yaml"], 2),
        (["plan", "specs/sessions/hello.yaml", "--set", "spec.driver=nix"], 2),
        (["plan", "specs/sessions/hello.yaml", "--set", "nonsense"], 2),
        (["plan", "specs/sessions/hello.yaml", "--session-id", "../x"], 2),
        (["logs", "nothing"], 1),
        (["logs", b"\xff"], 1),
        (["logs", "x/../y", "-f"], 1),
        (["end", "nothing", "--wait"], 1),
        (["end", "nothing", "--wait=soon"], 2),
        (["image", "pull", "nothing"], 1),
        (["image", "pull", "https://[/", "--sha256", "0"], 2),
        (["image", "verify", b"\xff"], 1),
        (["doctor", "--driver", "nothing"], 2),
        (["psx"], 2),
    ],
)
def test_bad_input_ends_in_words(launch: Launch, argv: list[str | bytes], code: int) -> None:
    done = launch(*argv)
    assert done.returncode == code
    assert done.stderr
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    assert done.stderr.replace("\n", "").isprintable()


def test_no_sessions_yet(launch: Launch) -> None:
    assert launch("ps", "--json").stdout == "[]\n"
    assert launch("ps", "--all").stdout.splitlines() == ["ID  STATUS  STATE  DRIVER  AGE  JOURNAL"]


def test_doctor_is_honest_about_a_bare_home(launch: Launch) -> None:
    done = launch("doctor", "--driver", "simulated", "--json")
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert [driver["name"] for driver in report["drivers"]] == ["simulated"]
    assert {part["name"]: part["ok"] for part in report["host"]}["image"] is False


def test_a_reader_that_goes_away_is_no_error(environment: dict[str, str]) -> None:
    command = [LAUNCHER, "graph", "standard", "--format", "dot"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(BOUND) == 0


def test_a_terminal_gets_colours(environment: dict[str, str]) -> None:
    for no_color, coloured in (("", True), ("1", False)):
        ours, theirs = pty.openpty()
        env = {**environment, "NO_COLOR": no_color}
        command = [LAUNCHER, "validate", SPECS / "sessions/simulated.yaml"]
        subprocess.run(command, stdout=theirs, stderr=theirs, env=env, timeout=BOUND, check=True)
        said = os.read(ours, 4096)
        os.close(theirs)
        os.close(ours)
        assert (b"\x1b[32mok\x1b[0m" in said) is coloured


def test_ctrl_c_ends_follow(environment: dict[str, str], tmp_path: Path) -> None:
    import fcntl

    directory = tmp_path / "state/sessions/s"
    directory.mkdir(parents=True)
    (directory / "console.log").write_text("first words\n")
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [LAUNCHER, "logs", "s", "--console", "-f"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"first words\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(BOUND) == 130
            assert process.stderr is not None
            assert process.stderr.read() == b""


def test_a_living_session_is_seen_followed_and_ended(
    launch: Launch, environment: dict[str, str], tmp_path: Path
) -> None:
    address = tmp_path / "harness.sock"
    overrides = ["--set", "spec.driver=process", "--set", "spec.timeouts.draining=300ms"]
    argv = ["run", "specs/sessions/hello.yaml", "--session-id", "live-1", "--json", *overrides]
    pipes = {"stdout": subprocess.PIPE, "text": True, "env": environment, "cwd": ROOT}
    # A harness that says nothing: the session serves until it is asked to end, and drains in vain.
    with socket.socket(socket.AF_UNIX) as harness:
        harness.bind(os.fspath(address))
        harness.listen()
        with subprocess.Popen([LAUNCHER, *argv, "--harness", f"unix:{address}"], **pipes) as session:
            try:
                assert session.stdout is not None
                while json.loads(session.stdout.readline()).get("activity") != "session.serve":
                    pass
                with subprocess.Popen([LAUNCHER, "logs", "live", "-f"], **pipes) as followed:
                    (listed,) = json.loads(launch("ps", "--json").stdout)
                    assert (listed["id"], listed["status"], listed["state"]) == (
                        "live-1",
                        "running",
                        "running",
                    )
                    done = launch("end", "live", "--wait")
                    assert (done.returncode, done.stdout, done.stderr) == (0, "live-1: succeeded\n", "")
                    said, _ = followed.communicate(timeout=BOUND)
                assert followed.returncode == 0
                assert said.splitlines()[-1].endswith("ended in ended, success")
                session.communicate(timeout=BOUND)
                assert session.returncode == 0
            finally:
                session.terminate()
    assert launch("ps", "--json").stdout == "[]\n"
    done = launch("end", "live-1")
    assert (done.returncode, done.stderr) == (1, "kenaz-launcher: session live-1 has ended already\n")
    records = (tmp_path / "state/sessions/live-1/journal.jsonl").read_text()
    assert launch("logs", "live-1", "--json").stdout == records
