"""`replay`, `explain` and `graph --journal` from the command line, without a process."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from kenaz_engine.cli import replay as command
from kenaz_engine.cli.main import main
from kenaz_engine.journal.reader import read_journal
from kenaz_engine.journal.records import GENESIS, encode
from kenaz_engine.lifecycle import diagram
from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.lifecycle.visits import Visit, visits

JOURNALS = Path(__file__).parents[1] / "journals"
HELLO = str(JOURNALS / "qemu-hello.journal.jsonl")
ABORTED = str(JOURNALS / "qemu-aborted.journal.jsonl")

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def other(tmp_path: Path) -> str:
    """A lifecycle that leaves `running` another way."""
    source = resources.files("kenaz_specs") / "lifecycles" / "standard.yaml"
    path = tmp_path / "other.yaml"
    text = source.read_text("utf-8")
    path.write_text(text.replace("      done: draining", "      done: {target: stopping, warn: hasty}"))
    return str(path)


@pytest.fixture
def flipped(tmp_path: Path) -> str:
    path = tmp_path / "flipped.journal.jsonl"
    path.write_bytes(Path(HELLO).read_bytes().replace(b'"state":"booting"', b'"state":"bootinG"'))
    return str(path)


@pytest.fixture
def misshapen(tmp_path: Path) -> str:
    """A journal whose chain holds, and whose records do not say what they should."""
    records = read_journal(Path(HELLO)).records
    del records[3]["state"]
    path, prev = tmp_path / "misshapen.journal.jsonl", GENESIS
    with path.open("wb") as file:
        for record in records:
            line, prev = encode(record, prev)
            file.write(line)
    return str(path)


class TestReplay:
    """`kenaz-launcher replay`."""

    def test_one_journal(self, capsys: Capture) -> None:
        assert main(["replay", HELLO]) == 0
        assert capsys.readouterr().out == (
            f"{HELLO}: replays: 63 records, 9 events, lifecycle standard of its own header\n"
        )

    def test_one_that_diverges(self, other: str, capsys: Capture) -> None:
        assert main(["replay", HELLO, "--lifecycle", other]) == 1
        out = capsys.readouterr().out
        assert out.startswith(f"{HELLO}:41: history and lifecycle part at record 40: ")
        assert f"lifecycle standard of {other}; line 65: to `stopping`" in out

    def test_many_get_a_line_each(self, other: str, capsys: Capture) -> None:
        assert main(["replay", HELLO, ABORTED]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "2 journals: 2 replay, 0 diverge"
        assert main(["replay", HELLO, ABORTED, "--lifecycle", other, "--until", "50"]) == 1
        first, second, last = capsys.readouterr().out.splitlines()
        assert first.startswith(f"diverges  {HELLO}: diverges at record 40: `done` in `running`")
        assert second.startswith(f"ok        {ABORTED}: replays: 45 records")
        assert last == "2 journals: 1 replay, 1 diverge"

    def test_warnings_and_stops_are_on_the_line(self, tmp_path: Path, other: str, capsys: Capture) -> None:
        text = Path(other).read_text().replace("timeout: 90s", "timeout: 100ms")
        quick = tmp_path / "quick.yaml"
        quick.write_text(text)
        assert main(["replay", HELLO, ABORTED, "--lifecycle", str(quick), "--until", "35"]) == 0
        first = capsys.readouterr().out.splitlines()[0]
        assert first.endswith("; 1 warning; looked at no further than record 35")

    def test_a_damaged_one_is_told_with_its_line(self, flipped: str, misshapen: str, capsys: Capture) -> None:
        assert main(["replay", flipped]) == 2
        assert capsys.readouterr().err.startswith(
            f"kenaz-launcher: {flipped}:18: does not follow from the line before it"
        )
        assert main(["replay", misshapen]) == 2
        assert f"{misshapen}:4: is no `entered` record: 'state' is a required" in capsys.readouterr().err
        assert main(["replay", flipped, HELLO, "gone.jsonl"]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 2
        assert captured.out.splitlines()[-1] == "3 journals: 1 replay, 0 diverge, 2 cannot be read"

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("gone.jsonl", "gone.jsonl: there is no such journal (is the path right?)"),
            ("no/such", "no/such: there is no such journal"),
            ("nosuchsession", "there is no session 'nosuchsession'"),
            (str(JOURNALS), f"{JOURNALS}: cannot be read: Is a directory"),
        ],
    )
    def test_what_is_not_there(
        self, word: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        monkeypatch.setenv("KENAZ_STATE_DIR", str(tmp_path))
        assert main(["replay", word]) != 0
        assert message in capsys.readouterr().err

    def test_a_session_by_its_id(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        monkeypatch.setenv("KENAZ_STATE_DIR", str(tmp_path))
        directory = tmp_path / "sessions" / "hello-abc"
        directory.mkdir(parents=True)
        shutil.copy(HELLO, directory / "journal.jsonl")
        assert main(["replay", "hello"]) == 0
        assert "hello-abc/journal.jsonl: replays" in capsys.readouterr().out

    def test_as_json(self, other: str, flipped: str, capsys: Capture) -> None:
        assert main(["replay", HELLO, flipped, "--json", "--lifecycle", other]) == 2
        data = json.loads(capsys.readouterr().out)
        assert data["ok"] is False
        found, damaged = data["journals"]
        assert damaged["fault"].startswith(f"{flipped}:18: ")
        assert {name: found["divergence"][name] for name in ("seq", "line", "about", "event")} == {
            "seq": 40,
            "line": 41,
            "about": "decision",
            "event": "done",
        }
        assert (found["divergence"]["historyLine"], found["divergence"]["lifecycleLine"]) == (65, 65)
        assert found["divergence"]["differences"][0] == {
            "field": "state",
            "history": "draining",
            "lifecycle": "stopping",
        }
        assert main(["replay", HELLO, "--format", "json"]) == 0
        data = json.loads(capsys.readouterr().out)
        assert (data["ok"], data["journals"][0]["divergence"]) == (True, None)

    def test_step_shows_every_record(self, other: str, capsys: Capture) -> None:
        assert main(["replay", HELLO, "--step"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines if not line.lstrip().startswith("=")] == [
            *map(str, range(63)),
            f"{HELLO}:",
        ]
        assert f"{' ' * 18}= booting, entry 3; holds control, image, disk, config, socket" in lines
        assert f"{' ' * 18}= ended, entry 9; holds nothing" in lines
        assert main(["replay", HELLO, "--step", "--lifecycle", other]) == 1
        assert "history and lifecycle part at record 40" in capsys.readouterr().out
        assert main(["replay", ABORTED, "--step", "--until", "27"]) == 0
        assert ", failed: ended before the guest was ready; holds" in capsys.readouterr().out

    def test_step_waits_for_who_reads_on_a_terminal(
        self, monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        for typed, shown in (("\n\nq\n", 3), ("\n", 2)):
            monkeypatch.setattr(sys, "stdin", Terminal(typed))
            monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
            assert main(["replay", HELLO, "--step"]) == 0
            out = capsys.readouterr().out
            assert f"looked at no further than record {shown - 1}" in out

    def test_step_of_what_cannot_be_read(self, misshapen: str, tmp_path: Path, capsys: Capture) -> None:
        assert main(["replay", misshapen, "--step"]) == 2
        assert f"{misshapen}:4: is no `entered` record" in capsys.readouterr().err
        empty = tmp_path / "empty.jsonl"
        empty.touch()
        assert main(["replay", str(empty), "--step"]) == 0
        assert "the journal is empty" in capsys.readouterr().out

    @pytest.mark.parametrize("argv", [[HELLO, HELLO, "--step"], [HELLO, "--step", "--json"]])
    def test_step_is_for_one(self, argv: list[str], capsys: Capture) -> None:
        assert main(["replay", *argv]) == 2
        assert "--step is for one journal, as text" in capsys.readouterr().err

    def test_nothing_steers_the_terminal(self) -> None:
        assert command.plain_lines("a\x1b[2J\nb") == "a\\x1b[2J\nb"


class TestExplain:
    """`kenaz-launcher explain`."""

    def test_as_text(self, capsys: Capture) -> None:
        assert main(["explain", "standard", "draining", "vm.exited", "--data", "clean=true"]) == 0
        assert "`vm.exited` in `draining` leads to `releasing`" in capsys.readouterr().out

    def test_as_json(self, capsys: Capture) -> None:
        assert main(["explain", "standard", "releasing", "done", "--failed", "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        assert (data["leadsTo"], data["line"], data["considered"][0]["taken"]) == ("failed", 118, False)

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["nosuch", "a", "end"], "there is no lifecycle and no file 'nosuch'"),
            (["standard", "runing", "end"], "has no state 'runing' (did you mean `running`?)"),
            (["standard", "running", "end", "--data", "clean"], "--data 'clean' is not NAME=VALUE"),
            (["standard", "running", "end", "--counter", "n=1"], "has no counter 'n' (it counts nothing)"),
            (["standard", "running", "end", "--data", "x={"], "--data x:1:"),
        ],
    )
    def test_what_is_wrong(self, argv: list[str], message: str, capsys: Capture) -> None:
        assert main(["explain", *argv]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1

    def test_values_are_read_as_in_a_file(self, tmp_path: Path, capsys: Capture) -> None:
        source = resources.files("kenaz_specs") / "lifecycles" / "standard.yaml"
        text = source.read_text("utf-8").replace("done: draining", "done: {target: draining, count: laps}")
        path = tmp_path / "counting.yaml"
        path.write_text(text)
        for value, why in (("true", "true"), ('"true"', "'true'"), ("1", "1"), ("", "''")):
            data = ["--data", f"clean={value}", "--counter", "laps=2"]
            assert main(["explain", str(path), "draining", "vm.exited", *data]) == 0
            assert f"data.clean is {why}" in capsys.readouterr().out
        assert main(["explain", str(path), "running", "end", "--counter", "laps=many"]) == 2
        assert "'many' is not a number" in capsys.readouterr().err


class TestGraph:
    """`kenaz-launcher graph --journal`."""

    def test_the_way_taken_as_text(self, capsys: Capture) -> None:
        assert main(["graph", "--journal", ABORTED]) == 0
        out = capsys.readouterr().out
        assert "\n    (1) at 0.003 s, for 0.002 s\n" in out
        assert " -> stopping  fails  (4)\n" in out
        assert "\n    abort                                     -> killing  fails  (5)\n" in out
        way = out.split("the way taken\n")[1].splitlines()
        assert [line.split()[3] for line in way] == [
            *("resolving", "allocating", "booting", "connecting", "stopping", "killing", "releasing"),
            "failed",
        ]
        assert way[4].endswith("abort (line 126)")

    def test_the_way_taken_as_mermaid(self, capsys: Capture) -> None:
        assert main(["graph", "--journal", ABORTED, "--format", "mermaid"]) == 0
        out = capsys.readouterr().out
        assert "    connecting --> stopping: (4) end, guest.bye (fails)\n" in out
        assert "    ANY --> killing: (5) abort (fails)\n" in out
        assert "    class killing taken\n" in out
        assert "class running taken" not in out
        assert "    resolving: (1) at 0.003 s, for 0.002 s\n" in out

    def test_the_way_taken_as_dot(self, capsys: Capture) -> None:
        assert main(["graph", "--journal", ABORTED, "--format", "dot"]) == 0
        out = capsys.readouterr().out
        assert '" any" -> "killing" [label="(5) abort", style=dashed, color="#cc3333", penwidth=3];' in out
        assert '"running" [label="running\\nsession.serve\\nidle at most 30m", penwidth=3];' in out
        assert out.count('fillcolor="#ccddee"') == 8

    @pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
    def test_svg(self, capsys: Capture) -> None:
        assert main(["graph", "--journal", HELLO, "--format", "svg"]) == 0
        assert "</svg>" in capsys.readouterr().out

    def test_svg_without_graphviz(self, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
        monkeypatch.setenv("PATH", "")
        assert main(["graph", "standard", "--format", "svg"]) == 3
        assert "Graphviz, which is not installed (install the package graphviz" in capsys.readouterr().err

    def test_svg_that_graphviz_cannot_draw(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        program = tmp_path / "dot"
        program.write_text("#!/bin/sh\nexit 7\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        assert main(["graph", "standard", "--format", "svg"]) == 3
        assert "Graphviz could not draw it: " in capsys.readouterr().err

    @pytest.mark.parametrize("argv", [[], ["standard", "--journal", HELLO]])
    def test_one_thing_is_drawn(self, argv: list[str], capsys: Capture) -> None:
        assert main(["graph", *argv]) == 2
        assert "what is to be drawn?" in capsys.readouterr().err

    def test_what_cannot_be_read(self, misshapen: str, tmp_path: Path, capsys: Capture) -> None:
        assert main(["graph", "--journal", misshapen]) == 2
        assert f"{misshapen}:4: is no `entered` record" in capsys.readouterr().err
        empty = tmp_path / "empty.jsonl"
        empty.touch()
        assert main(["graph", "--journal", str(empty)]) == 2
        assert "empty.jsonl:1: there is no header" in capsys.readouterr().err


class TestVisits:
    """The way taken, from records."""

    def test_a_session_that_ended(self) -> None:
        way = visits(read_journal(Path(HELLO)).records)
        assert [visit.number for visit in way] == list(range(1, 10))
        assert way[4] == Visit(5, "running", way[4].at, way[4].seconds, "done", "draining", 65)
        assert way[-1] == Visit(9, "ended", way[-1].at)

    def test_a_session_that_stopped(self) -> None:
        way = visits(read_journal(JOURNALS / "qemu-launcher-killed.journal.jsonl").records)
        assert way[-1] == Visit(4, "connecting", way[-1].at)

    def test_a_defect_leads_nowhere(self) -> None:
        records = read_journal(Path(HELLO)).records[:17]
        end = {"kind": "end", "t": 9.0, "state": "allocating", "internal": "it broke"}
        way = visits([*records[:15], end])
        assert [(visit.state, visit.event) for visit in way] == [("resolving", "done"), ("allocating", "")]
        assert way[1].seconds == pytest.approx(9.0 - way[1].at)

    def test_without_lines_the_target_tells(self, standard: Lifecycle) -> None:
        way = [Visit(1, "releasing", 0.0, 1.0, "done", "failed"), Visit(2, "failed", 1.0)]
        drawn = diagram.text(standard, way, width=80)
        assert "    done [otherwise]" in drawn
        assert [line for line in drawn.splitlines() if line.endswith("-> failed  (1)")]
        assert not [line for line in drawn.splitlines() if line.endswith("-> ended  (1)")]

    def test_a_state_that_is_not_drawn(self, standard: Lifecycle) -> None:
        assert "elsewhere" in diagram.text(standard, [Visit(1, "elsewhere", 0.0)], width=80)

    @pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
    def test_graphviz_draws_it(self, standard: Lifecycle) -> None:
        source = diagram.dot(standard, visits(read_journal(Path(ABORTED)).records))
        drawn = subprocess.run(
            ["dot", "-Tsvg"], input=source, capture_output=True, text=True, timeout=30, check=True
        )
        assert drawn.stderr == ""
