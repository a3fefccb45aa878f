"""`simulate` and `explore` as users call them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STANDARD = ROOT / "specs" / "kenaz_specs" / "lifecycles" / "standard.yaml"
SCENARIOS = ROOT / "specs" / "scenarios"


def launcher(
    *words: str | Path, cwd: Path | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "kenaz-launcher"), *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, input=stdin, capture_output=True, check=False, text=True, timeout=300
    )


@pytest.fixture
def leaking(tmp_path: Path) -> Path:
    """A lifecycle in which an error at work leads past the release."""
    text = STANDARD.read_text("utf-8")
    right = "error: {target: stopping, fail: protocol violated}"
    assert right in text
    path = tmp_path / "own.yaml"
    path.write_text(text.replace(right, "error: {target: failed, fail: protocol violated}"), "utf-8")
    return path


def test_the_shipped_scenarios_go_as_they_say() -> None:
    done = launcher("simulate", *sorted(SCENARIOS.glob("*.yaml")))
    assert (done.returncode, done.stderr) == (0, "")
    assert all(": ok: `" in line for line in done.stdout.splitlines())


def test_a_failure_shows_both_paths(tmp_path: Path) -> None:
    text = (SCENARIOS / "guest-panics.scenario.yaml").read_text("utf-8")
    path = tmp_path / "one.yaml"
    path.write_text(text.replace("running, killing,", "running, stopping, killing,"), "utf-8")
    done = launcher("simulate", path)
    assert done.returncode == 1
    assert "the path is another:" in done.stdout
    assert "- " in done.stdout
    assert "stopping" in done.stdout
    assert "by guest.panic, line" in done.stdout


def test_a_wrong_file_is_told_with_its_place_before_anything_runs(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("apiVersion: kenaz.dev/v1\nkind: Scenario\nmetadata: {name: one}\nlifecycle: standart\n")
    done = launcher("simulate", SCENARIOS / "harness-ends.scenario.yaml", wrong)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"{wrong}:4:12: lifecycle: there is no lifecycle `standart` (did you mean `standard`?)\n"
    )


def test_a_program_reads_json(tmp_path: Path) -> None:
    text = (SCENARIOS / "harness-ends.scenario.yaml").read_text("utf-8")
    done = launcher("simulate", "-", "--json", stdin=text)
    (one,) = json.loads(done.stdout)["scenarios"]
    assert (one["ok"], one["state"], one["left"], one["failures"]) == (True, "ended", [], [])
    assert one["path"][1] == {"state": "allocating", "t": 3.11, "event": "done", "line": 21}


def test_a_journal_is_written_once_and_replayed(tmp_path: Path) -> None:
    journal = tmp_path / "one.journal.jsonl"
    scenario = SCENARIOS / "image-server-stumbles.scenario.yaml"
    assert launcher("simulate", scenario, "--journal", journal).returncode == 0
    replayed = launcher("replay", journal)
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    again = launcher("simulate", scenario, "--journal", journal)
    assert (again.returncode, again.stderr) == (
        2,
        f"kenaz-launcher: {journal} is there already (name a new file)\n",
    )
    both = launcher("simulate", scenario, scenario, "--journal", journal)
    assert (both.returncode, "is for one scenario" in both.stderr) == (2, True)


def test_what_explore_finds_simulate_shows(leaking: Path, tmp_path: Path) -> None:
    words = ["explore", "own.yaml", "--world", "harness-ends", "--order", "usual", "--write", "broken"]
    done = launcher(*words, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    file = tmp_path / "broken" / "standard-released-running.scenario.yaml"
    assert "broken: released: the image is still held when `failed` is reached" in done.stdout
    assert str(file.relative_to(tmp_path)) in done.stdout
    assert [*file.parent.iterdir()] == [file]
    shown = launcher("simulate", file)
    assert shown.returncode == 1
    assert "the image is still held when `failed` is reached" in shown.stdout
    leaking.write_text(STANDARD.read_text("utf-8"), "utf-8")
    assert launcher("simulate", file).returncode == 0


def test_explore_reports_to_programs_too() -> None:
    done = launcher("explore", "standard", "--faults", "0", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"], report["breaches"]) == (0, True, [])
    assert sum(transition["taken"] for transition in report["transitions"]) > 10
    assert report["states"]["running"] is True


def test_explore_lists_what_was_not_taken() -> None:
    done = launcher("explore", "standard", "--faults", "0", "--world", "idle")
    assert done.returncode == 0
    assert "  not taken: resolving --error--> releasing (line" in done.stdout
    assert "more\nok: no law was broken\n" in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["standart"], "there is no lifecycle and no file 'standart' (did you mean `standard`?)"),
        (["standard", "--world", "idel"], "there is no world 'idel' (did you mean `idle`?)"),
    ],
)
def test_explore_refuses_what_it_does_not_know(words: list[str], told: str) -> None:
    done = launcher("explore", *words)
    assert (done.returncode, done.stderr) == (2, f"kenaz-launcher: {told}\n")
