"""The manifest of an image, `image.json`: what it consists of and how it is booted."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from kenaz_engine.images.errors import ImageError

MANIFEST = "image.json"
SCHEMA = 1
MAX_MANIFEST = 1 << 20
"""Bytes of the largest manifest that is read."""

PATTERN_EVENTS = frozenset({"guest.panic", "guest.emergency", "firmware.shell", "guest.ready"})
ROOT_FORMATS = frozenset({"raw", "qcow2"})

_T = TypeVar("_T")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Part:
    """One file of an image. `size` is in bytes; `sha256` in lower-case hexadecimal."""

    path: Path
    size: int
    sha256: str


class ConsolePattern(NamedTuple):
    """A regular expression for one line of the console, and the event that a line which matches raises."""

    event: str
    pattern: str


@dataclass(frozen=True, slots=True)
class Image:
    """An image on this machine. `digest` is the manifest's (`sha256:...`), and with it that of all parts."""

    name: str
    tag: str
    arch: str
    digest: str
    parts: Mapping[str, Part]
    root_format: str
    cmdline: str
    console_device: str
    console_patterns: tuple[ConsolePattern, ...]

    @property
    def manifest(self) -> Path:
        """The manifest itself."""
        return self.kernel.with_name(MANIFEST)

    @property
    def kernel(self) -> Path:
        """The kernel, fit for QEMU's `-kernel`."""
        return self.parts["kernel"].path

    @property
    def initrd(self) -> Path:
        """The initial RAM disk."""
        return self.parts["initrd"].path

    @property
    def root(self) -> Path:
        """The root disk, only ever used as the base of an overlay."""
        return self.parts["root"].path


def parse_manifest(content: bytes, directory: Path) -> Image:
    """The image whose manifest has `content` and whose parts are in `directory`.

    Pure: looks at no file. Raises ImageError that says which field is wrong.
    """
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{MANIFEST} is not JSON: {error}") from None
    document = _Fields(data, "")
    if document.get("schema", int) != SCHEMA:
        raise ImageError(
            f"{MANIFEST}: schema is {document.get('schema', int)}, and this launcher reads {SCHEMA}"
        )
    console, listed = document.inner("console"), document.inner("parts")
    return Image(
        name=document.matching("name", NAME, "a plain name"),
        tag=document.get("tag", str),
        arch=document.matching("arch", NAME, "a plain name"),
        digest=f"sha256:{hashlib.sha256(content).hexdigest()}",
        parts={name: _part(listed.inner(name), directory) for name in ("kernel", "initrd", "root")},
        root_format=listed.inner("root").choice("format", ROOT_FORMATS),
        cmdline=document.get("cmdline", str),
        console_device=console.get("device", str),
        console_patterns=tuple(
            _pattern(_Fields(entry, f"console.patterns[{number}]."))
            for number, entry in enumerate(console.get("patterns", list))
        ),
    )


def _part(fields: _Fields, directory: Path) -> Part:
    size = fields.get("size", int)
    if size < 0:
        raise fields.wrong("size", "is negative")
    return Part(
        directory / fields.matching("file", _FILE_NAME, "a plain file name"),
        size,
        fields.matching("sha256", _DIGEST, "a SHA-256 digest in lower-case hexadecimal"),
    )


def _pattern(fields: _Fields) -> ConsolePattern:
    pattern = fields.get("pattern", str)
    try:
        re.compile(pattern)
    except re.error as error:
        raise fields.wrong("pattern", f"is no regular expression: {error}") from None
    return ConsolePattern(fields.choice("event", PATTERN_EVENTS), pattern)


class _Fields:
    """A JSON object of the manifest, with its place for messages."""

    def __init__(self, data: object, place: str) -> None:
        if not isinstance(data, dict):
            raise ImageError(f"{MANIFEST}: {place.rstrip('.') or 'the document'} is no object")
        self._data = data
        self._place = place

    def wrong(self, name: str, what: str) -> ImageError:
        return ImageError(f"{MANIFEST}: {self._place}{name} {what}")

    def get(self, name: str, kind: type[_T]) -> _T:
        value = self._data.get(name)
        # JSON's true is no number, although Python's is.
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.wrong(name, f"is missing, or not of type {kind.__name__}")
        return value

    def inner(self, name: str) -> _Fields:
        return _Fields(self._data.get(name), f"{self._place}{name}.")

    def matching(self, name: str, pattern: re.Pattern[str], what: str) -> str:
        value = self.get(name, str)
        if not pattern.fullmatch(value):
            raise self.wrong(name, f"is not {what}")
        return value

    def choice(self, name: str, choices: frozenset[str]) -> str:
        value = self.get(name, str)
        if value not in choices:
            raise self.wrong(name, f"is none of {', '.join(sorted(choices))}")
        return value
