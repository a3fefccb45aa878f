"""A real file system that behaves oddly, served by FUSE from a directory.

    odd_disk.py BACKING MOUNTPOINT [no-locks]

With `no-locks`, flock(2) fails as it does on NFS without a lock daemon. While there is a file
`BACKING.read-only`, whatever changes something fails as on a file system that the kernel has remounted after
an error.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

from mfusepy import FUSE, FuseOSError, Operations


class OddDisk(Operations):  # type: ignore[misc]
    """Hands everything on to a directory."""

    use_ns = True

    def __init__(self, backing: str) -> None:
        self._backing = backing

    def _at(self, path: str) -> str:
        return self._backing + path

    def _change(self, path: str) -> str:
        if os.path.exists(f"{self._backing}.read-only"):
            raise FuseOSError(errno.EROFS)
        return self._at(path)

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = os.lstat(self._at(path))
        names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_ino", "st_mtime_ns")
        values = {name: getattr(found, name) for name in names}
        return {**values, "st_mtime": values.pop("st_mtime_ns")}

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._at(path))]

    def mkdir(self, path: str, mode: int) -> int:
        os.mkdir(self._change(path), mode)
        return 0

    def mknod(self, path: str, mode: int, dev: int) -> int:
        os.mknod(self._change(path), mode, dev)
        return 0

    def chmod(self, path: str, mode: int) -> int:
        os.chmod(self._change(path), mode)
        return 0

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        return os.open(self._change(path), os.O_CREAT | os.O_RDWR, mode)

    def open(self, path: str, flags: int) -> int:
        # Where to write, the kernel says itself.
        return os.open(self._at(path), flags & ~os.O_APPEND)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._change(path)
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        os.truncate(self._change(path), length)
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        os.fsync(fh)
        return 0

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    def unlink(self, path: str) -> int:
        os.unlink(self._change(path))
        return 0

    def rmdir(self, path: str) -> int:
        os.rmdir(self._change(path))
        return 0

    def rename(self, old: str, new: str) -> int:
        os.rename(self._change(old), self._change(new))
        return 0


class DiskWithoutLocks(OddDisk):
    """A file system either answers for locks itself or leaves them to the kernel."""

    def flock(self, path: str, fh: int, op: int) -> int:
        raise FuseOSError(errno.ENOLCK)


if __name__ == "__main__":
    backing, mountpoint, *odd = sys.argv[1:]
    disk = DiskWithoutLocks(backing) if odd == ["no-locks"] else OddDisk(backing)
    FUSE(disk, mountpoint, foreground=True, nothreads=True, fsname="odd-disk")
