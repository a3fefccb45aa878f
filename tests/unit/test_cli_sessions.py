"""`ps`, `logs` and `end` on sessions made by hand: a directory, a lock, a journal, a control socket."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from kenaz_drivers._common.identity import identify
from kenaz_drivers.contract import DriverError
from kenaz_engine.channel.transports.unix import listen_unix
from kenaz_engine.cli import end, logs, ps
from kenaz_engine.cli.main import main
from kenaz_engine.cli.reap import lines
from kenaz_engine.journal.writer import Journal
from kenaz_engine.session.control import serve_control
from kenaz_engine.session.ledger import Entry, Left
from kenaz_engine.session.locks import Lock, try_lock
from kenaz_engine.session.reap import Reaped

Capture = pytest.CaptureFixture[str]

HEADER = {"format": 1, "session": "s", "launcher": "1", "driver": "qemu", "accelerator": "tcg"}
STARTED = 1_700_000_000.0

RECORDS: list[tuple[str, dict[str, Any]]] = [
    ("header", HEADER),
    ("entered", {"state": "booting", "entry": 1, "activity": "vm.start", "timeout": 60.0}),
    ("intent", {"id": 1, "resource": "vm", "type": "machine", "intent": {"driver": "qemu", "argv": ["x"]}}),
    ("acquired", {"id": 1, "resource": "vm", "type": "machine", "handle": {"pid": 7, "argv": []}}),
    ("acquired", {"id": 2, "resource": "disk", "type": "file", "handle": {"path": "/d", "inode": 3}}),
    ("event", {"type": "done", "data": {"acquired": {"disk": 2}, "clock": {}, "clean": True}}),
    ("event", {"type": "error", "data": {"message": "it\x1b[2J broke", "hint": ""}}),
    ("decision", {"state": "booting", "reason": "stale"}),
    ("decision", {"state": "killing", "verdict": "VM did not start"}),
    ("backoff", {"entry": 1, "attempt": 2, "seconds": 1.5}),
    ("entered", {"state": "killing", "entry": 2, "activity": "vm.kill", "timeout": None}),
    ("activity", {"activity": "vm.start", "entry": 1, "ended": "cancelled"}),
    ("note", {"about": "release", "id": 1, "error": "no"}),
    ("channel", {"message": "hello", "size": 0}),
    ("released", {"id": 1, "resource": "vm", "type": "machine"}),
]
FAILED = (
    "end",
    {"state": "failed", "success": False, "verdict": "VM did not start", "left": [{"resource": "vm"}]},
)
ENDED = ("end", {"state": "ended", "success": True, "left": []})

SHOWN = """\
     0.000  session s: qemu (tcg), kenaz-launcher 1
     1.000  entered booting: vm.start, at most 60 s
     2.000  makes the vm (driver=qemu)
     3.000  holds the vm (pid=7)
     4.000  holds the disk (path=/d)
     5.000  event done (acquired={"disk": 2}, clean=true)
     6.000  event error (message=it\\x1b[2J broke)
     7.000    nothing follows: stale
     8.000    leads to killing, failed: VM did not start
     9.000  attempt 2 in 1.5 s
    10.000  entered killing: vm.kill, no deadline
    11.000  vm.start cancelled
    12.000  note release (id=1, error=no)
    13.000  channel (message=hello, size=0)
    14.000  gave back the vm
    15.000  ended in failed, failure: VM did not start; left behind: vm
"""


@dataclass
class Sessions:
    """Makes sessions below one state directory."""

    home: Path
    locks: list[Lock] = field(default_factory=list)

    def put(self, name: str, *records: tuple[str, dict[str, Any]], alive: bool = False) -> Path:
        directory = self.home / "sessions" / name
        directory.mkdir(mode=0o700, parents=True)
        ticks = iter(range(100))
        journal = Journal(
            directory / "journal.jsonl",
            monotonic=lambda: float(max(0, next(ticks) - 1)),
            wall=lambda: STARTED,
        )
        for kind, fields in records:
            journal.append(kind, fields)
        journal.close()
        if alive:
            self.lock(directory)
        return directory

    def lock(self, directory: Path) -> Lock:
        lock = try_lock(directory / "lock")
        assert lock is not None
        self.locks.append(lock)
        return lock


@pytest.fixture
def sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sessions]:
    monkeypatch.setenv("KENAZ_STATE_DIR", str(tmp_path / "s"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    made = Sessions(tmp_path / "s")
    yield made
    for lock in made.locks:
        lock.close()


# --- ps -----------------------------------------------------------------------------------------------------


def test_ps_of_nothing_is_a_heading(sessions: Sessions, capsys: Capture) -> None:
    assert main(["ps"]) == 0
    assert capsys.readouterr().out == "ID  STATUS  STATE  DRIVER  AGE  JOURNAL\n"
    assert main(["ps", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_ps_tells_the_living_from_the_dead(
    sessions: Sessions, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kenaz_engine.cli.ps.time.time", lambda: STARTED + 190)
    alive = sessions.put("alive", *RECORDS[:2], alive=True)
    dead = sessions.put("dead", *RECORDS[:9])
    ended = sessions.put("done", *RECORDS, ("end", {**FAILED[1], "left": []}))
    sessions.put("part", *RECORDS, FAILED)
    empty = sessions.put("empty")
    (sessions.home / "sessions" / ".creating").touch()
    assert main(["ps"]) == 0
    rows = [
        line.replace("dead, to be reaped", "dead").split() for line in capsys.readouterr().out.splitlines()
    ]
    assert rows[1:] == [
        ["alive", "running", "booting", "qemu", "3m10s", f"{alive}/journal.jsonl"],
        ["dead", "dead", "killing", "qemu", "3m10s", f"{dead}/journal.jsonl"],
        ["empty", "dead", "-", "-", "-", f"{empty}/journal.jsonl"],
        ["part", "dead", "killing", "qemu", "3m10s", f"{sessions.home}/sessions/part/journal.jsonl"],
    ]
    assert main(["ps", "--all", "--json"]) == 0
    listed = {session["id"]: session for session in json.loads(capsys.readouterr().out)}
    assert list(listed) == ["alive", "dead", "done", "empty", "part"]
    assert listed["done"] == {
        "id": "done",
        "status": "ended",
        "state": "killing",
        "driver": "qemu",
        "started": "2023-11-14T22:13:20+00:00",
        "age": 190.0,
        "success": False,
        "journal": f"{ended}/journal.jsonl",
    }
    assert listed["empty"]["started"] is None


def test_ps_shows_a_damaged_journal_as_none(sessions: Sessions) -> None:
    from kenaz_engine.session.directory import see

    directory = sessions.put("odd", *RECORDS)
    (directory / "journal.jsonl").write_text("nonsense\n")
    assert ps.session_data(see(directory), STARTED)["driver"] is None


# --- naming -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["logs", "end"])
@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("hell", "'hell' is the beginning of several sessions (which one: hello-1, hello-2?)"),
        ("helo-1", "there is no session 'helo-1' (did you mean hello-1"),
        ("zzz", "there is no session 'zzz' (`kenaz-launcher ps --all` lists all there are)"),
        ("", "there is no session ''"),
        ("..", "there is no session '..'"),
    ],
)
def test_a_session_that_cannot_be_told(
    sessions: Sessions, capsys: Capture, command: str, word: str, message: str
) -> None:
    sessions.put("hello-1", *RECORDS, ENDED)
    sessions.put("hello-2", *RECORDS, ENDED)
    assert main([command, word]) == 1
    assert message in capsys.readouterr().err


def test_no_sessions_at_all(sessions: Sessions, capsys: Capture) -> None:
    assert main(["logs", "x"]) == 1
    assert "there is no session 'x'" in capsys.readouterr().err


def test_a_long_list_is_cut(sessions: Sessions, capsys: Capture) -> None:
    for number in range(11):
        sessions.put(f"many-{number:02}")
    assert main(["logs", "many"]) == 1
    assert "many-07 and 3 more?" in capsys.readouterr().err


def test_the_beginning_of_one_id_is_enough(sessions: Sessions, capsys: Capture) -> None:
    sessions.put("hello", *RECORDS[:1])
    sessions.put("hello~1", *RECORDS[:2])
    for word, count in (("hel", 1), ("hello", 1), ("hello~1", 2)):
        assert main(["logs", word]) == 0
        assert len(capsys.readouterr().out.splitlines()) == count


# --- logs ---------------------------------------------------------------------------------------------------


def test_logs_says_what_happened_and_when(
    sessions: Sessions, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    monkeypatch.setattr("kenaz_engine.cli.logs.time.localtime", time.gmtime)
    sessions.put("s", *RECORDS, FAILED)
    assert main(["logs", "s"]) == 0
    assert capsys.readouterr().out == "".join(f"22:13:20.000 {line}\n" for line in SHOWN.splitlines())


def test_a_record_may_say_less_than_usual() -> None:
    assert logs.line_of({"kind": "end"}) == "--:--:--.---             ended in None, failure: see above"
    assert logs.line_of({"kind": "event", "type": "x", "data": 7, "t": 1}).endswith("event x")
    assert logs.line_of({"kind": "intent", "resource": "vm", "intent": None}).endswith("makes the vm")
    assert logs.line_of({"kind": "end", "success": True, "state": "ended"}).endswith(
        "ended in ended, success"
    )


def test_logs_json_is_the_journal_to_the_byte(sessions: Sessions, capfdbinary: Any) -> None:
    directory = sessions.put("s", *RECORDS)
    with (directory / "journal.jsonl").open("ab") as file:
        file.write(b'{"torn')
    assert main(["logs", "s", "--json"]) == 0
    assert capfdbinary.readouterr().out == (directory / "journal.jsonl").read_bytes()


def test_logs_leaves_a_torn_line_out_and_stops_at_damage(sessions: Sessions, capsys: Capture) -> None:
    directory = sessions.put("s", *RECORDS)
    journal = directory / "journal.jsonl"
    content = journal.read_bytes()
    journal.write_bytes(content + b'{"torn')
    assert main(["logs", "s"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(RECORDS)
    journal.write_bytes(content.replace(b"booting", b"running", 1))
    assert main(["logs", "s"]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert f"{journal}:3: does not follow from the line before it" in err


def test_logs_of_what_is_not_there(sessions: Sessions, capsys: Capture) -> None:
    directory = sessions.put("s")
    assert main(["logs", "s", "--console"]) == 1
    assert "session s has no console.log" in capsys.readouterr().err
    (directory / "console.log").mkdir()
    assert main(["logs", "s", "--console"]) == 1
    assert "console.log cannot be read: Is a directory" in capsys.readouterr().err
    assert main(["logs", "s", "--console", "--json"]) == 2
    assert "--console has no --json form" in capsys.readouterr().err


def test_a_terminal_gets_no_control_characters_of_the_guest(
    sessions: Sessions, capfdbinary: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = b"\x1b[31mred\x1b[0m\r\n\x07bell \xc2\x9b2J\nlast"
    (sessions.put("s") / "console.log").write_bytes(said)
    assert main(["logs", "s", "--console"]) == 0
    assert capfdbinary.readouterr().out == said
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["logs", "s", "--console"]) == 0
    assert capfdbinary.readouterr().out == b"red\nbell \\x9b2J\nlast\n"


def test_follow_stays_until_the_session_ends(
    sessions: Sessions, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = sessions.put("s", alive=True)
    journal = directory / "journal.jsonl"
    whole = sessions.put("other", *RECORDS, ENDED) / "journal.jsonl"
    lines = whole.read_bytes().splitlines(keepends=True)

    def meanwhile(seconds: float) -> None:
        """The launcher's next line, in two halves; the lock goes with the last."""
        if not lines:
            sessions.locks[0].close(remove=True)
            return
        with journal.open("ab") as file:
            half = lines[0][:9]
            file.write(half if not journal.read_bytes().endswith(half) else lines.pop(0)[9:])

    monkeypatch.setattr("kenaz_engine.cli.logs.time.sleep", meanwhile)
    assert main(["logs", "s", "-f"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == len(RECORDS) + 1
    assert out[-1].endswith("ended in ended, success")


# --- end ----------------------------------------------------------------------------------------------------


async def photograph(path: str) -> None:
    if "screen" in path:
        raise DriverError("this machine has no screen", hint="machine.display: vnc or window")
    await trio.Path(path).write_bytes(b"PNG")


@contextlib.contextmanager
def serving(directory: Path, heard: Callable[[str], None]) -> Iterator[None]:
    """The control socket of a living session, in a thread with a trio of its own."""
    ready, stop = threading.Event(), trio.Event()
    token: list[trio.lowlevel.TrioToken] = []

    async def serve() -> None:
        token.append(trio.lowlevel.current_trio_token())
        listener = listen_unix(directory / "control.sock")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_control, listener, heard, photograph)
            ready.set()
            await stop.wait()
            nursery.cancel_scope.cancel()
        await listener.aclose()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    try:
        assert ready.wait(10)
        yield
    finally:
        token[0].run_sync_soon(stop.set)
        thread.join(10)


@pytest.mark.parametrize(("option", "command"), [([], "end"), (["--abort"], "abort")])
def test_end_asks_the_session(sessions: Sessions, capsys: Capture, option: list[str], command: str) -> None:
    directory = sessions.put("hello-1", *RECORDS, alive=True)
    sessions.put("hello-2", *RECORDS, ENDED)
    heard: list[str] = []
    with serving(directory, heard.append):
        assert main(["end", "hello", *option]) == 0
    assert heard == [command]
    assert capsys.readouterr().out == f"hello-1: asked to {command}\n"


def test_a_picture_appears_whole_or_not_at_all(sessions: Sessions, capsys: Capture, tmp_path: Path) -> None:
    directory = sessions.put("hello-1", *RECORDS, alive=True)
    with serving(directory, lambda command: None):
        assert main(["screenshot", "hello", str(tmp_path / "out.png")]) == 0
        assert (tmp_path / "out.png").read_bytes() == b"PNG"
        assert main(["screenshot", "hello", str(tmp_path / "screen.png")]) == 1
    assert "this machine has no screen (machine.display: vnc or window)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if "png" in path.name] == ["out.png"]


@pytest.mark.parametrize(
    ("last", "code", "message"),
    [
        (ENDED, 0, "s: succeeded\n"),
        (FAILED, 0, "s: failed: VM did not start\n"),
        (("end", {"state": "ended", "success": False}), 0, "s: failed: something was left behind\n"),
        (
            None,
            1,
            "session s is dead: its launcher is gone (`kenaz-launcher reap s` gives back what it held)",
        ),
    ],
)
def test_end_waits_for_the_end(
    sessions: Sessions,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    last: tuple[str, dict[str, Any]] | None,
    code: int,
    message: str,
) -> None:
    directory = sessions.put("s", *RECORDS, *([last] if last else []), alive=True)
    monkeypatch.setattr("kenaz_engine.cli.end.time.sleep", lambda _: sessions.locks[0].close(remove=True))
    with serving(directory, lambda _: None):
        assert main(["end", "s", "--wait"]) == code
    assert message in "".join(capsys.readouterr())


def test_end_does_not_wait_for_ever(
    sessions: Sessions, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = sessions.put("s", *RECORDS, alive=True)
    clock = iter([0.0, 59.0, 60.0])
    monkeypatch.setattr("kenaz_engine.cli.end.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("kenaz_engine.cli.end.time.sleep", lambda _: None)
    with serving(directory, lambda _: None):
        assert main(["end", "s", "--wait=1m"]) == 1
    assert "session s has not ended within 1m (`kenaz-launcher logs s`" in capsys.readouterr().err


def test_end_of_what_does_not_run(sessions: Sessions, capsys: Capture) -> None:
    sessions.put("over", *RECORDS, ENDED)
    sessions.put("dead", *RECORDS)
    sessions.put("mute", *RECORDS, alive=True)
    for name, message in (
        ("over", "session over has ended already"),
        ("dead", "session dead is dead: its launcher is gone"),
        ("mute", "session mute cannot be asked to end: its control socket does not answer: "),
    ):
        assert main(["end", name]) == 1
        assert message in capsys.readouterr().err


def test_a_session_may_end_while_it_is_asked(
    sessions: Sessions, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kenaz_engine.session.control import ControlError

    sessions.put("s", *RECORDS, ENDED, alive=True)

    async def gone(path: Path, command: str) -> None:
        sessions.locks[0].close(remove=True)
        raise ControlError("no such socket")

    monkeypatch.setattr(end, "ask", gone)
    assert main(["end", "s"]) == 1
    assert "session s has ended already" in capsys.readouterr().err


@pytest.mark.parametrize("patience", ["x", "-1", "1.5.2", ""])
def test_a_wait_that_is_no_time(sessions: Sessions, capsys: Capture, patience: str) -> None:
    assert main(["end", "s", f"--wait={patience}"]) == 2
    assert "is no time; write --wait=60 or --wait=2m" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["end", "kill"])
def test_which_sessions_has_to_be_said(sessions: Sessions, capsys: Capture, command: str) -> None:
    """Nothing is done to any session where one of the words is wrong."""
    heard: list[str] = []
    with serving(sessions.put("hello-1", *RECORDS, alive=True), heard.append):
        sessions.put("hello-2", *RECORDS, alive=True)
        for words, code, message in (
            ([], 2, "say which sessions, or --all"),
            (["--all", "hello-1"], 2, "say which sessions, or --all"),
            (
                ["hello-1", "hello"],
                1,
                "'hello' is the beginning of several sessions (which one: hello-1, hello-2?)",
            ),
            (["hello-1", "helo-1"], 1, "there is no session 'helo-1' (did you mean hello-1"),
        ):
            assert main([command, *words]) == code
            assert message in capsys.readouterr().err
    assert heard == []


@pytest.mark.parametrize("command", ["end", "kill"])
def test_all_of_nothing_is_nothing(sessions: Sessions, capsys: Capture, command: str) -> None:
    sessions.put("over", *RECORDS, ENDED)
    assert main([command, "--all"]) == 0
    assert capsys.readouterr().out == "no session runs\n"


def test_end_all_asks_each_that_runs_and_one_that_is_mute_stops_no_other(
    sessions: Sessions, capsys: Capture
) -> None:
    heard: list[str] = []
    sessions.put("a-mute", *RECORDS, alive=True)
    sessions.put("c-dead", *RECORDS)
    with serving(sessions.put("b", *RECORDS, alive=True), heard.append):
        assert main(["end", "--all"]) == 1
    printed = capsys.readouterr()
    assert (heard, printed.out) == (["end"], "b: asked to end\n")
    assert "`kenaz-launcher kill a-mute` ends it all the same" in printed.err
    assert printed.err.count("\n") == 1


def test_a_session_that_has_only_just_begun_is_not_killed(sessions: Sessions, capsys: Capture) -> None:
    sessions.put("s", alive=True)
    assert main(["kill", "s"]) == 1
    assert "session s has only just begun (try again)" in capsys.readouterr().err


def test_who_reaps_is_seen_and_can_be_killed(sessions: Sessions, capsys: Capture) -> None:
    """A reaper that hangs, too, holds the lock; its own record names it."""
    with subprocess.Popen(["sleep", "600"]) as reaper:
        process = identify(reaper.pid)
        path = sessions.put("s", *RECORDS, ("reap", {"launcher": "1", "process": process}), alive=True)
        assert main(["ps"]) == 0
        assert capsys.readouterr().out.splitlines()[1].split()[1] == "reaping"
        assert main(["kill", "s"]) == 1  # our lock is not its
        assert f"s: process {reaper.pid}, which held it, did not answer" in capsys.readouterr().out
        assert reaper.wait(10) == -9
    assert path.exists()


def test_reap_says_what_came_of_each(sessions: Sessions, capsys: Capture) -> None:
    sessions.put("copy", *RECORDS)
    sessions.put("live", *RECORDS, alive=True)
    sessions.put("over", *RECORDS, ENDED)
    assert main(["reap", "copy", "live"]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "copy: left alone: its journal is that of another place: this directory was copied"
    )
    assert second == "live: runs; `kenaz-launcher end live` ends it"
    assert main(["reap", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], [one["id"] for one in told["sessions"]], told["removed"]) == (False, ["copy"], [])
    assert main(["reap", "copy", "--older-than", "1h"]) == 2
    assert "--older-than is for all sessions" in capsys.readouterr().err
    assert main(["reap", "--older-than", "soon"]) == 2
    assert "'soon' is no duration" in capsys.readouterr().err


def test_reap_tells_what_is_left_in_part() -> None:
    entry = Entry(1, "disk", "file", {}, frozenset(), 5.0)
    left = (Left(2, "vm", "machine", "does not die"),)
    assert list(lines(Reaped("s", Path("s"), "left", (entry,), left))) == [
        "s: reaped in part: gave back disk",
        "s: left behind: the vm does not die",
    ]
    assert list(lines(Reaped("s", Path("s"), "left", (), (), "the disk /d"))) == [
        "s: reaped in part: gave back nothing",
        "s: left behind: the disk /d",
    ]
    assert list(lines(Reaped("s", Path("s"), "reaped"))) == ["s: reaped: it held nothing"]
    assert list(lines(Reaped("s", Path("s"), "dead"))) == ["s: dead: would find that it held nothing"]
