"""Ephemeral disks: what a session may write to, made from an image's root disk that it never writes to.

See docs/decisions/0016-ephemeral-disks.md for why no program is started.
"""

from __future__ import annotations

import errno
import locale
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from kenaz_engine.images import qcow2
from kenaz_engine.images.clonefile import clone_file
from kenaz_engine.images.diskfile import inspect_disk
from kenaz_engine.images.errors import ImageError
from kenaz_engine.openflags import PLAIN

_CHUNK = 16 << 20  # bytes copied at once: some 10 ms, after which a cancel is heard

OF_CODE_PAGE = sys.platform == "win32"
"""Whether QEMU knows files by names in the system's code page."""

if sys.platform == "linux":
    import fcntl

    _FICLONE = 0x40049409  # linux/fs.h

    def _reflink(base: int, file: int) -> bool:
        try:
            fcntl.ioctl(file, _FICLONE, base)
        except OSError as error:
            # By ioctl_ficlone(2): another file system, or one that cannot, or not these files.
            if error.errno in {errno.EXDEV, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EPERM}:
                return False
            raise
        return True

else:

    def _reflink(base: int, file: int) -> bool:
        return False


class DiskError(ImageError):
    """An ephemeral disk cannot be made."""


async def create_disk(path: Path, disk_format: str, *, base: Path, base_format: str, size: int) -> str:
    """Makes a disk of `size` bytes at `path` that begins as `base`, in the format that the driver takes.

    `qcow2` is an overlay, which takes 0.3 ms whatever the size. `raw` is a copy that shares its blocks with
    the base where the file system can do that, and else a copy of all that is not a hole. Returns which:
    `overlay`, `reflink` (Linux), `clone` (macOS) or `copy`. `path` must not exist; its mode is 0600 whatever
    the umask. `base` must be absolute, because qcow2 keeps the name as it is given.

    Raises DiskError, with nothing left at `path`, when the base is not of `base_format` or does not stand
    alone, when it is larger than `size`, when the driver cannot take it, or when the disk is full. Raises
    FileExistsError when `path` exists, and OSError for a base that cannot be read.
    """
    if not base.is_absolute():
        raise ValueError(f"the base of a disk needs an absolute path, not {base}")
    check_base(base, base_format, size)
    _check_format(base_format, disk_format)
    file, cloned = _begin(path, base, disk_format)
    try:
        try:
            path.chmod(0o600)
            with _room(path):
                if disk_format == "qcow2":
                    _write_overlay(file, base, base_format, size)
                    return "overlay"
                how = "clone" if cloned else await _copy(file, base)
                os.ftruncate(file, -(-size // qcow2.SECTOR) * qcow2.SECTOR)
                return how
        finally:
            os.close(file)  # first: Windows removes nothing that is open
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _begin(path: Path, base: Path, disk_format: str) -> tuple[int, bool]:
    """A new file, open, and whether it is a clone of the base already. A base may be nobody's to write."""
    if disk_format != "raw" or not clone_file(base, path):
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAIN, 0o600), False
    try:
        path.chmod(0o600)
        return os.open(path, os.O_WRONLY | PLAIN), True
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def check_base(base: Path, base_format: str, size: int) -> None:
    """Raises DiskError when no disk of `size` bytes can begin as `base`; OSError when that cannot be read."""
    found = inspect_disk(base)
    if found.format != base_format:
        raise DiskError(
            f"{base} is a {found.format} image, and its manifest says {base_format}", "get the image again"
        )
    if size < found.virtual_size:
        raise DiskError(
            f"a disk of {size} bytes is smaller than its image of {found.virtual_size} bytes",
            "raise spec.machine.disk",
        )


def _check_format(base_format: str, disk_format: str) -> None:
    if disk_format not in {"qcow2", "raw"}:
        raise DiskError(f"no disk can be made in the format {disk_format}")
    if (disk_format, base_format) == ("raw", "qcow2"):
        raise DiskError(
            "the driver takes raw disks only, and the image has a qcow2 disk",
            "publish it with a raw disk: qemu-img convert -O raw",
        )


def _write_overlay(file: int, base: Path, base_format: str, size: int) -> None:
    try:
        length, pieces = qcow2.overlay(_name(base), base_format, size)
    except ValueError as error:
        raise DiskError(str(error)) from None
    for offset, piece in pieces.items():
        os.lseek(file, offset, os.SEEK_SET)
        _write(file, piece)
    os.ftruncate(file, length)


def _name(base: Path) -> bytes:
    """The path as QEMU opens it: on Windows by CreateFileA, so in the system's code page (`raw_open` of its
    block/file-win32.c; seen under Wine). Raises DiskError where that has not all of its characters."""
    if not OF_CODE_PAGE:
        return str(base).encode("utf-8", "surrogateescape")
    code_page = locale.getencoding()
    try:
        return str(base).encode(code_page)
    except UnicodeEncodeError as error:
        raise DiskError(
            f"QEMU for Windows cannot open {base}: {code_page} has not all of its characters",
            "have the image under a path of ASCII; those that are fetched are in KENAZ_CACHE_DIR",
        ) from error


async def _copy(file: int, base: Path) -> str:
    source = os.open(base, os.O_RDONLY | PLAIN)
    try:
        if _reflink(source, file):
            how = "reflink"
        else:
            how = "copy"
            for start, end in _extents(source):
                for offset in range(start, end, _CHUNK):
                    length = min(_CHUNK, end - offset)
                    await trio.to_thread.run_sync(_copy_piece, source, file, offset, length)
        return how
    finally:
        os.close(source)


def _copy_piece(source: int, file: int, offset: int, length: int) -> None:
    os.lseek(source, offset, os.SEEK_SET)
    os.lseek(file, offset, os.SEEK_SET)
    while length and (data := os.read(source, min(length, 1 << 20))):
        _write(file, data)
        length -= len(data)


def _extents(file: int) -> Iterator[tuple[int, int]]:
    """Where the file holds data; all of it where the platform, or on macOS the file system, does not tell."""
    end = os.fstat(file).st_size
    if sys.platform == "win32" or not hasattr(os, "SEEK_DATA"):
        yield 0, end
    else:
        at = 0
        while at < end:
            try:
                start = os.lseek(file, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # on macOS the file system's own: ENOTTY, ENOTSUP, EINVAL
                    yield at, end
                return  # after ENXIO holes up to the end
            at = os.lseek(file, start, os.SEEK_HOLE)
            yield start, at


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


@contextmanager
def _room(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskError(
                f"no space left for the disk {path}", f"free space on the file system of {path.parent}"
            ) from None
        raise
