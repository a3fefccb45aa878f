"""The pre-commit hook, driven by pre-commit itself in a git repository of somebody else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
HOOKS = ROOT / ".pre-commit-hooks.yaml"
WHEEL = ("pyproject.toml", "README.md", "LICENSE", ".pre-commit-hooks.yaml", "engine", "drivers", "specs")
"""All that is needed to install from a checkout."""

GOOD = """\
apiVersion: kenaz.dev/v1
kind: Session
metadata: {name: good}
"""
BAD = """\
apiVersion: kenaz.dev/v1
kind: Session
metadata: {name: bad}
spec: {machine: {cpu: 4}}
"""
OTHERS = """\
apiVersion: apps/v1
kind: {{ .Values.kind }}
"""
FAULT = "bad.yaml:4:18: spec.machine.cpu: this key is unknown (did you mean `cpus`?)"

Git = Callable[..., str]
Hook = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Git:
    """Runs git without the settings of who runs the tests, nor of a hook that they may run in."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "kenaz")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "kenaz@example.invalid")
    monkeypatch.setenv("PRE_COMMIT_HOME", str(tmp_path / "pre-commit"))

    def git(directory: Path, *words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=directory, check=True, capture_output=True, text=True
        ).stdout.strip()

    return git


@pytest.fixture
def hook(tmp_path: Path, git: Git) -> Hook:
    """Commits these files to a new repository whose pre-commit has this source of hooks, and runs it."""

    def run(source: dict[str, object], **files: str) -> subprocess.CompletedProcess[str]:
        theirs = tmp_path / "theirs"
        if not theirs.exists():
            theirs.mkdir()
            git(theirs, "init", "--quiet")
        (theirs / ".pre-commit-config.yaml").write_text(yaml.safe_dump({"repos": [source]}))
        for name, text in files.items():
            (theirs / f"{name}.yaml").write_text(text)
        git(theirs, "add", ".")
        command = [str(BIN / "pre-commit"), "run", "--all-files", "--color", "never"]
        return subprocess.run(command, cwd=theirs, check=False, capture_output=True, text=True)

    return run


def check(hook: Hook, source: dict[str, object]) -> None:
    passed = hook(source, good=GOOD, others=OTHERS)
    assert passed.returncode == 0, passed.stdout + passed.stderr
    assert "Passed" in passed.stdout
    failed = hook(source, bad=BAD)
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert "exit code: 2" in failed.stdout
    assert FAULT in failed.stdout
    assert "others.yaml" not in failed.stdout


def test_it_refuses_what_is_wrong_and_passes_over_what_is_not_ours(hook: Hook) -> None:
    [declared] = yaml.safe_load(HOOKS.read_text())
    assert declared["language"] == "python"
    command, _, rest = declared["entry"].partition(" ")
    local = declared | {"language": "system", "entry": f"{BIN / command} {rest}"}
    check(hook, {"repo": "local", "hooks": [local]})


@pytest.mark.slow
def test_pre_commit_installs_it_from_a_checkout(hook: Hook, git: Git, tmp_path: Path) -> None:
    """Needs the package index, as every such hook does."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in WHEEL:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, checkout / name)
    git(checkout, "init", "--quiet")
    git(checkout, "add", "--force", ".")
    git(checkout, "commit", "--quiet", "--message", "all")
    revision = git(checkout, "rev-parse", "HEAD")
    check(hook, {"repo": str(checkout), "rev": revision, "hooks": [{"id": "kenaz-validate"}]})
