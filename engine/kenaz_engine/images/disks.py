"""Ephemeral disks: copy-on-write overlays over an image's root disk."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import trio

from kenaz_engine.images.errors import ImageError


class DiskError(ImageError):
    """An ephemeral disk cannot be made."""


async def create_overlay(
    path: Path, *, base: Path, base_format: str, size: int, environment: Mapping[str, str] | None = None
) -> None:
    """Makes a qcow2 overlay of `size` bytes at `path`, over `base`, which is never written to.

    `path` must not exist; it is made readable by the owner alone. `base` must be absolute, because qcow2
    keeps the name as it is given. `environment` is added to that of qemu-img. Raises DiskError, with nothing
    left at `path`, when `size` is less than that of a raw base, when the disk is full, or when qemu-img is
    missing or refuses; FileExistsError when `path` exists.
    """
    if not base.is_absolute():
        raise ValueError(f"the base of an overlay needs an absolute path, not {base}")
    if base_format == "raw" and size < base.stat().st_size:
        raise DiskError(
            f"a disk of {size} bytes is smaller than its image of {base.stat().st_size} bytes",
            "raise spec.machine.disk",
        )
    # Made here, so that the mode is right from the start and an existing file is never overwritten.
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    command = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        str(base),
        "-F",
        base_format,
        str(path),
        str(size),
    ]
    variables = {**os.environ, "LC_ALL": "C", **(environment or {})}
    try:
        done = await trio.run_process(
            command, capture_stdout=True, capture_stderr=True, check=False, env=variables
        )
        if done.returncode:
            raise _failure(path, done)
    except FileNotFoundError:
        path.unlink(missing_ok=True)
        raise DiskError("qemu-img is not installed", "apt-get install qemu-utils") from None
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _failure(path: Path, done: subprocess.CompletedProcess[bytes]) -> DiskError:
    said = done.stderr.decode(errors="replace").strip()
    if os.strerror(errno.ENOSPC) in said:
        return DiskError(
            f"no space left for the disk {path}", f"free space on the file system of {path.parent}"
        )
    return DiskError(f"qemu-img could not make {path}: {said.splitlines()[-1] if said else done.returncode}")
