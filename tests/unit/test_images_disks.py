"""Ephemeral disks: who may read them, what is refused, and that a failure leaves nothing."""

from __future__ import annotations

import errno
import locale
import os
import shutil
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from kenaz_engine.images import clonefile, disks, qcow2
from kenaz_engine.images.diskfile import inspect_disk
from kenaz_engine.images.disks import DiskError, create_disk
from kenaz_engine.images.errors import ImageError

MIB = 1 << 20
GIB = 1 << 30
FORMATS = ("qcow2", "raw")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A megabyte of which the middle is a hole."""
    path = tmp_path / "base"
    with path.open("wb") as file:
        file.write(b"begin".ljust(4096, b"."))
        file.seek(MIB - 4096)
        file.write(b"end".rjust(4096, b"."))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture(params=[0o000, 0o022, 0o777])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.parametrize("disk_format", FORMATS)
@pytest.mark.usefixtures("umask")
async def test_a_disk_is_for_its_owner_alone_whatever_the_umask(
    base: Path, path: Path, disk_format: str
) -> None:
    await create_disk(path, disk_format, base=base, base_format="raw", size=8 * MIB)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_an_overlay_says_its_size_and_its_base_and_holds_nothing(base: Path, path: Path) -> None:
    assert await create_disk(path, "qcow2", base=base, base_format="raw", size=10 * GIB) == "overlay"
    content = path.read_bytes()
    head = qcow2.HEADER.unpack_from(content)
    assert (head[5], head[7]) == (10 * GIB, 20)
    assert content[head[2] : head[2] + head[3]] == os.fsencode(base)
    assert path.stat().st_blocks * 512 <= 64 << 10
    # Which is why nobody may publish such a file as an image.
    with pytest.raises(ImageError, match="has a backing file"):
        inspect_disk(path)


async def test_an_overlay_names_its_base_in_the_code_page_of_windows(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "OF_CODE_PAGE", True)
    monkeypatch.setattr(locale, "getencoding", lambda: "cp1252")
    base = tmp_path / "Jos\xe9"
    base.write_bytes(bytes(512))
    await create_disk(path, "qcow2", base=base, base_format="raw", size=512)
    content = path.read_bytes()
    head = qcow2.HEADER.unpack_from(content)
    assert content[head[2] : head[2] + head[3]].endswith(b"/Jos\xe9")
    path.unlink()
    base = base.rename(tmp_path / "\u0416")
    caught = await refused(path, base=base, size=512)
    assert "cp1252 has not all of its characters" in str(caught)
    assert "KENAZ_CACHE_DIR" in caught.hint


async def test_a_raw_disk_is_the_base_and_then_zeros(base: Path, path: Path) -> None:
    assert await create_disk(path, "raw", base=base, base_format="raw", size=8 * MIB + 1) in {
        "reflink",
        "copy",
    }
    content = path.read_bytes()
    assert content[:MIB] == base.read_bytes()
    assert content[MIB:] == bytes(7 * MIB + 512)
    assert path.stat().st_blocks * 512 <= 64 << 10


async def test_a_copy_takes_what_the_file_system_cannot_share(
    base: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "_reflink", lambda *_: False)
    monkeypatch.setattr(disks, "_CHUNK", 4096)
    lseek = os.lseek

    def untold(file: int, offset: int, whence: int) -> int:
        if whence == os.SEEK_DATA:
            raise OSError(errno.ENOTTY, "Inappropriate ioctl for device")
        return lseek(file, offset, whence)

    # Where the file system (on macOS), or the platform, does not tell where data is, all of it is copied.
    for knows in ("all", "not the file system", "not the platform"):
        if knows == "not the file system":
            monkeypatch.setattr(os, "lseek", untold)
        if knows == "not the platform":
            monkeypatch.delattr(os, "SEEK_DATA", raising=False)
            monkeypatch.setattr(os, "lseek", lseek)
        assert await create_disk(path, "raw", base=base, base_format="raw", size=MIB) == "copy"
        assert path.read_bytes() == base.read_bytes()
        path.unlink()


async def test_a_base_that_ends_with_a_hole_is_copied(path: Path, tmp_path: Path) -> None:
    base = tmp_path / "hollow"
    with base.open("wb") as file:
        file.write(b"begin")
        file.truncate(4 * MIB)
    await create_disk(path, "raw", base=base, base_format="raw", size=4 * MIB)
    assert path.read_bytes() == base.read_bytes()


@pytest.mark.parametrize("disk_format", FORMATS)
async def test_an_existing_file_is_left_alone(base: Path, path: Path, disk_format: str) -> None:
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        await create_disk(path, disk_format, base=base, base_format="raw", size=MIB)
    assert path.read_text() == "mine"


async def refused(path: Path, disk_format: str = "qcow2", **given: Any) -> DiskError:
    with pytest.raises(DiskError) as caught:
        await create_disk(path, disk_format, **{"base_format": "raw", "size": MIB, **given})
    assert not path.exists()
    return caught.value


async def test_a_disk_smaller_than_its_image_is_refused(base: Path, path: Path, tmp_path: Path) -> None:
    error = await refused(path, base=base, size=MIB - 1)
    assert str(error) == "a disk of 1048575 bytes is smaller than its image of 1048576 bytes"
    assert error.hint == "raise spec.machine.disk"
    packed = alone(tmp_path / "packed", 8 * MIB)
    error = await refused(path, base=packed, base_format="qcow2")
    assert str(error) == "a disk of 1048576 bytes is smaller than its image of 8388608 bytes"


def alone(path: Path, size: int) -> Path:
    """A qcow2 image without a base, which has nothing in it."""
    length, pieces = qcow2.overlay(b"", "raw", size)
    content = bytearray(length)
    for offset, piece in pieces.items():
        content[offset : offset + len(piece)] = piece
    struct.pack_into(">QI", content, 8, 0, 0)
    path.write_bytes(content)
    return path


async def test_a_base_of_another_format_than_promised_is_refused(
    base: Path, path: Path, tmp_path: Path
) -> None:
    error = await refused(path, base=base, base_format="qcow2")
    assert str(error) == f"{base} is a raw image, and its manifest says qcow2"
    packed = alone(tmp_path / "packed", MIB)
    assert "is a qcow2 image, and its manifest says raw" in str(await refused(path, base=packed))


async def test_a_base_that_leads_elsewhere_is_refused(base: Path, path: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    await create_disk(overlay, "qcow2", base=base, base_format="raw", size=MIB)
    with pytest.raises(ImageError, match="has a backing file"):
        await create_disk(path, "qcow2", base=overlay, base_format="qcow2", size=MIB)
    assert not path.exists()


async def test_a_driver_that_takes_raw_disks_only_gets_no_qcow2_image(path: Path, tmp_path: Path) -> None:
    error = await refused(path, "raw", base=alone(tmp_path / "packed", MIB), base_format="qcow2")
    assert error.hint == "publish it with a raw disk: qemu-img convert -O raw"


async def test_what_no_format_holds_is_refused(base: Path, path: Path, tmp_path: Path) -> None:
    assert str(await refused(path, "vhdx", base=base)) == "no disk can be made in the format vhdx"
    error = await refused(path, base=base, size=1 << 62)
    assert str(error) == f"a disk of {1 << 62} bytes is larger than qcow2 allows"
    deep = tmp_path.joinpath(*["d" * 200] * 5, "base")
    deep.parent.mkdir(parents=True)
    base.rename(deep)
    assert "and qcow2 holds 1023" in str(await refused(path, base=deep))


async def test_a_base_that_is_not_there_or_not_absolute(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await create_disk(path, "qcow2", base=tmp_path / "none", base_format="raw", size=MIB)
    with pytest.raises(ValueError, match="absolute"):
        await create_disk(path, "qcow2", base=Path("base"), base_format="raw", size=1)
    assert not path.exists()


@pytest.mark.parametrize("disk_format", FORMATS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
async def test_a_full_disk_is_told_and_leaves_nothing(
    base: Path, path: Path, monkeypatch: pytest.MonkeyPatch, disk_format: str, number: int
) -> None:
    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disks, "_write", full)
    monkeypatch.setattr(disks, "_reflink", lambda *_: False)
    error = await refused(path, disk_format, base=base)
    assert str(error) == f"no space left for the disk {path}"
    assert error.hint == f"free space on the file system of {path.parent}"


async def test_other_errors_of_the_system_go_on_and_leave_nothing(
    base: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(disks, "_reflink", broken)
    with pytest.raises(OSError, match="broken"):
        await create_disk(path, "raw", base=base, base_format="raw", size=MIB)
    assert not path.exists()


async def test_a_cancelled_copy_leaves_nothing(
    base: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "_reflink", lambda *_: False)
    monkeypatch.setattr(disks, "_CHUNK", 1024)
    with trio.CancelScope() as scope:
        real = disks._copy_piece

        def cancelling(*given: Any) -> None:
            real(*given)
            trio.from_thread.run_sync(scope.cancel)

        monkeypatch.setattr(disks, "_copy_piece", cancelling)
        await create_disk(path, "raw", base=base, base_format="raw", size=MIB)
    assert scope.cancelled_caught
    assert not path.exists()


def clone(base: bytes, path: bytes, flags: int) -> int:
    """What clonefile(2) does on a Mac: the mode is the base's."""
    assert flags == clonefile.NO_OWNER_COPY
    if Path(os.fsdecode(path)).exists():
        return -errno.EEXIST
    shutil.copy(os.fsdecode(base), os.fsdecode(path))
    return 0


