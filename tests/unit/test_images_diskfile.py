"""Headers of disk images that must not pass, forged byte by byte; QEMU itself is asked elsewhere."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from kenaz_engine.images.diskfile import DiskFile, inspect_disk
from kenaz_engine.images.errors import ImageError

MIB = 1 << 20
CLUSTER = 1 << 16


def qcow2(
    *,
    version: int = 3,
    backing: tuple[int, int] = (0, 0),
    cluster_bits: int = 16,
    size: int = 8 * MIB,
    encryption: int = 0,
    l1: tuple[int, int] = (1, 3 * CLUSTER),
    refcounts: tuple[int, int] = (CLUSTER, 1),
    snapshots: tuple[int, int] = (0, 0),
    incompatible: int = 0,
    refcount_order: int = 4,
    header_length: int = 104,
    more: bytes = b"",
    total: int = 4 * CLUSTER,
) -> bytes:
    """A qcow2 image as `qemu-img create` lays it out, but for what is asked."""
    head = struct.pack(
        ">4sIQIIQIIQQIIQ",
        b"QFI\xfb",
        version,
        *backing,
        cluster_bits,
        size,
        encryption,
        *l1,
        *refcounts,
        *snapshots,
    )
    if version == 3:
        head += struct.pack(">QQQII", incompatible, 0, 0, refcount_order, header_length)
    return (head + more).ljust(total, b"\0")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk"


def inspect(path: Path, content: bytes) -> DiskFile:
    path.write_bytes(content)
    return inspect_disk(path)


@pytest.mark.parametrize(
    "content",
    [
        qcow2(),
        qcow2(version=2),
        qcow2(incompatible=1 << 3, header_length=112, more=b"\1".ljust(8, b"\0")),
        qcow2(header_length=112),
        qcow2(snapshots=(1, 3 * CLUSTER)),
        qcow2(more=struct.pack(">II5s", 0x12345678, 5, b"hello")),
        # The last cluster may be cut: QEMU reads what is missing as zeros.
        qcow2(total=3 * CLUSTER + 8),
    ],
)
def test_a_qcow2_image_that_stands_alone_is_taken(path: Path, content: bytes) -> None:
    assert inspect(path, content) == DiskFile("qcow2", 8 * MIB)


def test_a_wider_table_holds_half_as_much(path: Path) -> None:
    extended = {"incompatible": 1 << 4, "size": 512 * MIB}
    assert inspect(path, qcow2(**extended, l1=(2, 3 * CLUSTER))).virtual_size == 512 * MIB
    with pytest.raises(ImageError, match="its table is for 1 times 268435456"):
        inspect(path, qcow2(**extended))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (qcow2(backing=(112, 11)), "has a backing file, and could so read any file of this host"),
        (qcow2(version=2, backing=(72, 11)), "has a backing file"),
        (qcow2(backing=(112, 0)), "has a backing file"),
        (qcow2(backing=(0, 11)), "has a backing file"),
        (qcow2(incompatible=1 << 2), "has an external data file, and could so read any file of this host"),
        (qcow2(more=struct.pack(">II8s", 0x44415441, 8, b"/etc/pwd")), "names an external data file"),
        (
            qcow2(more=struct.pack(">II8sII", 1, 5, b"x", 0x44415441, 0)),
            "names an external data file",
        ),
        (qcow2(version=2, more=struct.pack(">II", 0x44415441, 0)), "names an external data file"),
        (qcow2(encryption=1), "is encrypted"),
        (qcow2(encryption=2), "is encrypted"),
        (qcow2(more=struct.pack(">II16s", 0x0537BE77, 16, b"")), "is encrypted"),
        (qcow2(incompatible=1 << 5), "has unknown features: 0x20"),
        (qcow2(incompatible=1 << 63), "has unknown features: 0x8000000000000000"),
        (qcow2(incompatible=1 << 0), "was not closed properly, or is damaged"),
        (qcow2(incompatible=1 << 1), "was not closed properly, or is damaged"),
        (qcow2(incompatible=1 << 3, header_length=112, more=b"\2"), "unknown compression: 2"),
        (qcow2(incompatible=1 << 3), "unknown compression: 0"),
        (qcow2(header_length=112, more=b"\1"), "unknown compression: 1"),
        (qcow2(version=1), "is of version 1, and known are 2 and 3"),
        (qcow2(version=4), "is of version 4"),
        (qcow2(cluster_bits=8), r"has clusters of 2\^8 bytes"),
        (qcow2(cluster_bits=22), r"has clusters of 2\^22 bytes"),
        (qcow2(cluster_bits=1 << 31), r"has clusters of 2\^2147483648 bytes"),
        (qcow2(size=0), "says that its disk has 0 bytes"),
        (qcow2(size=8 * MIB + 1), "says that its disk has 8388609 bytes"),
        (qcow2(size=513 * MIB), "its table is for 1 times 536870912"),
        (qcow2(size=1 << 63, l1=((1 << 34) & 0xFFFFFFFF, 3 * CLUSTER)), "its table is for 0 times"),
        (qcow2(l1=(1 << 23, 3 * CLUSTER), total=4 * CLUSTER), "its table is for 8388608 times"),
        (qcow2(l1=(1, 4 * CLUSTER)), "table of clusters of the qcow2 image is not where its header says"),
        (qcow2(l1=(1, 3 * CLUSTER + 8)), "table of clusters of the qcow2 image is not where"),
        (qcow2(l1=(1, 0)), "table of clusters of the qcow2 image is not where"),
        (qcow2(l1=(1, (1 << 64) - CLUSTER)), "table of clusters of the qcow2 image is not where"),
        (qcow2(refcounts=(4 * CLUSTER, 1)), "table of reference counts of the qcow2 image is not where"),
        (qcow2(refcounts=(3 * CLUSTER, 2)), "table of reference counts of the qcow2 image is not where"),
        (qcow2(refcounts=(CLUSTER, 0)), "has no reference counts"),
        (qcow2(more=struct.pack(">II", 0, CLUSTER)), "header of the qcow2 image is damaged"),
        (qcow2(snapshots=(0, 8)), "list of snapshots of the qcow2 image is not where"),
        (qcow2(snapshots=(1, 5 * CLUSTER)), "list of snapshots of the qcow2 image is not where"),
        (qcow2(refcount_order=7), "header of the qcow2 image is damaged"),
        (qcow2(header_length=96), "header of the qcow2 image is damaged"),
        (qcow2(header_length=105), "header of the qcow2 image is damaged"),
        (qcow2(cluster_bits=9, header_length=520), "header of the qcow2 image is longer than a cluster"),
        (qcow2(more=struct.pack(">II", 1, 0xFFFFFFFF)), "header of the qcow2 image is damaged"),
        (qcow2()[:103], "header of the qcow2 image is cut short"),
        (qcow2()[:71], "header of the qcow2 image is cut short"),
        (b"QFI\xfb", "header of the qcow2 image is cut short"),
        (b"", "the disk image is empty"),
    ],
)
def test_a_qcow2_image_that_leads_elsewhere_or_lies_is_refused(
    path: Path, content: bytes, message: str
) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        inspect(path, content)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("begins", "name"),
    [(b"KDMV", "vmdk"), (b"vhdxfile", "vhdx"), (b"LUKS\xba\xbe", "luks"), (b"QED\0", "qed")],
)
def test_other_formats_are_named_and_what_makes_them_fit(path: Path, begins: bytes, name: str) -> None:
    with pytest.raises(ImageError, match=f"is of the format {name}, not raw or qcow2") as caught:
        inspect(path, begins.ljust(1024, b"\0"))
    assert caught.value.hint == f"qemu-img convert -f {name} -O qcow2"


def test_all_else_is_raw_in_whole_sectors(path: Path) -> None:
    assert inspect(path, b"\0" * 1024) == DiskFile("raw", 1024)
    assert inspect(path, b"x") == DiskFile("raw", 512)


def test_only_regular_files_are_disks(tmp_path: Path, path: Path) -> None:
    os.mkfifo(path)
    for place in (path, tmp_path):
        with pytest.raises(ImageError, match="is no regular file"):
            inspect_disk(place)
    with pytest.raises(FileNotFoundError):
        inspect_disk(tmp_path / "none")
