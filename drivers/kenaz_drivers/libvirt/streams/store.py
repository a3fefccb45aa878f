"""What a file is put into: a pool of a libvirt, as far as an upload needs it, and how that fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

PIECE = 64 << 10
"""Bytes that go at a time. A message of libvirt holds four times that."""


class Failed(Exception):
    """What libvirt says, and the number of its error."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class Busy(Exception):
    """Somebody else reads or writes that volume just now."""


class Gone(Failed):
    """There is no such volume, or no more."""


class Store(Protocol):
    """A pool, as far as a file is put there. Whatever asks for a volume raises Gone where there is none."""

    def create(self, name: str, size: int) -> bool:
        """Makes a volume of so many zeros; false where there is one of that name."""

    def read(self, name: str, offset: int, length: int) -> bytes:
        """What is there, at the most `length` bytes. Raises Busy."""

    def write(self, name: str, offset: int, length: int, pieces: Iterator[bytes]) -> None:
        """Writes the pieces, of `length` bytes together. Raises Busy before it takes any."""

    def stamp(self, name: str) -> str:
        """What is another one after each write."""

    def delete(self, name: str) -> None:
        """Removes it, if it can be."""