async def test_on_a_mac_a_raw_disk_is_a_clone(
    base: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base.chmod(0o444)
    monkeypatch.setattr(disks, "clone_file", lambda base, path: clonefile.clone_file(base, path, clone))
    assert await create_disk(path, "raw", base=base, base_format="raw", size=8 * MIB) == "clone"
    assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_size) == (0o600, 8 * MIB)
    assert path.read_bytes()[:MIB] == base.read_bytes()
    with pytest.raises(FileExistsError):
        await create_disk(path, "raw", base=base, base_format="raw", size=8 * MIB)
    assert path.exists()
    overlay = path.with_name("overlay")
    assert await create_disk(overlay, "qcow2", base=base, base_format="raw", size=8 * MIB) == "overlay"


async def test_a_clone_that_cannot_be_opened_is_not_left(
    base: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "clone_file", lambda base, path: clonefile.clone_file(base, path, clone))

    def refuse(*words: Any) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    real = os.open
    monkeypatch.setattr(os, "open", lambda name, *more: refuse() if name == path else real(name, *more))
    with pytest.raises(OSError, match="too many"):
        await create_disk(path, "raw", base=base, base_format="raw", size=8 * MIB)
    assert not path.exists()


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EXDEV])
def test_a_file_system_that_cannot_clone_is_no_error(base: Path, path: Path, number: int) -> None:
    assert not clonefile.clone_file(base, path, lambda *words: -number)
    with pytest.raises(PermissionError):
        clonefile.clone_file(base, path, lambda *words: -errno.EACCES)
