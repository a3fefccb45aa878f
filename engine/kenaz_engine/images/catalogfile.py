"""The catalogs: which images can be named, where they are published, and what they must be."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from kenaz_engine.images.errors import ImageError
from kenaz_engine.images.manifest import PARTS, ConsolePattern
from kenaz_engine.images.policy import ALWAYS, DAILY, NEVER, Refresh
from kenaz_engine.spec import schema, yamlfile
from kenaz_engine.spec.faults import Fault, InvalidFile
from kenaz_engine.spec.units import parse_duration
from kenaz_engine.spec.yamlfile import Document, dotted, shorten


@dataclass(frozen=True, slots=True)
class Published:
    """A file that a publisher offers: digest and size (bytes) of it as it comes, how it is packed, and the
    bytes that it unpacks to. `key` is minisign's public key, or empty."""

    urls: tuple[str, ...]
    sha256: str
    size: int
    compression: str = "none"
    unpacked_size: int = 0
    key: str = ""


@dataclass(frozen=True, slots=True)
class AtManifest:
    """An image whose manifest is published. With `sha256` it can never change; else its signature says that
    it is the publisher's."""

    urls: tuple[str, ...]
    sha256: str = ""
    key: str = ""

    @property
    def rolling(self) -> bool:
        """Whether another image may be published there tomorrow."""
        return not self.sha256


@dataclass(frozen=True, slots=True)
class InParts:
    """An image that comes without a manifest: its files, and how it is booted."""

    parts: Mapping[str, Published]
    root_format: str
    tag: str = "latest"
    cmdline: str = ""
    console_device: str = ""
    console_patterns: tuple[ConsolePattern, ...] = ()
    rolling: bool = field(default=False, init=False)


Source = AtManifest | InParts


@dataclass(frozen=True, slots=True)
class Offer:
    """An image for one architecture. `hint` is what a person does to get it, where there is no `source`."""

    source: Source | None
    hint: str


@dataclass(frozen=True, slots=True)
class Entry:
    """An image that a catalog knows, by architecture."""

    name: str
    description: str
    refresh: Refresh
    offers: Mapping[str, Offer]


def user_catalog() -> Path:
    """The user's own catalog, which need not exist: $KENAZ_CATALOG, or `catalog.yaml` in the user's
    configuration directory for kenaz."""
    if given := os.environ.get("KENAZ_CATALOG"):
        return Path(given).absolute()
    import platformdirs

    return Path(platformdirs.user_config_dir("kenaz", appauthor=False)) / "catalog.yaml"


def catalog() -> dict[str, Entry]:
    """All images that can be named: the user's before the shipped ones. Raises InvalidFile and ImageError."""
    return {name: entry for text, file in _files() for name, entry in load_catalog(text, file).items()}


def artifacts() -> dict[str, dict[str, Published]]:
    """All workbenches' builds that can be named, by architecture or `any`: as `catalog`."""
    return {name: offers for text, file in _files() for name, offers in load_artifacts(text, file).items()}


def _files() -> Iterator[tuple[str | bytes, str]]:
    """The content and the name of each catalog; what a later one says counts."""
    yield resources.files("kenaz_specs").joinpath("images/catalog.yaml").read_text("utf-8"), "catalog.yaml"
    path = user_catalog()
    try:
        yield path.read_bytes(), str(path)
    except FileNotFoundError:
        if os.environ.get("KENAZ_CATALOG"):
            raise ImageError(f"there is no catalog {path}", "see KENAZ_CATALOG") from None
    except OSError as error:
        raise ImageError(f"the catalog {path} cannot be read: {error.strerror}") from None


def load_catalog(text: str | bytes, file: str) -> dict[str, Entry]:
    """The images of the catalog that `text` describes, which came from `file`. Raises InvalidFile with every
    fault."""
    return {name: _entry(name, data) for name, data in _checked(text, file)["images"].items()}


def load_artifacts(text: str | bytes, file: str) -> dict[str, dict[str, Published]]:
    """The builds of that catalog. Raises InvalidFile with every fault."""
    return {
        name: {arch: _published(part) for arch, part in data["arch"].items()}
        for name, data in _checked(text, file).get("artifacts", {}).items()
    }


@lru_cache(maxsize=4)
def _checked(text: str | bytes, file: str) -> Mapping[str, Any]:
    faults: list[Fault] = []
    document = yamlfile.parse(text, file, faults)
    if wrong := schema.check_kind(document, "Catalog"):
        yamlfile.refuse([*faults, *wrong])
    faults += yamlfile.untold(schema.check(document, schema.shipped("Catalog")), faults)
    faults += yamlfile.untold(_meaning_faults(document), faults)
    if faults:
        yamlfile.refuse(faults)
    data: Mapping[str, Any] = document.data
    return data


# --- what a schema cannot say -------------------------------------------------------------------------------


def _meaning_faults(document: Document) -> Iterator[Fault]:
    """Looks only at values of the right type; the rest are faults already."""
    for name, image in _mapping(_mapping(document.data).get("images")).items():
        for arch, place in _mapping(_mapping(image).get("arch")).items():
            yield from _place_faults(document, ("images", name, "arch", arch), _mapping(place))
    for name, artifact in _mapping(_mapping(document.data).get("artifacts")).items():
        for arch, part in _mapping(_mapping(artifact).get("arch")).items():
            yield from _part_faults(document, ("artifacts", name, "arch", arch), _mapping(part))


