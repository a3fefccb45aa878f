"""The pytest plugin, run by pytest as other people run it: in a repository of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = Path(__file__).parent / "example_repo"
HOW_TO = ROOT / "docs/how-to/test-lifecycles-in-your-repo.md"
BIN = Path(sys.executable).parent

SCENARIO = """\
apiVersion: kenaz.dev/v1
kind: Scenario
metadata: {name: panics}
lifecycle: standard
script:
  - {at: running/serve, after: 5s, event: guest.panic}
expect: {verdict: guest panicked}
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


def environment() -> dict[str, str]:
    """Ours, without what was meant for the pytest that runs this."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """The example repository, as a copy outside this tree."""
    copy = tmp_path / "theirs"
    shutil.copytree(EXAMPLE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture
def run(theirs: Path) -> Run:
    """Runs pytest in the example repository."""

    def run(*words: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
        command = [python, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", *words]
        return subprocess.run(
            command, cwd=theirs, env=environment(), check=False, capture_output=True, text=True
        )

    return run


def outcomes(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """How many passed, failed, ...; all output where there is no such line."""
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    found = re.findall(r"(\d+) (passed|failed|errors?|deselected)", last)
    assert found, done.stdout + done.stderr
    return {word: int(number) for number, word in found}


def test_the_example_repository_passes(run: Run) -> None:
    done = run("-v")
    assert outcomes(done) == {"passed": 6}
    assert "tests/guest-panics.scenario.yaml::simulate PASSED" in done.stdout
    assert "tests/unknown-guest.journal.jsonl::replay PASSED" in done.stdout


def test_the_how_to_shows_the_files_of_the_example_repository() -> None:
    blocks = re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)^```$", HOW_TO.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    for name, text in blocks:
        assert text == (EXAMPLE / name).read_text(), name


def test_the_example_repository_is_valid() -> None:
    files = sorted(EXAMPLE.rglob("*.yaml"))
    command = [str(BIN / "kenaz-launcher"), "validate", *map(str, files)]
    checked = subprocess.run(command, check=False, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.count(": ok: ") == len(files) >= 3


def test_failures_are_told_without_a_traceback(run: Run, theirs: Path) -> None:
    tests = theirs / "tests"
    good = (tests / "unknown-guest.journal.jsonl").read_text()
    (tests / "expects.scenario.yaml").write_text(SCENARIO.replace("guest panicked", "all is well"))
    (tests / "wrong.scenario.yaml").write_text(SCENARIO.replace("expect", "expects"))
    (tests / "empty.journal.jsonl").write_text("")
    (tests / "flipped.journal.jsonl").write_text(good.replace('"preparing"', '"preparinG"', 1))
    done = run("--deselect", "tests/test_lifecycle.py")
    assert outcomes(done) == {"failed": 4, "passed": 2, "deselected": 4}
    assert "Traceback" not in done.stdout
    assert ".py:" not in done.stdout
    assert re.search(r"expects\.scenario\.yaml: panics\n(?:.*\n)*.*all is well", done.stdout)
    assert re.search(
        r"wrong\.scenario\.yaml:7:1: expects: this key is unknown \(did you mean `expect`\?\)", done.stdout
    )
    assert "empty.journal.jsonl: the journal is empty" in done.stdout
    assert re.search(r"flipped\.journal\.jsonl:\d+: ", done.stdout)


def test_a_candidate_is_tried_on_all(run: Run, theirs: Path) -> None:
    own = theirs / "lifecycles/careful.yaml"
    candidate = theirs / "candidate.yaml"
    candidate.write_text(own.read_text().replace("      done: stopping\n", "      done: killing\n"))
    same = run("--kenaz-lifecycle", str(own), "tests", "-k", "simulate or replay")
    assert outcomes(same)["passed"] >= 2
    assert "kenaz: trying lifecycle careful of " in same.stdout
    other = run("--kenaz-lifecycle", "candidate.yaml", "tests/unknown-guest.journal.jsonl")
    assert outcomes(other) == {"failed": 1}
    assert "killing" in other.stdout
    assert "candidate.yaml" in other.stdout
    shipped = run("--kenaz-lifecycle", "standard", "tests/guest-panics.scenario.yaml")
    assert outcomes(shipped) == {"failed": 1}
    refused = run("--kenaz-lifecycle", "gone.yaml")
    assert refused.returncode == pytest.ExitCode.USAGE_ERROR
    assert refused.stderr.startswith("ERROR: --kenaz-lifecycle: gone.yaml: does not exist")


def test_a_later_deadline_is_told_beside_the_test(run: Run, theirs: Path) -> None:
    """A candidate that decides alike, but whose clock would have spoken before history did."""
    own = (theirs / "lifecycles/careful.yaml").read_text()
    (theirs / "candidate.yaml").write_text(own.replace("idle: 2m", "idle: 100ms"))
    done = run("--kenaz-lifecycle", "candidate.yaml", "-rP", "tests/unknown-guest.journal.jsonl")
    assert outcomes(done) == {"passed": 1}
    assert "Captured kenaz call" in done.stdout
    assert "working" in done.stdout.split("Captured kenaz call")[1]


def test_it_can_be_turned_off(run: Run) -> None:
    done = run("-p", "no:kenaz", "tests", "--deselect", "tests/test_lifecycle.py")
    assert outcomes(done) == {"deselected": 4}
    refused = run("-p", "no:kenaz", "--kenaz-lifecycle", "standard")
    assert refused.returncode == pytest.ExitCode.USAGE_ERROR


@pytest.mark.parametrize("mode", ["-o", "-p"], ids=["trio_mode", "without pytest-trio"])
def test_it_gets_on_with_pytest_trio(run: Run, mode: str) -> None:
    words = ("-o", "trio_mode=true") if mode == "-o" else ("-p", "no:trio")
    assert outcomes(run(*words)) == {"passed": 6}


def test_the_fixture_works_in_async_tests_too(run: Run, theirs: Path) -> None:
    (theirs / "tests/test_async.py").write_text(
        dedent(
            """
            import pytest, trio

            async def test_within_trio(kenaz_simulate):
                result = kenaz_simulate({"lifecycle": "standard"})
                assert result.ok and result.outcome.success
                await trio.lowlevel.checkpoint()

            async def test_faults_come_through(kenaz_simulate):
                with pytest.raises(Exception, match="kenaz_simulate:.*no lifecycle `standrad`"):
                    kenaz_simulate({"lifecycle": "standrad"})

            def test_text(kenaz_simulate):
                text = "{apiVersion: kenaz.dev/v1, kind: Scenario, metadata: {name: a}, lifecycle: standard}"
                assert kenaz_simulate(text).scenario.name == "a"
            """
        )
    )
    assert outcomes(run("-o", "trio_mode=true", "tests/test_async.py")) == {"passed": 3}


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            "PermissionError(13, 'Permission denied')",
            "guest.journal.jsonl: cannot be read: Permission denied\n",
        ),
        ("KeyError('a defect')", "KeyError: 'a defect'\n"),
    ],
    ids=["of the file", "of ours"],
)
def test_only_a_defect_has_a_traceback(run: Run, theirs: Path, error: str, told: str) -> None:
    (theirs / "conftest.py").write_text(
        "from kenaz_engine.journal import reader\n\n"
        f"def broken(path):\n    raise {error}\n\nreader.read_journal = broken\n"
    )
    done = run("tests/unknown-guest.journal.jsonl")
    assert outcomes(done) == {"failed": 1}
    assert told in done.stdout
    assert (".py:" in done.stdout) == ("defect" in error)


def test_whoever_has_no_such_files_imports_nothing_of_ours(theirs: Path, run: Run) -> None:
    shutil.rmtree(theirs / "tests")
    (theirs / "tests").mkdir()
    (theirs / "tests/test_else.py").write_text(
        "import json, sys\n\ndef test_loaded():\n    print(json.dumps(sorted(sys.modules)))\n"
    )
    modules = []
    for words in ((), ("-p", "no:kenaz")):
        done = run("-s", "-q", "-p", "no:trio", "-p", "no:hypothesispytest", "-p", "no:anyio", *words)
        [line] = [line for line in done.stdout.splitlines() if line.startswith("[")]
        modules.append(set(json.loads(line[: line.rindex("]") + 1])))
    assert modules[0] - modules[1] == {
        "kenaz_engine",
        "kenaz_engine.replay",
        "kenaz_engine.replay.pytest_plugin",
    }


def test_our_own_suite_collects_what_is_its_own() -> None:
    """The journals and the shipped scenarios, and nothing of the example repository."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    command += ["tests/journals", "tests/acceptance", "specs/scenarios"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), check=False, capture_output=True, text=True)
    collected = re.findall(r"^(\S+)::(?:simulate|replay)$", done.stdout, re.MULTILINE)
    kept = [*(ROOT / "tests/journals").glob("*.jsonl"), *(ROOT / "specs/scenarios").glob("*.yaml")]
    assert sorted(collected) == sorted(path.relative_to(ROOT).as_posix() for path in kept)
    assert "example_repo/" not in done.stdout


@pytest.mark.slow
def test_the_example_repository_passes_with_an_installed_wheel(
    run: Run, theirs: Path, installed: str
) -> None:
    """Outside this tree, beside folders called `engine` and `drivers`. Needs the package index."""
    assert outcomes(run(python=installed)) == {"passed": 6}
    where = [installed, "-c", "import kenaz_engine; print(kenaz_engine.__file__)"]
    file = subprocess.run(where, cwd=theirs, check=True, capture_output=True, text=True).stdout
    assert "site-packages" in file
    launcher = Path(installed).with_name("kenaz-launcher")
    checked = subprocess.run(
        [launcher, "validate", "sessions/unknown-guest.yaml"], cwd=theirs, check=False, capture_output=True
    )
    assert checked.returncode == 0
