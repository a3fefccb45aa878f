"""Many real sessions in one launcher process: descriptors, threads, children, memory and files stay flat."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")

SOAK = Path(__file__).parents[1] / "soak.py"


def soak(*words: str, bound: float) -> dict[str, dict[str, Any]]:
    """What `soak.py` measured, by its parts. It exits with 1 where anything grows or is left."""
    done = subprocess.run(
        [sys.executable, str(SOAK), *words], capture_output=True, text=True, timeout=bound, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return {part["what"]: part for part in map(json.loads, done.stdout.splitlines())}


def test_a_few_sessions_leave_the_launcher_as_it_was() -> None:
    parts = soak("--process", "10", "--at-once", "8", bound=120)
    assert parts["all"]["sessions"] >= 10 + 2 * 8
    for part in parts.values():
        assert (part["grown"]["descriptors"], part["grown"]["children"]) == (0, 0)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_hundreds_of_sessions_leave_the_launcher_as_it_was() -> None:
    parts = soak("--process", "200", "--at-once", "50", bound=2300)
    assert parts["process in sequence"]["sessions"] == 200
    assert parts["process at once"]["sessions"] == 50


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_twenty_machines_leave_the_launcher_as_it_was(qemu: str) -> None:
    assert soak("--qemu", "20", bound=2300)["qemu in sequence"]["sessions"] == 20


LEAK = """
import os, runpy, sys
from kenaz_engine.session import launch
really = launch.Session.run
async def leaky(self):
    result = await really(self)
    os.dup(0)
    return result
launch.Session.run = leaky
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_what_stays_with_a_session_is_found() -> None:
    command = [sys.executable, "-c", LEAK, str(SOAK), "--process", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    assert "process in sequence: descriptors grew by 2" in json.loads(done.stdout.splitlines()[-1])["faults"]
