"""A driver of somebody else's, from a wheel of its own: found, described, run, and held to the kit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parent / "example_driver"


@pytest.mark.slow
def test_it_is_found_run_and_held_to_the_kit(
    world: Any, installed: str, install_project: Callable[[str, Path, Path], None], tmp_path: Path
) -> None:
    """Needs the package index."""
    theirs = tmp_path / "theirs"
    shutil.copytree(EXAMPLE, theirs)
    install_project(installed, theirs, tmp_path / "built")
    launcher = str(Path(installed).with_name("kenaz-launcher"))
    environment = {name: value for name, value in world.environment.items() if "PYTEST" not in name}

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    told = call(launcher, "doctor", "--driver", "example", "--json")
    assert json.loads(told.stdout)["drivers"][0]["usable"], told.stderr
    hello = tmp_path / "hello.yaml"
    hello.write_text(
        "apiVersion: kenaz.dev/v1\nkind: Session\nmetadata: {name: hello}\n"
        "spec: {driver: example, workbench: {args: [bye]}}\n"
    )
    ran = call(launcher, "run", str(hello))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    kit = [installed, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "--pyargs"]
    held = call(*kit, "kenaz_drivers.conformance", "--kenaz-driver", "example")
    assert held.returncode == 0, held.stdout + held.stderr
    found = re.search(r"(\d+) passed", held.stdout)
    assert found
    assert int(found[1]) >= 45


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say which driver to check: --kenaz-driver NAME"),
        (["--kenaz-driver", "nobody's"], 'there is no driver "nobody\'s"'),
        (["--kenaz-driver", "qemu", "--kenaz-driver-options", '{"binary": "/gone"}'], "/gone is no program"),
    ],
)
def test_what_cannot_be_checked_is_told_in_a_line(tmp_path: Path, words: list[str], said: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "-x", "--pyargs"]
    done = subprocess.run(
        [*command, "kenaz_drivers.conformance", "-k", "quick", *words],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if "PYTEST" not in name},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert said in done.stdout
    assert "Traceback" not in done.stdout
