"""What the text of `spec.image` names. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from kenaz_engine.images.errors import ImageError
from kenaz_engine.images.manifest import NAME, TAG

_PINNED = re.compile(r"(?P<what>.+)@sha256:(?P<digest>[0-9a-fA-F]{64})", re.DOTALL)
FETCHED = ("https", "http", "file")
"""Schemes of URLs that are fetched."""


@dataclass(frozen=True, slots=True)
class Named:
    """An image by its name; `digest` is in hexadecimal. Empty is whichever is current."""

    name: str
    tag: str = ""
    digest: str = ""


@dataclass(frozen=True, slots=True)
class InFile:
    """A manifest or a disk of the user's, where it lies."""

    path: str


@dataclass(frozen=True, slots=True)
class AtUrl:
    """Something to fetch: a manifest (`.json`) or a disk. `digest` is that of the file as it comes."""

    url: str
    digest: str

    @property
    def name(self) -> str:
        """The name under which the store keeps it: no catalog can have one like it."""
        return f"@{self.digest[:16]}"

    @property
    def is_manifest(self) -> bool:
        """Whether the file is a manifest, which names its parts."""
        return urlsplit(self.url).path.endswith(".json")


Reference = Named | InFile | AtUrl


def file_at(url: str) -> Path:
    """The path of a `file:` URL."""
    from urllib.request import url2pathname  # 20 ms, which only a fetch should pay

    return Path(url2pathname(urlsplit(url).path))


_OF_URL = re.compile(r"@[0-9a-f]{16}")


def parse_reference(text: str) -> Reference:
    """`name`, `name:tag`, `name@sha256:...`, a path (with a slash, or ending in `.json`), or a URL with a
    digest.

    Raises ImageError for what is none of these.
    """
    pinned = _PINNED.fullmatch(text)
    what, digest = (pinned["what"], pinned["digest"].lower()) if pinned else (text, "")
    if "://" in what or what.startswith("file:"):
        return _at_url(what, digest)
    if "/" in text or text.endswith(".json"):
        return InFile(text)
    name, colon, tag = what.partition(":")
    if not (NAME.fullmatch(name) or _OF_URL.fullmatch(name)) or (colon and not TAG.fullmatch(tag)):
        raise ImageError(
            f"{text} is not the name of an image", "name[:tag], name@sha256:..., URL@sha256:..., or a path"
        )
    return Named(name, tag, digest)


def _at_url(url: str, digest: str) -> AtUrl:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ImageError(f"{url} is no URL: {error}") from None
    if parts.scheme not in FETCHED or not (parts.netloc or parts.scheme == "file"):
        raise ImageError(f"{url} cannot be fetched", "give an https:, http: or file: URL")
    return AtUrl(url, digest)
