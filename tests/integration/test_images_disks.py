"""Ephemeral disks as QEMU sees them, on file systems that share blocks and on those that do not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kenaz_engine.images.disks import create_disk

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")

MIB = 1 << 20
GIB = 1 << 30
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def qemu_img(*arguments: str | Path) -> dict[str, Any]:
    command = ["qemu-img", *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True)
    return json.loads(done.stdout) if done.stdout.startswith(b"{") else {}


def qemu_io(path: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, path], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base, with a comma"
    path.write_bytes(os.urandom(3 * MIB))
    return path


@pytest.mark.parametrize("size", [3 * MIB, 3 * MIB + 1, 512 * MIB, 512 * MIB + 512, 10 * GIB, 100 << 40])
async def test_qemu_reads_our_overlay_as_its_own(base: Path, tmp_path: Path, size: int) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    await create_disk(ours, "qcow2", base=base, base_format="raw", size=size)
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, theirs, str(size))
    found, expected = (qemu_img("info", "--output=json", path) for path in (ours, theirs))
    for info in (found, expected):
        for differs in ("filename", "actual-size", "children"):
            info.pop(differs, None)
    # Feature names are for programs that know less than this QEMU does; the rest is the same.
    assert found == expected
    assert qemu_img("check", "--output=json", ours)["check-errors"] == 0


async def test_what_is_written_stays_in_the_overlay(base: Path, tmp_path: Path) -> None:
    path, before = tmp_path / "disk", base.read_bytes()
    await create_disk(path, "qcow2", base=base, base_format="raw", size=8 * MIB)
    qemu_io(path, "write -P 7 0 1M", "write -P 8 7M 512k", "read -P 0 4M 1M")
    qemu_img("check", path)
    raw = tmp_path / "raw"
    qemu_img("convert", "-O", "raw", path, raw)
    content = raw.read_bytes()
    assert content[:MIB] == b"\7" * MIB
    assert content[MIB : 3 * MIB] == before[MIB:]
    assert content[3 * MIB : 7 * MIB] == bytes(4 * MIB)
    assert content[7 * MIB : 7 * MIB + (512 << 10)] == b"\10" * (512 << 10)
    assert base.read_bytes() == before


async def test_an_overlay_stands_on_a_qcow2_image(base: Path, tmp_path: Path) -> None:
    packed, path = tmp_path / "packed", tmp_path / "disk"
    qemu_img("convert", "-c", "-O", "qcow2", base, packed)
    await create_disk(path, "qcow2", base=packed, base_format="qcow2", size=3 * MIB)
    qemu_img("compare", base, path)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A file system whose files can share blocks."""
    image, place = tmp_path / "btrfs", tmp_path / "mounted"
    with image.open("wb") as file:
        file.truncate(256 * MIB)
    place.mkdir()
    subprocess.run(["mkfs.btrfs", "-q", image], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True, capture_output=True)
    yield place
    subprocess.run(["umount", place], check=True)


def used(path: Path) -> int:
    os.sync()
    status = os.statvfs(path)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


@pytest.mark.only_where(IS_ROOT and Path("/dev/loop-control").exists())
async def test_blocks_are_shared_where_the_file_system_can(shared: Path) -> None:
    base, path = shared / "base", shared / "disk"
    base.write_bytes(os.urandom(100 * MIB))
    digest, before = hashlib.sha256(base.read_bytes()).hexdigest(), used(shared)
    # Two whole copies would not even find room.
    assert await create_disk(path, "raw", base=base, base_format="raw", size=GIB) == "reflink"
    assert used(shared) - before < 4 * MIB
    assert path.stat().st_size == GIB
    qemu_img("compare", "-f", "raw", "-F", "raw", base, path)
    with path.open("r+b") as file:
        file.write(bytes(MIB))
    assert hashlib.sha256(base.read_bytes()).hexdigest() == digest


@pytest.mark.only_where(IS_ROOT and Path("/dev/loop-control").exists())
async def test_across_file_systems_it_is_a_copy(shared: Path, base: Path) -> None:
    path = shared / "disk"
    assert await create_disk(path, "raw", base=base, base_format="raw", size=8 * MIB) == "copy"
    assert path.read_bytes()[: 3 * MIB] == base.read_bytes()
