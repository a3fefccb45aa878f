"""Finds images: by name in the store and the catalogs, by URL and digest, or in a file of the user's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from urllib.parse import unquote, urlsplit

from kenaz_engine.images.catalogfile import (
    AtManifest,
    Entry,
    InParts,
    Published,
    Source,
    catalog,
    default_patterns,
)
from kenaz_engine.images.errors import ImageError, ImageMissing
from kenaz_engine.images.manifest import MANIFEST, MAX_MANIFEST, Image, Part, parse_manifest
from kenaz_engine.images.policy import NEVER, Refresh, Step, decide
from kenaz_engine.images.reference import AtUrl, InFile, Named, parse_reference
from kenaz_engine.images.store import Store, Version, check_sizes, default_cache, digest_of

__all__ = [
    "Image",
    "ImageError",
    "ImageMissing",
    "Located",
    "catalog",
    "default_cache",
    "find_image",
    "load_image",
    "locate",
    "verify_image",
]

_PACKED = {".zst": "zstd", ".xz": "xz", ".gz": "gz"}
_FORMATS = {".qcow2": "qcow2", ".raw": "raw", ".img": "raw"}


@dataclass(frozen=True, slots=True)
class Located:
    """What is known of an image before anything is fetched.

    `step` is what is to be done for it; `image` is what is here, `missing` why that will not do. `name` is
    the store's, empty for a file of the user's. `age` is the time in seconds since its publisher was last
    asked.
    """

    text: str
    arch: str
    name: str
    step: Step
    image: Image | None = None
    version: Version | None = None
    source: Source | None = None
    refresh: Refresh = NEVER
    age: float = 0.0
    missing: ImageError | None = None
    tag: str = ""
    digest: str = ""
    how: str = "fetched"


def locate(
    text: str,
    arch: str,
    cache: Path,
    *,
    now: float,
    base: str = ".",
    offline: bool = False,
    ask: bool = False,
) -> Located:
    """Looks for the image that `text` names, and decides what is to be done for it. Changes nothing.

    A path is relative to `base`. With `ask`, the publisher is asked whatever the catalog's `refresh` says.
    Raises ImageError for what can be no image and for a damaged store, InvalidFile for a wrong catalog.
    """
    reference = parse_reference(text)
    if isinstance(reference, InFile):
        image = _in_file(Path(base, reference.path).absolute(), arch)
        return Located(text, arch, "", Step.USE, image)
    store = Store.at(cache)
    if isinstance(reference, AtUrl):
        return _at_url(store, text, arch, reference, now, offline)
    return _named(store, text, arch, reference, now, offline, ask)


def find_image(reference: str, arch: str, cache: Path) -> Image:
    """The image that `reference` names, if it is on this machine, whole, and for `arch`.

    The parts' sizes are checked; `verify_image` checks their content. Raises ImageMissing and ImageError.
    """
    located = locate(reference, arch, cache, now=0.0, offline=True)
    if located.image is not None and located.step in (Step.USE, Step.STALE):
        return located.image
    assert located.missing is not None
    raise located.missing


def _named(store: Store, text: str, arch: str, named: Named, now: float, offline: bool, ask: bool) -> Located:
    known = catalog()
    entry = known.get(named.name)
    offer = entry.offers.get(arch) if entry else None
    source, refresh = (offer.source, entry.refresh) if entry and offer else (None, NEVER)
    version = store.read_ref(named.name, arch).find(named.tag, named.digest)
    image, damage = _loaded(store, version)
    if source is not None and not _may_have(source, named):
        source = None
    how = "fetched"
    if version is not None and damage is not None and _comes_again(version):
        # What came by hand from some place can be had there again, for its digest is known.
        source, how = AtManifest((version.url,), version.digest), version.how
    step = decide(
        here=image is not None,
        as_pinned=version is not None and _as_pinned(version, source),
        source=source is not None,
        rolling=source is not None
        and source.rolling
        and not (version and version.by_hand)
        and not named.digest,
        refresh=Refresh(0.0) if ask else refresh,
        age=now - version.checked if version else 0.0,
        offline=offline and source is not None and is_remote(source),
    )
    missing = None
    if step is Step.MISSING:
        missing = damage or _missing(store, arch, named, known)
        if damage and offer and offer.hint:
            missing = ImageMissing(str(damage), offer.hint)
    elif step in (Step.UNREACHABLE, Step.FETCH):
        what = f"image {text} for {arch}"
        here = f"what is here of {what} is not what the catalog asks for"
        why = str(damage) if damage else here if image else f"{what} is not on this machine"
        missing = ImageMissing(why, f"run `kenaz-launcher image pull {text}`, online")
    return Located(
        text,
        arch,
        named.name,
        step,
        image if step in (Step.USE, Step.STALE, Step.ASK) else None,
        version,
        source,
        refresh,
        max(0.0, now - version.checked) if version else 0.0,
        missing,
        named.tag,
        named.digest,
        how,
    )


def _comes_again(version: Version) -> bool:
    """Whether it came by hand from a place that may still have it; where an image was built there is
    nothing."""
    return version.how in ("pulled", "imported") and version.url.endswith(".json")


def _may_have(source: Source, named: Named) -> bool:
    """Whether what is published can be of that tag and digest; of a manifest, nobody knows before it is
    here."""
    match source:
        case AtManifest(sha256=sha256):
            return named.digest in ("", sha256)
        case InParts(tag=tag):
            return named.tag in ("", tag) and not named.digest


def _at_url(store: Store, text: str, arch: str, url: AtUrl, now: float, offline: bool) -> Located:
    if not url.digest:
        raise ImageError(
            f"{url.url} is not used without its digest", "append @sha256: and 64 hexadecimal digits"
        )
    version = store.read_ref(url.name, arch).find()
    image, _ = _loaded(store, version)
    source = source_of(url)
    here = image is not None
    step = decide(
        here=here,
        as_pinned=here,
        source=True,
        rolling=False,
        refresh=NEVER,
        age=0.0,
        offline=offline and is_remote(source),
    )
    missing = None if here else ImageMissing(f"{url.url} was not fetched yet", "run it once, online")
    return Located(text, arch, url.name, step, image, version, source, missing=missing)


def source_of(url: AtUrl) -> Source:
    """What a URL and a digest stand for. Of a disk, the ending says how it is packed, and its size is
    unknown."""
    if url.is_manifest:
        return AtManifest((url.url,), url.digest)
    return disk_source(url.url, url.digest, 0)


def disk_source(url: str, sha256: str, size: int, root_format: str = "", tag: str = "latest") -> InParts:
    """A disk alone, as it is published at `url`."""
    path = PurePath(unquote(urlsplit(url).path))
    compression = _PACKED.get(path.suffix, "none")
    inner = path.with_suffix("") if compression != "none" else path
    root = Published((url,), sha256, size, compression)
    return InParts(
        {"root": root},
        root_format or _FORMATS.get(inner.suffix, ""),
        tag,
        console_patterns=default_patterns(),
    )


def is_remote(source: Source) -> bool:
    """Whether a network is needed to get it."""
    files = (source,) if isinstance(source, AtManifest) else source.parts.values()
    return any(urlsplit(url).scheme != "file" for file in files for url in file.urls)


def fingerprint(source: Source) -> str:
    """What the catalog asks for, as one digest: another one means that something else is wanted."""
    if isinstance(source, AtManifest):
        return source.sha256 or f"key {source.key}"
    data = asdict(source)
    for part in data["parts"].values():
        del part["urls"]  # another mirror has the same
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _as_pinned(version: Version, source: Source | None) -> bool:
    """Whether a version is what the source asks for. What was put here by hand takes the name's place."""
    return (
        source is None
        or version.by_hand
        or version.pin == fingerprint(source)
        or (isinstance(source, AtManifest) and version.digest == source.sha256)
    )


