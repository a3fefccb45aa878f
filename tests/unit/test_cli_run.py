"""`run` from inside: what is refused before a session begins, and how failures become one line."""

from __future__ import annotations

import errno
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import trio

from kenaz_engine.cli import main as module
from kenaz_engine.cli.main import main
from kenaz_engine.cli.run import _Signals

Capture = pytest.CaptureFixture[str]

SPEC = """\
apiVersion: kenaz.dev/v1
kind: Session
metadata: {name: test, id: s1}
spec:
  driver: simulated
  driverOptions: {simulated: {script: {refuse: no memory, powerdown: 0}}}
"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KENAZ_STATE_DIR", str(tmp_path / "state"))
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return str(path)


@pytest.mark.parametrize(
    ("address", "code", "says"),
    [
        ("tcp:1", 2, "--harness tcp:1: it must be unix:PATH or loopback:FILE"),
        ("unix:", 2, "--harness unix:: it must be unix:PATH or loopback:FILE"),
        ("unix:/none/h", 3, "--harness: /none is no directory (name a socket in a directory that exists)"),
        ("unix:/", 2, "--harness: / is not a socket"),
    ],
)
def test_a_harness_that_cannot_be_is_refused(
    spec: str, capsys: Capture, address: str, code: int, says: str
) -> None:
    assert main(["run", spec, "--harness", address]) == code
    assert capsys.readouterr() == ("", f"kenaz-launcher: {says}\n")


def test_a_session_that_fails_is_told_with_its_hint(spec: str, capsys: Capture, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as harness:
        harness.bind(str(tmp_path / "h"))
        harness.listen()
        assert main(["run", spec, "--debug", "--harness", f"unix:{tmp_path / 'h'}"]) == 1
    out, err = capsys.readouterr()
    assert "failed: VM did not start: the scripted machine refuses: no memory, " in out
    assert out.endswith("  nothing left behind\n")
    assert err == ""


def test_what_runs_as_json_ends_with_a_result(spec: str, capsys: Capture) -> None:
    import json

    assert main(["run", spec, "--json"]) == 1
    *records, result = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (records[0]["kind"], records[-1]["kind"]) == ("header", "end")
    assert (result["kind"], result["exit"], result["left"]) == ("result", 1, [])


def test_a_state_directory_that_cannot_be_is_one_line(spec: str, capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    assert main(["run", spec]) == 3
    err = capsys.readouterr().err
    assert err.startswith("kenaz-launcher: the state directory ")
    assert err.count("\n") == 1


async def test_ctrl_break_is_a_signal_like_others_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    asked: list[tuple[str, str]] = []

    class Session:
        def request(self, event: str, by: str) -> None:
            asked.append((event, by))

    async with trio.open_nursery() as nursery:
        await nursery.start(_Signals(Session()).watch)  # type: ignore[arg-type]
        for sent in (1, 2):
            signal.raise_signal(signal.SIGUSR1)
            with trio.fail_after(5):
                while len(asked) < sent:
                    await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    assert asked == [("end", "signal"), ("abort", "signal")]


# The command itself


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        ([], 2, "usage: kenaz-launcher COMMAND"),
        (["--help"], 0, "usage: kenaz-launcher COMMAND"),
        (["--version"], 0, "kenaz-launcher "),
        (["rum"], 2, "there is no command 'rum' (did you mean 'run'?)"),
        (["zzz"], 2, "there is no command 'zzz' (known are run, "),
        (["run"], 2, "the following arguments are required: SPEC"),
        (["run", "--help"], 0, "--session-id"),
    ],
)
def test_the_command_line(capsys: Capture, argv: list[str], code: int, says: str) -> None:
    assert main(argv) == code
    assert says in "".join(capsys.readouterr())


def test_a_defect_is_one_line_and_a_traceback_where_asked_for(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(arguments: Any) -> int:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("kenaz_engine.cli.version.run", broken)
    assert main(["version"]) == 1
    assert capsys.readouterr().err == (
        "kenaz-launcher: internal error: ZeroDivisionError: by zero "
        "(this is a defect of kenaz-launcher; --debug shows where)\n"
    )
    assert main(["version", "--debug"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("internal error: ZeroDivisionError: by zero\n")


def test_what_the_host_lacks_is_no_defect(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: Any) -> int:
        raise ExceptionGroup("all at once", [OSError(errno.EMFILE, "Too many open files", "here"), OSError()])

    monkeypatch.setattr("kenaz_engine.cli.version.run", broken)
    assert main(["version"]) == 3
    assert capsys.readouterr().err == (
        "kenaz-launcher: here: Too many open files (raise the limit of open files: ulimit -n)\n"
    )


def test_an_interrupt_while_importing_is_quiet(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "import_module", interrupted)
    assert main(["version"]) == 130
    assert capsys.readouterr() == ("", "")
