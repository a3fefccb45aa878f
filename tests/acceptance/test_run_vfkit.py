"""A whole session of the driver vfkit, by the command, on a stand-in that obeys vfkit's sources."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from kenaz_engine.images.catalog import default_cache, find_image
from kenaz_engine.images.errors import ImageError

STANDIN = Path(__file__).parents[1] / "integration/standins/vfkit.py"


def _ready() -> bool:
    try:
        find_image("demo", "x86_64", default_cache())
    except ImageError:
        return False
    return sys.platform == "linux"


pytestmark = pytest.mark.skipif(not _ready(), reason="needs the demo image (`make image`), and /proc")


@pytest.fixture
def options(tmp_path: Path) -> dict[str, str]:
    """Values of the spec that choose the driver, and the stand-in for its program."""
    program = tmp_path / "vfkit"
    program.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, str(STANDIN)])} "$@"\n')
    program.chmod(0o755)
    return {"driver": "vfkit", "driverOptions.vfkit.binary": str(program)}


def test_a_session_from_its_plan_to_nothing_left(world: Any, options: dict[str, str]) -> None:
    shown = world.plan("--json", "--session-id", "v1", **options)
    assert shown.returncode == 0, shown.stderr
    planned = json.loads(shown.stdout)
    assert (planned["driver"]["name"], planned["accelerator"]) == ("vfkit", "vz")
    assert planned["transport"]["name"] == "vfkit"
    done = world.run("--session-id", "v1", **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "guest says: fs.read answered; fs.delete refused (denied)" in done.stdout
    assert "nothing left behind" in done.stdout


def test_a_launcher_that_makes_no_picture_and_is_killed_leaves_nothing_that_reap_does_not_find(
    world: Any, options: dict[str, str], harness: Any
) -> None:
    silent = harness(lambda message: [])
    words = ("--session-id", "v2", "--harness", silent.address)
    with world.start(*words, behaviour="idle", **options) as launcher:
        world.wait_for("v2", "running")
        picture = world.call("screenshot", "v2", str(world.state / "v2.png"))
        assert (picture.returncode, "the driver vfkit makes no pictures of screens" in picture.stderr) == (
            1,
            True,
        )
        launcher.send_signal(signal.SIGKILL)
    told = world.reap()
    assert [session["status"] for session in told["sessions"]] == ["reaped"]
    assert world.left() == []