def _loaded(store: Store, version: Version | None) -> tuple[Image | None, ImageMissing | None]:
    if version is None:
        return None, None
    try:
        return store.load(version), None
    except ImageMissing as error:
        return None, error


def _missing(store: Store, arch: str, named: Named, known: Mapping[str, Entry]) -> ImageMissing:
    import difflib

    name = named.name
    if current := store.read_ref(name, arch).find():
        if named.digest:
            return ImageMissing(f"image {name} is here as sha256:{current.digest}, not sha256:{named.digest}")
        return ImageMissing(f"image {name} is here with tag {current.tag}, not {named.tag}")
    if entry := known.get(name):
        offer = entry.offers.get(arch)
        if offer is None:
            return ImageMissing(
                f"there is no image {name} for {arch}", f"it is there for {', '.join(entry.offers)}"
            )
        return ImageMissing(f"image {name} for {arch} is not on this machine", offer.hint)
    close = difflib.get_close_matches(name, known, n=1)
    return ImageMissing(
        f"there is no image {name}",
        f"did you mean {close[0]}?" if close else f"known are: {', '.join(known)}",
    )


def _in_file(path: Path, arch: str) -> Image:
    if path.suffix != ".json":
        return disk_image(path, arch)
    image = load_image(path)
    if image.arch != arch:
        raise ImageMissing(f"image {path} is for {image.arch}, not for {arch}")
    return image


def disk_image(path: Path, arch: str) -> Image:
    """A disk of the user's, used where it lies: nothing says what it must be. Raises ImageMissing,
    ImageError."""
    from kenaz_engine.images.diskfile import inspect_disk

    if not path.exists():
        raise ImageMissing(f"there is no {path}")
    disk = inspect_disk(path)
    part = Part(path, path.stat().st_size, "")
    patterns = default_patterns()
    return Image(path.stem, "", arch, "", {"root": part}, disk.format, "", "", patterns, None)


def load_image(manifest: Path) -> Image:
    """The image of the manifest at that path, sizes checked. Raises ImageMissing and ImageError."""
    try:
        with manifest.open("rb") as file:
            content = file.read(MAX_MANIFEST + 1)
    except FileNotFoundError:
        raise ImageMissing(f"there is no {manifest}") from None
    except OSError as error:
        raise ImageError(f"{manifest} cannot be read: {error.strerror}") from None
    if len(content) > MAX_MANIFEST:
        raise ImageError(f"{manifest} is longer than {MAX_MANIFEST} bytes")
    try:
        image = parse_manifest(content, manifest.parent)
    except ImageError as error:
        raise ImageError(f"{manifest.parent / MANIFEST}: {error}", error.hint) from None
    check_sizes(image)
    check_root(image)
    return image


def check_root(image: Image) -> None:
    """Refuses a qcow2 disk that is none, or that would have QEMU read other files. Raises ImageError."""
    if image.root_format != "qcow2":
        return  # read as it is, whatever it holds
    from kenaz_engine.images.diskfile import inspect_disk

    if (found := inspect_disk(image.root).format) != "qcow2":
        raise ImageError(f"{image.root} is {found}, and the manifest says qcow2")


def verify_image(image: Image) -> None:
    """Checks the content of all parts against the manifest. Takes about as long as `sha256sum`; blocks.

    Raises ImageError that names the first part which differs.
    """
    for part in image.parts.values():
        if part.sha256 and digest_of(part.path) != part.sha256:
            raise ImageError(
                f"{part.path} is not what the manifest says: its SHA-256 differs", "get the image again"
            )
