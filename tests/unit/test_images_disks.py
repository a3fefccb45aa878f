"""Overlays, made by the real qemu-img where there is one, and by a false one that fails."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import trio

from kenaz_engine.images.disks import DiskError, create_overlay

needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
MIB = 1 << 20


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    with path.open("wb") as file:
        file.truncate(MIB)
    return path


@pytest.fixture
def false_qemu_img(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An executable that fails, for a test to write; it is the only thing on the PATH."""
    script = tmp_path / "bin" / "qemu-img"
    script.parent.mkdir()
    script.touch(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    return script


@needs_qemu
async def test_the_overlay_has_its_size_its_base_and_its_owner_only(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "overlay.qcow2"
    await create_overlay(path, base=base, base_format="raw", size=8 * MIB)
    shown = await trio.run_process(["qemu-img", "info", "--output=json", str(path)], capture_stdout=True)
    info = json.loads(shown.stdout)
    assert info["format"] == "qcow2"
    assert info["virtual-size"] == 8 * MIB
    assert (info["full-backing-filename"], info["backing-filename-format"]) == (str(base), "raw")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@needs_qemu
async def test_a_base_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "overlay.qcow2"
    with pytest.raises(DiskError, match="qemu-img could not make") as caught:
        await create_overlay(path, base=tmp_path / "none", base_format="qcow2", size=MIB)
    assert "\n" not in str(caught.value)
    assert not path.exists()


async def test_an_existing_file_is_left_alone(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "overlay.qcow2"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        await create_overlay(path, base=base, base_format="raw", size=MIB)
    assert path.read_text() == "mine"


async def test_a_disk_smaller_than_its_image_is_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(DiskError, match="a disk of 1048575 bytes is smaller than its image") as caught:
        await create_overlay(tmp_path / "overlay.qcow2", base=base, base_format="raw", size=MIB - 1)
    assert caught.value.hint == "raise spec.machine.disk"


async def test_a_relative_base_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absolute"):
        await create_overlay(tmp_path / "o", base=Path("base"), base_format="raw", size=1)


@pytest.mark.parametrize(
    ("said", "message", "hint"),
    [
        (
            "o.qcow2: No space left on device",
            "no space left for the disk",
            "free space on the file system of",
        ),
        ("first\nlast words", "last words", ""),
        ("", "qemu-img could not make", ""),
    ],
)
async def test_the_reason_of_a_failure_is_passed_on(
    tmp_path: Path, base: Path, false_qemu_img: Path, said: str, message: str, hint: str
) -> None:
    false_qemu_img.write_text(f"#!/bin/sh\nprintf '%s' '{said}' >&2\nexit 1\n")
    path = tmp_path / "overlay.qcow2"
    with pytest.raises(DiskError, match=message) as caught:
        await create_overlay(path, base=base, base_format="raw", size=MIB)
    assert caught.value.hint.startswith(hint)
    assert not path.exists()


async def test_a_missing_qemu_img_is_told_with_its_package(
    tmp_path: Path, base: Path, false_qemu_img: Path
) -> None:
    false_qemu_img.unlink()
    with pytest.raises(DiskError, match="qemu-img is not installed") as caught:
        await create_overlay(tmp_path / "overlay.qcow2", base=base, base_format="raw", size=MIB)
    assert caught.value.hint == "apt-get install qemu-utils"
    assert not (tmp_path / "overlay.qcow2").exists()


async def test_a_cancelled_overlay_leaves_nothing(tmp_path: Path, base: Path, false_qemu_img: Path) -> None:
    started = tmp_path / "started"
    os.mkfifo(started)
    false_qemu_img.write_text(f"#!/bin/sh\necho > {started}\nexec /bin/sleep 60\n")
    path = tmp_path / "overlay.qcow2"
    async with trio.open_nursery() as nursery:

        async def make() -> None:
            await create_overlay(path, base=base, base_format="raw", size=MIB)

        nursery.start_soon(make)
        with trio.fail_after(10):
            await trio.to_thread.run_sync(started.read_bytes, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()
    assert not path.exists()
