"""`image build`: what it hands to the builder, and how it says what is wrong."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from kenaz_engine.cli import image_build
from kenaz_engine.cli.main import main
from kenaz_engine.guest.build import BuildError


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the builder was called with; an exception put in there is raised instead."""
    calls: list[Any] = []

    def build(*given: Any, force: bool, report: Any, kind: Any) -> None:
        if calls:
            raise calls.pop()
        calls.append((kind.name, *given, force))
        report("building")

    monkeypatch.setattr(image_build, "build", build)
    return calls


def test_the_builder_is_told_what_was_asked_for(
    built: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["image", "build", "--arch", "aarch64"]) == 0
    assert built.pop() == ("demo", "aarch64", None, False)
    assert main(["image", "build", "--arch", "x86_64", "--output", "out", "--force"]) == 0
    assert built.pop() == ("demo", "x86_64", tmp_path / "out", True)
    assert main(["image", "build", "sigilos", "--arch", "x86_64"]) == 0
    assert built.pop() == ("sigilos", "x86_64", None, False)
    assert capsys.readouterr().out == "building\n" * 3


def test_an_architecture_without_demo_image_is_told(
    built: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["image", "build", "--arch", "riscv64"]) == 2
    said = "kenaz-launcher: there is no demo image for riscv64 (--arch x86_64 or aarch64)\n"
    assert capsys.readouterr().err == said


def test_an_image_that_cannot_be_built_is_told(built: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "build", "windows"]) == 2
    said = "kenaz-launcher: windows cannot be built here (demo or sigilos can)\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (BuildError("tools are missing", "apt-get install lz4"), "tools are missing (apt-get install lz4)"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), "/out: Permission denied"),
    ],
)
def test_a_host_that_cannot_build_it_is_told(
    built: list[Any], capsys: pytest.CaptureFixture[str], wrong: Exception, said: str
) -> None:
    built.append(wrong)
    assert main(["image", "build", "--arch", "x86_64"]) == 3
    assert capsys.readouterr().err == f"kenaz-launcher: {said}\n"
