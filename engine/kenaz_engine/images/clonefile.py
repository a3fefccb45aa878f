"""Copies of files that share their blocks, on macOS: clonefile(2) of APFS, which Python does not have.

Facts: clonefile(2) of macOS 14. Not yet run on a Mac by this project.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

NO_OWNER_COPY = 2
"""CLONE_NOOWNERCOPY: the copy is its maker's."""

CANNOT = frozenset({errno.ENOTSUP, errno.EXDEV, errno.ENOSYS})
"""Errors of a file system that shares no blocks, and of a base on another one."""

CloneFile = Callable[[bytes, bytes, int], int]
"""`int clonefile(const char *src, const char *dst, uint32_t flags)`; 0, or minus the errno."""


if sys.platform == "darwin":

    def _clonefile(base: bytes, path: bytes, flags: int) -> int:
        library = ctypes.CDLL(None, use_errno=True)
        library.clonefile.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint32)
        return 0 if library.clonefile(base, path, flags) == 0 else -ctypes.get_errno()

else:

    def _clonefile(base: bytes, path: bytes, flags: int) -> int:
        return -errno.ENOTSUP


def clone_file(base: Path, path: Path, clonefile: CloneFile = _clonefile) -> bool:
    """Makes `path` a copy of `base`, whatever its size in a moment; False where that cannot be had, with
    nothing at `path` then. Raises FileExistsError when there is something, and other OSErrors."""
    number = -clonefile(os.fsencode(base), os.fsencode(path), NO_OWNER_COPY)
    if number in CANNOT:
        return False
    if number:
        raise OSError(number, os.strerror(number), str(path))
    return True
