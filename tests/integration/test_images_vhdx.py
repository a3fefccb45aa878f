"""What Hyper-V's disks begin as: made by the real qemu-img, once, and read back by it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from kenaz_engine.images import vhdx
from kenaz_engine.images.disks import DiskError
from kenaz_engine.images.errors import ImageError
from kenaz_engine.images.locks import Held, try_lock
from kenaz_engine.images.manifest import Image, Part
from kenaz_engine.images.store import Store
from kenaz_engine.images.tidy import litter, sweep
from kenaz_engine.images.vhdx import base_path, ensure_base

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")

MIB = 1 << 20


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *words], check=True, stdout=subprocess.DEVNULL)


def image_of(root: Path, root_format: str = "raw", digest: str = "") -> Image:
    return Image(
        name="i",
        tag="",
        arch="x86_64",
        digest="",
        parts={"root": Part(root, root.stat().st_size, digest)},
        root_format=root_format,
        cmdline="",
        console_device="",
        console_patterns=(),
        manifest=None,
    )


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "it's a disk, raw"
    path.write_bytes(os.urandom(2 * MIB) + bytes(6 * MIB) + os.urandom(MIB))
    return path


async def base_of(image: Image, cache: Path, size: int = 64 * MIB) -> Path:
    held = Held()
    try:
        return await ensure_base(image, size, cache, held)
    finally:
        held.close()


@pytest.mark.parametrize("root_format", ["raw", "qcow2"])
async def test_a_base_is_the_image_as_vhdx_and_is_made_once(
    tmp_path: Path, raw: Path, root_format: str
) -> None:
    root = raw
    if root_format == "qcow2":
        root = tmp_path / "root"
        qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, root)
    image, cache = image_of(root, root_format), tmp_path / "cache"
    path = await base_of(image, cache)
    assert path == base_path(image, cache)
    assert path.read_bytes()[:8] == b"vhdxfile"
    qemu_img("compare", "-f", "raw", "-F", "vhdx", raw, path)
    qemu_img("check", "-q", "-f", "vhdx", path)
    before = path.stat()
    assert await base_of(image, cache) == path
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


async def test_a_base_that_is_sparse_is_copied_into_one_that_is_not(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As QEMU for Windows makes it. Elsewhere a file has no such mark, but holes."""
    monkeypatch.setattr(vhdx, "_attributes", lambda path: stat.FILE_ATTRIBUTE_SPARSE_FILE)
    monkeypatch.setattr(vhdx, "_PIECE", 1 << 20)
    path = await base_of(image_of(raw), tmp_path / "cache")
    qemu_img("compare", "-f", "raw", "-F", "vhdx", raw, path)
    status = path.stat()
    assert status.st_blocks * 512 >= status.st_size
    assert {found.suffix for found in path.parent.iterdir()} == {".vhdx", ".lock"}


async def test_a_base_that_windows_compresses_or_encrypts_is_told(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = stat.FILE_ATTRIBUTE_COMPRESSED | stat.FILE_ATTRIBUTE_SPARSE_FILE
    monkeypatch.setattr(vhdx, "_attributes", lambda path: told)
    with pytest.raises(ImageError, match="is compressed, and Hyper-V takes no such disk"):
        await base_of(image_of(raw), tmp_path / "cache")
    assert {found.suffix for found in (tmp_path / "cache/vhdx").iterdir()} == {".lock"}


async def test_a_disk_that_was_changed_is_another_and_the_old_one_goes_unless_it_is_used(
    tmp_path: Path, raw: Path
) -> None:
    cache, held = tmp_path / "cache", Held()
    used = await ensure_base(image_of(raw), 64 * MIB, cache, held)
    raw.write_bytes(bytes(MIB))
    other = await base_of(image_of(raw), cache)
    assert used != other
    assert used.exists()
    held.close()
    raw.write_bytes(bytes(2 * MIB))
    last = await base_of(image_of(raw), cache)
    assert sorted((cache / "vhdx").glob("*.vhdx")) == [last]


async def test_a_base_goes_with_its_image(tmp_path: Path, raw: Path) -> None:
    cache, digest = tmp_path / "cache", "ab" * 32
    blob = cache / "images/blobs/sha256" / digest
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"")
    path = await base_of(image_of(raw, digest=digest), cache)
    assert path == cache / "vhdx" / f"{digest}.vhdx"
    await base_of(image_of(raw), cache)
    assert path.exists()
    blob.unlink()
    await base_of(image_of(raw), cache)
    assert not path.exists()


async def test_prune_takes_what_no_image_needs_but_what_is_used_or_just_made(
    tmp_path: Path, raw: Path
) -> None:
    cache, held = tmp_path / "cache", Held()
    store = Store.at(cache)
    path = await ensure_base(image_of(raw), 64 * MIB, cache, held)
    assert list(litter(store, (), 0)) == []
    held.close()
    [item] = litter(store, (), 0)
    assert (item.path, item.what) == (path, "made of an image that has gone")
    making = try_lock(path.with_suffix(".lock"), create=True)
    assert making is not None
    assert not sweep(store, item)
    making.close()
    using = try_lock(path, shared=True)
    assert using is not None
    assert not sweep(store, item)
    using.close()
    assert sweep(store, item)
    assert list((cache / "vhdx").iterdir()) == []


async def test_what_cannot_be_converted_leaves_nothing(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(DiskError, match="is smaller than its image"):
        await base_of(image_of(raw), cache, size=MIB)
    with pytest.raises(DiskError, match="is a raw image, and its manifest says qcow2"):
        await base_of(image_of(raw, "qcow2"), cache)
    failing = tmp_path / "qemu-img"
    failing.write_text('#!/bin/sh\nfor last; do :; done\ntouch "$last"\necho no space left >&2\nexit 1\n')
    failing.chmod(0o755)
    monkeypatch.setattr(vhdx, "find_qemu_img", lambda: str(failing))
    with pytest.raises(ImageError, match="cannot be made VHDX: no space left"):
        await base_of(image_of(raw), cache)
    monkeypatch.setattr(vhdx, "find_qemu_img", lambda: "")
    with pytest.raises(ImageError, match="no qemu-img"):
        await base_of(image_of(raw), cache)
    assert {path.suffix for path in (cache / "vhdx").iterdir()} == {".lock"}
