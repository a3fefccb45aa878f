"""Writes cpio archives of the `newc` kind, as the kernel unpacks them. Pure: no root, no clock."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """One file. `mode` holds type and permissions; `device` is (major, minor) of a device node."""

    name: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str, permissions: int = 0o755) -> Entry:
    """A directory; its parents must be in the archive before it."""
    return Entry(name, stat.S_IFDIR | permissions)


def file(name: str, content: bytes, permissions: int = 0o644) -> Entry:
    """A regular file."""
    return Entry(name, stat.S_IFREG | permissions, content)


def character_device(name: str, major: int, minor: int, permissions: int = 0o600) -> Entry:
    """A character device node, such as /dev/console, which the kernel opens before any init runs."""
    return Entry(name, stat.S_IFCHR | permissions, device=(major, minor))


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive of `entries`, in their order, owned by root and dated 1970."""
    return b"".join(_records(entries))


def _records(entries: Iterable[Entry]) -> Iterator[bytes]:
    for inode, entry in enumerate(entries, start=1):
        yield _record(inode, entry)
    yield _record(0, Entry("TRAILER!!!", 0))


def _record(inode: int, entry: Entry) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.content), 0, 0, *entry.device, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name) + _padded(entry.content)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
