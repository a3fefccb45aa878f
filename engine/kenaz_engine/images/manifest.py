"""The manifest of an image, `image.json`: what it consists of and how it is booted. Pure: looks at no
file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from kenaz_engine.images.errors import ImageError

__all__ = ["MANIFEST", "ConsolePattern", "Image", "Part", "compose_manifest", "parse_manifest"]

MANIFEST = "image.json"
SCHEMA = 1
MAX_MANIFEST = 1 << 20
"""Bytes of the largest manifest that is read."""

PATTERN_EVENTS = frozenset({"guest.panic", "guest.emergency", "firmware.shell", "guest.ready"})
ROOT_FORMATS = frozenset({"raw", "qcow2"})
PARTS = ("kernel", "initrd", "root")
"""What an image can consist of; all but `root` may be missing."""

_T = TypeVar("_T")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_FILE_NAME = TAG
DIGEST = re.compile(r"[0-9a-f]{64}")


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
    """An image on this machine: a kernel, perhaps an initial RAM disk, and a root disk; or a root disk alone.

    `digest` is the manifest's (`sha256:...`), and with it that of all parts; empty for a disk of the user's
    that is used where it lies. `manifest` is None then, too.
    """

    name: str
    tag: str
    arch: str
    digest: str
    parts: Mapping[str, Part]
    root_format: str
    cmdline: str
    console_device: str
    console_patterns: tuple[ConsolePattern, ...]
    manifest: Path | None

    @property
    def kernel(self) -> Path | None:
        """The kernel, fit for QEMU's `-kernel`; None where the firmware boots the root disk."""
        return self.parts["kernel"].path if "kernel" in self.parts else None

    @property
    def initrd(self) -> Path | None:
        """The initial RAM disk, where there is one."""
        return self.parts["initrd"].path if "initrd" in self.parts else None

    @property
    def root(self) -> Path:
        """The root disk, only ever used as the base of an overlay."""
        return self.parts["root"].path


def parse_manifest(content: bytes, directory: Path, blobs: Path | None = None) -> Image:
    """The image whose manifest has `content` and whose parts are in `directory`, by the names that it gives.

    With `blobs`, they are there instead, by their digests, and so is the manifest. Raises ImageError that
    says which field is wrong.
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
    names = [name for name in PARTS if name == "root" or listed.has(name)]
    if "initrd" in names and "kernel" not in names:
        raise listed.wrong("initrd", "is of no use without a kernel")
    digest = hashlib.sha256(content).hexdigest()
    return Image(
        name=document.matching("name", NAME, "a plain name"),
        tag=document.matching("tag", TAG, "a plain tag"),
        arch=document.matching("arch", NAME, "a plain name"),
        digest=f"sha256:{digest}",
        parts={name: _part(listed.inner(name), directory, blobs) for name in names},
        root_format=listed.inner("root").choice("format", ROOT_FORMATS),
        cmdline=document.get("cmdline", str),
        console_device=console.get("device", str),
        console_patterns=tuple(
            _pattern(_Fields(entry, f"console.patterns[{number}]."))
            for number, entry in enumerate(console.get("patterns", list))
        ),
        manifest=blobs / digest if blobs else directory / MANIFEST,
    )


def file_names(content: bytes) -> dict[str, str]:
    """The files of the parts, as a manifest that `parse_manifest` reads names them."""
    return {name: part["file"] for name, part in json.loads(content)["parts"].items() if name in PARTS}


def compose_manifest(
    *,
    name: str,
    tag: str,
    arch: str,
    parts: Mapping[str, tuple[int, str]],
    root_format: str,
    cmdline: str = "",
    console_device: str = "",
    console_patterns: Iterable[ConsolePattern] = (),
) -> bytes:
    """A manifest for an image that came without one. `parts` are size and digest by name. The same values
    give the same bytes, hence the same digest."""
    listed = {
        part: {"file": part, "size": size, "sha256": sha256}
        | ({"format": root_format} if part == "root" else {})
        for part, (size, sha256) in sorted(parts.items())
    }
    document = {
        "schema": SCHEMA,
        "name": name,
        "tag": tag,
        "arch": arch,
        "cmdline": cmdline,
        "console": {
            "device": console_device,
            "patterns": [{"event": event, "pattern": pattern} for event, pattern in console_patterns],
        },
        "parts": listed,
    }
    return json.dumps(document, indent=2).encode() + b"\n"


def _part(fields: _Fields, directory: Path, blobs: Path | None) -> Part:
    size = fields.get("size", int)
    if size < 0:
        raise fields.wrong("size", "is negative")
    file = fields.matching("file", _FILE_NAME, "a plain file name")
    sha256 = fields.matching("sha256", DIGEST, "a SHA-256 digest in lower-case hexadecimal")
    return Part(blobs / sha256 if blobs else directory / file, size, sha256)


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

    def has(self, name: str) -> bool:
        return name in self._data

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
