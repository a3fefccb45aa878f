"""The how-to "launch your own image", as it stands; and an image that does not keep the contract."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HOW_TO = ROOT / "docs/how-to/launch-your-own-image.md"
BOUND = 800


@pytest.mark.slow
def test_the_how_to_runs_from_start_to_end(qemu: str, world: Any, tmp_path: Path) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", HOW_TO.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    done = subprocess.run(
        ["bash", "-eu", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env={
            **world.environment,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "KENAZ_CACHE_DIR": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 of 8 points hold" in done.stdout
    assert done.stdout.endswith("  nothing left behind\n")


def test_points_that_do_not_hold_are_told(qemu: str, world: Any) -> None:
    done = world.call("image", "check", "demo", "--json", "--set", 'spec.workbench.args=["early:panic"]')
    told = json.loads(done.stdout)
    assert done.returncode == 1
    assert [point["holds"] for point in told["points"]] == [False, *[None] * 7]
    assert "Kernel panic" in told["points"][0]["seen"]