def _place_faults(document: Document, path: yamlfile.Path, place: Mapping[str, Any]) -> Iterator[Fault]:
    def fault(at: yamlfile.Path, message: str, hint: str = "") -> Fault:
        return Fault(document.place(at), dotted(at), message, hint)

    given = [key for key in ("manifest", "parts") if key in place]
    if len(given) > 1:
        yield fault((*path, "parts"), "there is a manifest already, which names the parts")
    elif not given and "hint" not in place:
        yield fault(
            path, "says neither where the image is nor how to get it", "add manifest:, parts: or hint:"
        )
    if "parts" not in place:
        for key in ("tag", "cmdline", "console"):
            if key in place:
                yield fault((*path, key), "goes with parts:; a manifest says that itself")
    manifest = _mapping(place.get("manifest"))
    if manifest:
        at = (*path, "manifest")
        yield from _key_faults(document, at, manifest)
        if "sha256" not in manifest and "key" not in manifest:
            yield fault(
                at, "nothing says what the manifest must be", "add its sha256:, or the key: it is signed with"
            )
        if "sha256" not in manifest:
            for number, url in enumerate(_list(manifest.get("urls"))):
                if isinstance(url, str) and url.startswith("http:"):
                    yield fault((*at, "urls", number), "without a digest, only https: will do", "add sha256:")
    parts = _mapping(place.get("parts"))
    if "initrd" in parts and "kernel" not in parts:
        yield fault((*path, "parts", "initrd"), "is of no use without a kernel")
    for name, part in parts.items():
        yield from _part_faults(document, (*path, "parts", name), _mapping(part))
    patterns = _mapping(place.get("console")).get("patterns")
    for number, item in enumerate(_list(patterns)):
        pattern = _mapping(item).get("pattern")
        if isinstance(pattern, str):
            try:
                re.compile(pattern)
            except re.error as error:
                at = (*path, "console", "patterns", number, "pattern")
                yield fault(at, f"`{shorten(pattern)}` is no regular expression: {error}")


def _part_faults(document: Document, path: yamlfile.Path, part: Mapping[str, Any]) -> Iterator[Fault]:
    yield from _key_faults(document, path, part)
    packed = part.get("compression", "none") != "none"
    if packed and "unpackedSize" not in part:
        at = (*path, "compression")
        hint = "add unpackedSize: in bytes"
        yield Fault(document.place(at), dotted(at), "nothing says how long the content may become", hint)
    elif not packed and "unpackedSize" in part:
        at = (*path, "unpackedSize")
        yield Fault(
            document.place(at), dotted(at), "is for a packed file", "add compression:, or leave it out"
        )


def _key_faults(document: Document, path: yamlfile.Path, item: Mapping[str, Any]) -> Iterator[Fault]:
    key = item.get("key")
    if not isinstance(key, str) or not key:
        return
    from kenaz_engine.images.signature import PublicKey

    try:
        PublicKey.parse(key)
    except ImageError as error:
        at = (*path, "key")
        yield Fault(document.place(at), dotted(at), str(error), error.hint)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


# --- putting it together ------------------------------------------------------------------------------------


def _entry(name: str, data: Mapping[str, Any]) -> Entry:
    offers = {arch: Offer(_source(place), place.get("hint", "")) for arch, place in data["arch"].items()}
    return Entry(name, data.get("description", ""), _refresh(data.get("refresh")), offers)


def _refresh(data: Any) -> Refresh:
    match data:
        case None:
            return DAILY
        case "never":
            return NEVER
        case "always":
            return ALWAYS
        case _:
            return Refresh(parse_duration(data["if-older-than"]))


def _source(place: Mapping[str, Any]) -> Source | None:
    if "manifest" in place:
        manifest = place["manifest"]
        return AtManifest(tuple(manifest["urls"]), manifest.get("sha256", ""), manifest.get("key", ""))
    if "parts" not in place:
        return None
    parts, console = place["parts"], place.get("console", {})
    given = tuple(ConsolePattern(item["event"], item["pattern"]) for item in console.get("patterns", ()))
    return InParts(
        parts={name: _published(parts[name]) for name in PARTS if name in parts},
        root_format=parts["root"]["format"],
        tag=place.get("tag", "latest"),
        cmdline=place.get("cmdline", ""),
        console_device=console.get("device", ""),
        console_patterns=given or default_patterns(),
    )


def _published(part: Mapping[str, Any]) -> Published:
    return Published(
        urls=tuple(part["urls"]),
        sha256=part["sha256"],
        size=int(part["size"]),
        compression=part.get("compression", "none"),
        unpacked_size=int(part.get("unpackedSize", 0)),
        key=part.get("key", ""),
    )


def default_patterns() -> tuple[ConsolePattern, ...]:
    """Those of an image that names none: what most Linux guests and their firmware print."""
    from kenaz_engine.guest.recipe import CONSOLE_PATTERNS

    return tuple(ConsolePattern(event, pattern) for event, pattern in CONSOLE_PATTERNS)


__all__ = [
    "AtManifest",
    "Entry",
    "InParts",
    "InvalidFile",
    "Offer",
    "Published",
    "Source",
    "artifacts",
    "catalog",
    "load_artifacts",
    "load_catalog",
]
