"""What Hyper-V's disks begin as: an image's root disk as VHDX, which qemu-img makes once and sessions share.

A differencing disk reads what its guest has not written from a base that must be VHDX and never change. It is
kept in the cache beside the store, and goes when its image has gone. Hyper-V takes no disk that is sparse,
compressed or encrypted (its error 0xC03A001A), and QEMU for Windows makes each of its files a sparse one
(`raw_co_create` of block/file-win32.c).
"""

from __future__ import annotations

import hashlib
import stat
from contextlib import suppress
from pathlib import Path

import trio

from kenaz_drivers.contract import DriverError
from kenaz_drivers.host import capture, find_qemu_img
from kenaz_engine.images.disks import check_base
from kenaz_engine.images.errors import ImageError
from kenaz_engine.images.locks import Held, in_use, try_lock, wait_lock
from kenaz_engine.images.manifest import Image
from kenaz_engine.images.store import Store

DIRECTORY = "vhdx"
"""Where they are in the cache."""

CONVERSION = 1500.0
"""Seconds that a conversion may take: it writes all of the disk."""

_PIECE = 16 << 20  # bytes copied at once, after which a cancel is heard

_INHERITED = {stat.FILE_ATTRIBUTE_COMPRESSED: "compressed", stat.FILE_ATTRIBUTE_ENCRYPTED: "encrypted"}
"""What a file is because its directory is."""


def base_path(image: Image, cache: Path) -> Path:
    """Where the root disk of that image is as VHDX, once it is here. A disk that is used where it lies is
    another one when it was changed."""
    root = image.parts["root"]
    key = root.sha256
    if not key:
        with suppress(FileNotFoundError):
            status = root.path.stat()
            told = f"{root.path}\0{status.st_size}\0{status.st_mtime_ns}"
            key = hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()
    return cache / DIRECTORY / f"{key or 'to-be-fetched'}.vhdx"


async def ensure_base(image: Image, size: int, cache: Path, held: Held) -> Path:
    """The root disk as VHDX, made now where it is not here, and in use as long as `held`. `size` is that of
    the disks that will be made of it. Raises ImageError and OSError."""
    path = base_path(image, cache)
    check_base(image.root, image.root_format, size)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = await wait_lock(path.with_suffix(".lock"), create=True)
    try:
        for orphan in orphans(Store.at(cache)):
            if orphan != path:
                remove_base(orphan)
        if not path.exists():
            await _convert(image, path)
        await held.add(path)
    finally:
        lock.close()
    return path


async def _convert(image: Image, path: Path) -> None:
    program = find_qemu_img()
    if not program:
        raise ImageError("there is no qemu-img, which makes VHDX of disks", "install QEMU")
    scratch, whole = path.with_suffix(".part"), path.with_suffix(".whole")  # one at a time: the lock is ours
    argv = [program, "convert", "-f", image.root_format, "-O", "vhdx", "-o", "subformat=dynamic"]
    try:
        made = await capture([*argv, str(image.root), str(scratch)], deadline=CONVERSION)
        if made.code != 0:
            said = made.text.strip().splitlines()[-1:] or [f"not done in {CONVERSION:g} s"]
            raise ImageError(
                f"{image.root} cannot be made VHDX: {said[0]}", "free some space, or see qemu-img"
            )
        attributes = _attributes(scratch)
        if wrong := [word for bit, word in _INHERITED.items() if attributes & bit]:
            raise ImageError(
                f"what is made in {path.parent} is {' and '.join(wrong)}, and Hyper-V takes no such disk",
                "have Windows keep it plainly: compact /u, cipher /d; or set KENAZ_CACHE_DIR",
            )
        if attributes & stat.FILE_ATTRIBUTE_SPARSE_FILE:
            await _copy(scratch, whole)
            whole.replace(path)
        else:
            scratch.replace(path)
    except DriverError as exc:
        raise ImageError(str(exc), exc.hint) from exc
    finally:
        scratch.unlink(missing_ok=True)
        whole.unlink(missing_ok=True)


def _attributes(path: Path) -> int:
    """Those of Windows; none elsewhere."""
    return getattr(path.stat(), "st_file_attributes", 0)


async def _copy(scratch: Path, whole: Path) -> None:
    """The same bytes as a file without holes. The mark alone could be taken off by FSCTL_SET_SPARSE, but not
    on each file system, and nobody here can see it done."""
    with scratch.open("rb") as source, whole.open("wb") as target:
        while piece := await trio.to_thread.run_sync(source.read, _PIECE):
            await trio.to_thread.run_sync(target.write, piece)


def orphans(store: Store) -> list[Path]:
    """What no image of the store needs any more, and nobody uses."""
    made = sorted((store.root.parent / DIRECTORY).glob("*.vhdx"))
    return [path for path in made if not store.blob(path.stem).exists() and not in_use(path)]


def remove_base(path: Path) -> bool:
    """Removes it; False when it is used by now, or is just being made. Raises OSError."""
    lock = try_lock(path.with_suffix(".lock"), create=True)
    if lock is None:
        return False
    try:
        if in_use(path):
            return False
        path.unlink(missing_ok=True)
    except PermissionError:
        return False  # of Windows: a machine has it open
    finally:
        lock.close(remove=True)
    return True
