"""What a disk image is, by its own header: so that none makes QEMU open another file of the host.

Facts: docs/interop/qcow2.txt of QEMU, and its block drivers' limits. Only headers are read; the tables of a
qcow2 image are QEMU's to judge when it reads them, and can lead it nowhere but into the same file.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from kenaz_engine.images.errors import ImageError
from kenaz_engine.images.qcow2 import HEADER, HEADER_3, MAGIC, MAX_L1, SECTOR
from kenaz_engine.openflags import PLAIN

_MIN_HEADER_3 = HEADER.size + HEADER_3.size
_MAX_CLUSTER = 1 << 21  # bytes of the largest cluster; header and extensions lie in the first

_DIRTY, _CORRUPT, _EXTERNAL, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))
_KNOWN = _DIRTY | _CORRUPT | _EXTERNAL | _COMPRESSION | _EXTENDED_L2
_COMPRESSIONS = (0, 1)  # zlib, zstd
_END, _EXTENSION_ENCRYPTION, _EXTENSION_EXTERNAL = 0, 0x0537BE77, 0x44415441

_OTHERS = {
    b"KDMV": "vmdk",
    b"COWD": "vmdk",
    b"# Disk DescriptorFile": "vmdk",
    b"vhdxfile": "vhdx",
    b"conectix": "vpc",
    b"<<< ": "vdi",
    b"QED\0": "qed",
    b"LUKS\xba\xbe": "luks",
    b"WithoutFreeSpace": "parallels",
    b"WithouFreSpacExt": "parallels",
}
"""How formats begin that QEMU knows and that are not taken."""


@dataclass(frozen=True, slots=True)
class DiskFile:
    """A disk image: `format` is `raw` or `qcow2`; `virtual_size` is what the guest sees, in bytes."""

    format: str
    virtual_size: int


def inspect_disk(path: Path) -> DiskFile:
    """Looks at the header of the disk image at `path`.

    A qcow2 image is taken only if it stands alone: no backing file, no external data file, nothing encrypted,
    no feature that is not known here, closed properly, and its tables inside of the file. What begins like
    another format that QEMU knows is refused, all else is raw. Raises ImageError, and OSError when the file
    cannot be read.
    """
    file = os.open(path, os.O_RDONLY | PLAIN | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{path} is no regular file")
        head = os.read(file, SECTOR)
        if head.startswith(MAGIC):
            head += os.read(file, _MAX_CLUSTER - SECTOR)
    finally:
        os.close(file)
    try:
        return _inspect(head, status.st_size)
    except ImageError as error:
        raise ImageError(f"{path}: {error}", error.hint) from None


def _inspect(head: bytes, size: int) -> DiskFile:
    if not head:
        raise ImageError("the disk image is empty")
    if head.startswith(MAGIC):
        return DiskFile("qcow2", _qcow2(head, size))
    other = next((name for magic, name in _OTHERS.items() if head.startswith(magic)), None)
    if other:
        raise ImageError(
            f"the disk image is of the format {other}, not raw or qcow2",
            f"qemu-img convert -f {other} -O qcow2",
        )
    return DiskFile("raw", -(-size // SECTOR) * SECTOR)


def _qcow2(head: bytes, size: int) -> int:
    """The virtual size of a qcow2 image of `size` bytes that begins with `head`."""
    virtual_size: int
    if len(head) < HEADER.size:
        raise ImageError("the header of the qcow2 image is cut short")
    (
        _,
        version,
        backing_offset,
        backing_size,
        cluster_bits,
        virtual_size,
        encryption,
        l1_entries,
        l1_offset,
        refcount_offset,
        refcount_clusters,
        snapshots,
        snapshots_offset,
    ) = HEADER.unpack_from(head)
    if version not in (2, 3):
        raise ImageError(f"the qcow2 image is of version {version}, and known are 2 and 3")
    if backing_offset or backing_size:
        raise ImageError(
            "the qcow2 image has a backing file, and could so read any file of this host",
            "make one that stands alone: qemu-img convert -O qcow2",
        )
    if encryption:
        raise ImageError("the qcow2 image is encrypted", "qemu-img convert -O qcow2")
    if not 9 <= cluster_bits <= 21:
        raise ImageError(f"the qcow2 image has clusters of 2^{cluster_bits} bytes, which QEMU has not")
    cluster = 1 << cluster_bits
    incompatible, header_length = _version_3(head) if version == 3 else (0, HEADER.size)
    if header_length > cluster:
        raise ImageError("the header of the qcow2 image is longer than a cluster")
    _extensions(head[header_length:cluster])
    entries = cluster // (16 if incompatible & _EXTENDED_L2 else 8)
    needed = -(-virtual_size // (cluster * entries))
    if virtual_size == 0 or virtual_size % SECTOR:
        raise ImageError(f"the qcow2 image says that its disk has {virtual_size} bytes")
    if l1_entries < needed or l1_entries * 8 > MAX_L1:
        raise ImageError(
            f"the qcow2 image says that its disk has {virtual_size} bytes, and its table is for "
            f"{l1_entries} times {cluster * entries}"
        )
    if not refcount_clusters:
        raise ImageError("the qcow2 image has no reference counts")
    for name, offset, length in (
        ("table of clusters", l1_offset, l1_entries * 8),
        ("table of reference counts", refcount_offset, refcount_clusters * cluster),
        ("list of snapshots", snapshots_offset, snapshots),
    ):
        # Where the last cluster is cut short, QEMU reads the rest of it as zeros.
        inside = cluster <= offset <= -(-size // cluster) * cluster - length
        if (offset or length) and (offset % cluster or not inside):
            raise ImageError(f"the {name} of the qcow2 image is not where its header says")
    return virtual_size


def _version_3(head: bytes) -> tuple[int, int]:
    """The incompatible features and the length of the header."""
    if len(head) < _MIN_HEADER_3:
        raise ImageError("the header of the qcow2 image is cut short")
    incompatible: int
    header_length: int
    incompatible, _, _, refcount_order, header_length = HEADER_3.unpack_from(head, HEADER.size)
    if incompatible & ~_KNOWN:
        raise ImageError(f"the qcow2 image has unknown features: {incompatible & ~_KNOWN:#x}")
    if incompatible & _EXTERNAL:
        raise ImageError(
            "the qcow2 image has an external data file, and could so read any file of this host",
            "make one that stands alone: qemu-img convert -O qcow2",
        )
    if incompatible & (_DIRTY | _CORRUPT):
        raise ImageError(
            "the qcow2 image was not closed properly, or is damaged",
            "qemu-img check -r all, then publish again",
        )
    if refcount_order > 6 or header_length < _MIN_HEADER_3 or header_length % 8:
        raise ImageError("the header of the qcow2 image is damaged")
    # The kind of compression is in a byte of its own, where the header is long enough; else it is zlib.
    kind = head[_MIN_HEADER_3] if min(header_length, len(head)) > _MIN_HEADER_3 else 0
    if kind not in _COMPRESSIONS or bool(kind) != bool(incompatible & _COMPRESSION):
        raise ImageError(f"the qcow2 image has an unknown compression: {kind}")
    return incompatible, header_length


def _extensions(area: bytes) -> None:
    """Looks through the header's extensions for those that name other files or keys."""
    while len(area) >= 8:
        kind, length = struct.unpack_from(">II", area)
        if length > len(area) - 8:
            raise ImageError("the header of the qcow2 image is damaged")
        if kind == _END:
            return
        if kind == _EXTENSION_EXTERNAL:
            raise ImageError("the qcow2 image names an external data file", "qemu-img convert -O qcow2")
        if kind == _EXTENSION_ENCRYPTION:
            raise ImageError("the qcow2 image is encrypted", "qemu-img convert -O qcow2")
        area = area[8 + -(-length // 8) * 8 :]
