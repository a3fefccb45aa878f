"""Finds images: by the name of a catalog entry, or by the path of a manifest."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from kenaz_engine.images.errors import ImageError, ImageMissing
from kenaz_engine.images.manifest import MANIFEST, MAX_MANIFEST, NAME, Image, parse_manifest

__all__ = [
    "Entry",
    "Image",
    "ImageError",
    "ImageMissing",
    "catalog",
    "default_cache",
    "find_image",
    "load_image",
    "verify_image",
]


@dataclass(frozen=True, slots=True)
class Entry:
    """An image that the catalog knows. `hint` by architecture is how to get it onto this machine."""

    name: str
    description: str
    hint: dict[str, str]


def default_cache() -> Path:
    """Where images are kept: $KENAZ_CACHE_DIR, or the user's cache directory as the platform has it."""
    if given := os.environ.get("KENAZ_CACHE_DIR"):
        return Path(given).absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("kenaz", appauthor=False))


def catalog() -> dict[str, Entry]:
    """The shipped catalog, by name."""
    import yaml

    text = resources.files("kenaz_specs").joinpath("images/catalog.yaml").read_text("utf-8")
    return {
        name: Entry(name, entry["description"], entry["hint"])
        for name, entry in yaml.safe_load(text)["images"].items()
    }


def find_image(reference: str, arch: str, cache: Path) -> Image:
    """The image that `reference` names, if it is on this machine, whole, and for `arch`.

    A reference is `name`, `name:tag`, or the path of an `image.json`, which has a slash or ends in `.json`.
    The parts' sizes are checked; `verify_image` checks their content. Raises ImageMissing and ImageError.
    """
    if "/" in reference or reference.endswith(".json"):
        image = load_image(Path(reference).absolute())
        if image.arch != arch:
            raise ImageMissing(f"image {reference} is for {image.arch}, not for {arch}")
        return image
    name, _, tag = reference.partition(":")
    manifest = cache / "images" / name / arch / MANIFEST
    if not NAME.fullmatch(name) or not manifest.exists():
        raise _missing(name, arch)
    image = load_image(manifest)
    if (image.name, image.arch) != (name, arch):
        raise ImageError(
            f"{manifest} is the manifest of {image.name} for {image.arch}", f"remove {manifest.parent}"
        )
    if tag and tag != image.tag:
        raise ImageMissing(f"image {name} is here with tag {image.tag}, not {tag}")
    return image


def _missing(name: str, arch: str) -> ImageMissing:
    import difflib

    known = catalog()
    if entry := known.get(name):
        how = entry.hint.get(arch)
        return ImageMissing(
            f"image {name} for {arch} is not on this machine"
            if how
            else f"there is no image {name} for {arch}",
            how or f"it is there for {', '.join(entry.hint)}",
        )
    close = difflib.get_close_matches(name, known, n=1)
    return ImageMissing(
        f"there is no image {name}",
        f"did you mean {close[0]}?" if close else f"known are: {', '.join(known)}",
    )


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
        raise ImageError(f"{manifest.parent}: {error}", error.hint) from None
    for part in image.parts.values():
        try:
            size = part.path.stat().st_size
        except OSError as error:
            raise ImageError(f"{part.path}: {error.strerror}", "get the image again") from None
        if size != part.size:
            raise ImageError(
                f"{part.path} has {size} bytes, and the manifest says {part.size}", "get the image again"
            )
    return image


def verify_image(image: Image) -> None:
    """Checks the content of all parts against the manifest. Takes about as long as `sha256sum`; blocks.

    Raises ImageError that names the first part which differs.
    """
    for part in image.parts.values():
        with part.path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != part.sha256:
            raise ImageError(
                f"{part.path} is not what the manifest says: its SHA-256 differs", "get the image again"
            )
