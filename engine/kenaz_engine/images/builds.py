"""Workbenches' builds: what the catalogs have under the name in `workbench.build`, one file each.

A build is kept in the store like the disk of a URL, under its digest, and reaches the guest as a disk that it
cannot write to.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kenaz_engine.images.catalog import fingerprint, is_remote
from kenaz_engine.images.catalogfile import InParts, Published, artifacts
from kenaz_engine.images.errors import ImageError, ImageMissing
from kenaz_engine.images.locks import Held, hold
from kenaz_engine.images.manifest import Image
from kenaz_engine.images.qcow2 import SECTOR
from kenaz_engine.images.store import Store, paths_of
from kenaz_engine.images.transfer import Watch

TO_BE_FETCHED = Path("/to-be-fetched/workbench")
"""The path of a build that is not here yet, for those who plan."""


@dataclass(frozen=True, slots=True)
class Build:
    """A build: its file, and the digest of what the guest reads (`sha256:...`), which is empty where that is
    not known before it is here."""

    name: str
    path: Path
    digest: str


@dataclass(frozen=True, slots=True)
class Offered:
    """A build of the catalogs; `here` is None where it is to be fetched."""

    name: str
    arch: str
    published: Published
    here: Build | None

    @property
    def is_remote(self) -> bool:
        """Whether a network is needed to get it."""
        return is_remote(_source(self.published))

    @property
    def planned(self) -> Build:
        """The build as far as it can be known."""
        packed = self.published.compression != "none"
        return self.here or Build(
            self.name, TO_BE_FETCHED, "" if packed else f"sha256:{self.published.sha256}"
        )


def offline_without(offered: Offered) -> ImageMissing:
    """Says that it is not here, and cannot be fetched."""
    return ImageMissing(
        f"offline, and the build {offered.name} is not on this machine", "run it once, online"
    )


def find_build(name: str, arch: str, cache: Path) -> Offered | None:
    """What the catalogs have under that name for that architecture; None when they do not know the name.

    Raises InvalidFile and ImageError for a wrong catalog or store, and ImageMissing where the catalogs have
    the name for other architectures only.
    """
    offers = artifacts().get(name)
    if offers is None:
        return None
    published = offers.get(arch) or offers.get("any")
    if published is None:
        raise ImageMissing(f"there is no build {name} for {arch}", f"it is there for {', '.join(offers)}")
    image = _stored(Store.at(cache), _ref(published), arch, _source(published))
    return Offered(name, arch, published, _build(name, image) if image else None)


async def ensure_build(
    offered: Offered, cache: Path, *, watch: Watch, offline: bool = False
) -> tuple[Build, Held]:
    """Sees to it that the build is here and right, and takes it into use until `Held.close`.

    Raises Untrusted, ImageMissing, and ImageError, which may be transient.
    """
    from kenaz_engine.images.fetch import Fetcher
    from kenaz_engine.images.transfer import Patience

    store, source, name = Store.at(cache), _source(offered.published), _ref(offered.published)
    for _ in range(3):
        try:
            image, held = _stored(store, name, offered.arch, source), None
            if image is not None:
                held = await hold(paths_of(image))
            elif offline and offered.is_remote:
                raise offline_without(offered)
            else:
                async with Fetcher(store, Patience(), watch) as fetcher:
                    image, held = await fetcher.image(name, offered.arch, source)
        except FileNotFoundError:
            continue  # somebody has pruned it between the look and the lock
        try:
            return _build(offered.name, image), held
        except BaseException:
            held.close()
            raise
    raise ImageError(f"the build {offered.name} goes as fast as it comes: others prune it", transient=True)


def _build(name: str, image: Image) -> Build:
    part = image.parts["root"]
    if part.size % SECTOR:
        raise ImageError(
            f"the build {name} has {part.size} bytes, which are no whole sectors of a disk",
            f"publish it padded to a multiple of {SECTOR}",
        )
    return Build(name, part.path, f"sha256:{part.sha256}")


def _stored(store: Store, name: str, arch: str, source: InParts) -> Image | None:
    version = store.read_ref(name, arch).find()
    if version is None or version.pin != fingerprint(source):
        return None
    try:
        return store.load(version)
    except ImageMissing:
        return None


def _source(published: Published) -> InParts:
    """As a disk, which is never looked into: to QEMU it is raw, whatever it holds."""
    return InParts({"root": published}, "raw")


def _ref(published: Published) -> str:
    """As of a disk at a URL: a name that no image of a catalog can have."""
    return f"@{published.sha256[:16]}"
