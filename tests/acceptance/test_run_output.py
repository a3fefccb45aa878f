"""What `run` writes: a live line on a terminal, plain text into a pipe, JSON lines for programs."""

import json
import os
import pty
import re
import subprocess
import sys
from contextlib import closing
from importlib import resources

import jsonschema
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")

SILENT = {"behaviour": "mute", "timeouts.connecting": "500ms"}
"""A guest that stays silent for half a second."""

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
REDRAWN = re.compile(r"\r\x1b\[K  connecting +([0-9.]+)  s \.\.\.")


@pytest.fixture
def terminal(world):
    """Runs a session on a terminal of its own; returns the exit code and what the terminal was sent."""

    def run(environment, *words, **options):
        ours, theirs = pty.openpty()
        usual = {k: v for k, v in world.environment.items() if k not in {"NO_COLOR", "TERM"}}
        with os.fdopen(ours, "rb", buffering=0) as screen:
            child = subprocess.Popen(
                world.command(*words, **options),
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                env={**usual, "TERM": "xterm", **environment},
            )
            os.close(theirs)
            seen = b""
            with closing(screen):
                while True:
                    try:
                        data = screen.read(65536)
                    except OSError:  # the last one on the other end is gone
                        break
                    if not data:
                        break
                    seen += data
                return child.wait(60), seen.decode().replace("\r\n", "\n")

    return run


def shown(text):
    """The lines that stay on the terminal: each without what was drawn over."""
    return [line.rsplit("\r\x1b[K", 1)[-1] for line in text.split("\n")]


def test_on_a_terminal_the_current_line_is_redrawn_in_place(terminal):
    code, text = terminal({}, **{**SILENT, "timeouts.connecting": "3s"})
    assert code == 1
    times = [float(found) for found in REDRAWN.findall(text)]
    assert len(set(times)) >= 3
    assert times == sorted(times)
    states = [line.split()[0] for line in shown(text) if re.fullmatch(r"  [a-z]+ +\d+\.\d\d s", line)]
    assert states == ["resolving", "allocating", "booting", "connecting", "killing", "releasing"]
    assert "\x1b[31mfailed: guest did not dial in time\x1b[0m" in text
    assert shown(text)[-2:] == ["  nothing left behind", ""]
    # Nothing but colours and redrawing steers the terminal.
    assert "\x1b" not in COLOUR.sub("", text).replace("\r\x1b[K", "")


def test_a_success_is_green_on_a_terminal(terminal):
    code, text = terminal({}, behaviour="bye")
    assert code == 0
    assert "\x1b[32msucceeded\x1b[0m" in text
    assert "\x1b[31m" not in text


def test_no_color_leaves_the_redrawing_and_no_colours(terminal):
    code, text = terminal({"NO_COLOR": "1"}, **{**SILENT, "timeouts.connecting": "3s"})
    assert code == 1
    assert not COLOUR.search(text)
    assert len(REDRAWN.findall(text)) >= 3


def test_a_dumb_terminal_gets_plain_lines(terminal):
    code, text = terminal({"TERM": "dumb"}, **SILENT)
    assert code == 1
    assert "\x1b" not in text
    assert "\r" not in text
    assert "failed: guest did not dial in time" in text


def test_a_pipe_gets_plain_lines(world):
    del world.environment["NO_COLOR"]
    done = world.run(**SILENT)
    assert done.returncode == 1
    assert not re.search(r"[\x1b\r]", done.stdout + done.stderr)
    states = re.findall(r"^  ([a-z]+) +\d+\.\d\d s$", done.stdout, re.MULTILINE)
    assert states == ["resolving", "allocating", "booting", "connecting", "killing", "releasing"]


@pytest.fixture(scope="module")
def event_schema():
    """The schema of journal records; an event is one without the hash."""
    text = resources.files("kenaz_specs").joinpath("schemas/journal.schema.json").read_text("utf-8")
    schema = json.loads(text)
    schema["required"].remove("prev")
    return jsonschema.Draft202012Validator(schema)


MEMBERS = {
    "kind": str,
    "success": bool,
    "exit": int,
    "exit_code": int | None,
    "verdict": str,
    "seconds": float,
    "journal": str,
    "console": list,
    "left": list,
}


@pytest.mark.parametrize(
    ("options", "code", "verdict"),
    [
        ({}, 0, ""),
        (SILENT, 1, "guest did not dial in time"),
        ({"behaviour": "exit:3"}, 1, "VM exited while serving: the agent ended with code 3"),
    ],
)
def test_json_is_the_journal_line_by_line_and_a_result(world, event_schema, options, code, verdict):
    done = world.run("--json", "--session-id", "s1", **options)
    assert (done.returncode, done.stderr) == (code, "")
    *records, result = [json.loads(line) for line in done.stdout.splitlines()]
    for record in records:
        event_schema.validate(record)
    written = [{k: v for k, v in r.items() if k != "prev"} for r in world.records("s1")]
    assert records == written
    assert (records[0]["kind"], records[-1]["kind"]) == ("header", "end")

    assert result.keys() == MEMBERS.keys()
    for name, kind in MEMBERS.items():
        assert isinstance(result[name], kind), name
    assert result["kind"] == "result"
    assert (result["success"], result["exit"], result["exit_code"]) == (code == 0, code, None)
    assert result["verdict"] == verdict
    assert result["journal"] == str(world.directory("s1") / "journal.jsonl")
    assert result["left"] == []


def test_json_says_nothing_before_there_is_a_session(world):
    done = world.run("--json", driver="proces")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "did you mean" in done.stderr
