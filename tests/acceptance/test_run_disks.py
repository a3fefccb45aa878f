"""The disk of a real session: nobody else's while it is there, gone afterwards, and never the image's."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from kenaz_engine.images.catalog import default_cache, find_image

ROOT = Path(__file__).parents[2]
EXEC = str(ROOT / "specs/sessions/exec.yaml")
MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("qemu")


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def command(script: str) -> dict[str, str]:
    return {
        "driver": "qemu",
        "workbench.args": json.dumps(["sh", "-c", script]),
        "spec": EXEC,
        "machine.disk": "3GiB",
    }


def test_a_guest_that_writes_a_lot_changes_nothing_of_its_image(world: Any) -> None:
    base = find_image("demo", "x86_64", default_cache()).root
    before, status = digest(base), base.stat()
    # Over what the image holds, and beyond its end.
    script = (
        "busybox dd if=/dev/zero of=/big bs=1M count=64 2>/dev/null && busybox rm -rf /usr/lib/kenaz && "
        "busybox sync && busybox cat /sys/block/vd*/size"
    )
    asked = os.umask(0)
    try:
        running = world.start("--session-id", "s1", **command(script))
    finally:
        os.umask(asked)
    disk = world.directory("s1") / "root.qcow2"
    modes: set[int] = set()
    largest = 0
    while running.poll() is None:
        try:
            found = disk.stat()
        except FileNotFoundError:
            continue
        modes.add(stat.S_IMODE(found.st_mode))
        largest = max(largest, found.st_blocks * 512)
        time.sleep(0.01)
    out, err = running.communicate()
    assert (running.returncode, str((3 << 30) // 512) in out.split()) == (0, True), err
    assert modes == {0o600}
    assert largest > 64 * MIB
    assert not disk.exists()
    assert digest(base) == before
    after = base.stat()
    assert (after.st_mtime_ns, after.st_size) == (status.st_mtime_ns, status.st_size)
    [made] = [
        record["handle"]["made"]
        for record in world.records("s1")
        if record["kind"] == "acquired" and record["resource"] == "disk"
    ]
    assert made == "overlay"
