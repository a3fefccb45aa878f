"""`make run-vm-aarch64`: a guest of another architecture, built from its packages and booted for real."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BOUND = 800
STATES = ["resolving", "allocating", "booting", "connecting", "running", "draining", "stopping", "releasing"]


def _knows_arm64() -> bool:
    if shutil.which("dpkg") is None or shutil.which("qemu-system-aarch64") is None:
        return False
    asked = ("--print-architecture", "--print-foreign-architectures")
    told = [
        subprocess.run(["dpkg", word], capture_output=True, text=True, check=True).stdout for word in asked
    ]
    return "arm64" in "".join(told).split()


@pytest.mark.slow
@pytest.mark.skipif(not _knows_arm64(), reason="needs qemu-system-aarch64 and apt's lists of arm64")
def test_a_guest_of_aarch64_is_booted_and_ends_as_any_other(tmp_path: Path, short: Path) -> None:
    surroundings = {"KENAZ_STATE_DIR": str(tmp_path), "XDG_RUNTIME_DIR": str(short), "NO_COLOR": "1"}
    done = subprocess.run(
        ["make", "-s", "run-vm-aarch64"],
        cwd=ROOT,
        env={**os.environ, **surroundings},
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"guest says: hello from SigilOS demo, kernel Linux 6\.\S+-arm64, boot", done.stdout)
    states = re.findall(r"^  (\w+) +[\d.]+ s$", done.stdout, re.MULTILINE)
    assert states == STATES
    assert re.search(r"kernel [\d.]+ s, user land [\d.]+ s, handshake", done.stdout)
    assert done.stdout.endswith("  nothing left behind\n")
