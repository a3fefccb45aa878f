"""The qcow2 format, as far as an empty overlay needs it. Pure.

Facts: docs/interop/qcow2.txt of QEMU. The tests hold what is written here against `qemu-img`.
"""

from __future__ import annotations

import struct

MAGIC = b"QFI\xfb"
SECTOR = 512
MAX_L1 = 32 << 20
"""Bytes of the largest first-level table that QEMU reads."""

HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
"""magic, version, offset and length of the backing file's name, cluster bits, virtual size, encryption,
entries and offset of the first-level table, offset and clusters of the refcount table, number and offset of
snapshots."""

HEADER_3 = struct.Struct(">QQQII")
"""What version 3 adds: incompatible, compatible and autoclear features, refcount order, header length."""

_BITS = 16
_CLUSTER = 1 << _BITS  # bytes; what qemu-img takes by default
_REFCOUNT_ORDER = 4  # 16 bits each
_MAX_NAME = 1023  # bytes
_BACKING_FORMAT = 0xE2792ACA


def overlay(name: bytes, base_format: str, size: int) -> tuple[int, dict[int, bytes]]:
    """An overlay of `size` bytes over the file of that name, in which nothing is written yet.

    Returns the length of the file and what it holds at which offset; the rest is zeros. `size` is rounded up
    to whole sectors. Raises ValueError for a name or a size that the format cannot hold.
    """
    if len(name) > _MAX_NAME:
        raise ValueError(f"the path of the base has {len(name)} bytes, and qcow2 holds {_MAX_NAME}")
    size = -(-size // SECTOR) * SECTOR
    # A second-level table is a cluster of 8-byte entries, each for one cluster.
    entries = max(1, -(-size // (_CLUSTER * (_CLUSTER // 8))))
    if entries * 8 > MAX_L1:
        raise ValueError(f"a disk of {size} bytes is larger than qcow2 allows")
    clusters = 3 + -(-entries * 8 // _CLUSTER)
    extensions = _extension(_BACKING_FORMAT, base_format.encode()) + _extension(0, b"")
    length = HEADER.size + HEADER_3.size
    head = HEADER.pack(
        MAGIC,
        3,
        length + len(extensions),
        len(name),
        _BITS,
        size,
        0,
        entries,
        3 * _CLUSTER,
        _CLUSTER,
        1,
        0,
        0,
    )
    head += HEADER_3.pack(0, 0, 0, _REFCOUNT_ORDER, length)
    return clusters * _CLUSTER, {
        0: head + extensions + name,
        _CLUSTER: struct.pack(">Q", 2 * _CLUSTER),
        2 * _CLUSTER: struct.pack(">H", 1) * clusters,
    }


def _extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">II", kind, len(data)) + data + b"\0" * (-len(data) % 8)
