"""Takes things out of the store: what policy lets go, what is damaged, what nobody needs any more."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from kenaz_engine.images.errors import ImageError
from kenaz_engine.images.locks import in_use, try_lock
from kenaz_engine.images.policy import DAY, Kept, unreferenced
from kenaz_engine.images.store import Ref, Store, Version, digest_of, failure
from kenaz_engine.images.vhdx import orphans, remove_base


def is_used(store: Store, version: Version) -> bool:
    """Whether a session, or a fetch that is not over, holds the image."""
    manifest = store.blob(version.digest)
    if manifest.exists():
        return in_use(manifest)
    return any(in_use(store.blob(digest)) for digest in version.blobs)


async def remove_image(store: Store, image: Kept) -> bool:
    """Removes an image, and those of its blobs that no other has; False when it is used by now. Raises
    ImageError."""
    path = store.blob(image.digest)
    try:
        lock = try_lock(path) if path.exists() else None
    except OSError as error:
        raise failure(error, path) from error
    if lock is None and path.exists():
        return False
    try:
        await store.change_ref(image.name, image.arch, lambda ref: _without(ref, image.digest))
        rest = unreferenced(image.blobs, store.kept(lambda _: False))
        if lock is not None and image.digest in rest:
            lock.close(remove=True)
        for digest in rest:
            store.remove(digest)
    except OSError as error:
        raise failure(error, path) from error
    finally:
        if lock is not None:
            lock.close()
    return True


def _without(ref: Ref, digest: str) -> Ref:
    return replace(ref, versions=tuple(v for v in ref.versions if v.digest != digest))


@dataclass(frozen=True, slots=True)
class Litter:
    """Something in the store that is of no use: what it is, and its bytes."""

    path: Path
    what: str
    size: int


def litter(store: Store, images: Iterable[Kept], now: float) -> Iterator[Litter]:
    """Blobs without an image, downloads that nobody goes on with for a day, locks that nobody holds, bases of
    Hyper-V's disks without their image, what was set aside as damaged."""
    for digest in unreferenced(store.present(), images):
        path = store.blob(digest)
        if not in_use(path):
            yield Litter(path, "without an image", path.stat().st_size)
    for path in _inside(store.tmp):
        status = path.stat()
        if now - status.st_mtime > DAY and not in_use(store.lock_path(path.name.partition(".")[0])):
            yield Litter(path, "half a download", status.st_size)
    for path in _inside(store.root / "locks"):
        # The builder's have content: by what the image was built from.
        if not path.stat().st_size and not in_use(path):
            yield Litter(path, "the lock of a launcher that was killed", 0)
    for path in orphans(store):
        yield Litter(path, "made of an image that has gone", path.stat().st_size)
    for path in _inside(store.quarantine):
        yield Litter(path, "damaged", path.stat().st_size)


def _inside(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def sweep(store: Store, item: Litter) -> bool:
    """Removes it; False when it is used by now. Raises ImageError."""
    try:
        if item.path.parent == store.blobs:
            return store.remove(item.path.name)
        if item.path.suffix == ".vhdx":
            return remove_base(item.path)
        if item.path.parent.name == "locks":
            if (lock := try_lock(item.path)) is None:
                return False
            lock.close(remove=True)
        elif item.path.is_dir():
            shutil.rmtree(item.path)
        else:
            item.path.unlink(missing_ok=True)
    except OSError as error:
        raise failure(error, item.path) from error
    return True


def damaged(store: Store, version: Version) -> Iterator[tuple[str, str]]:
    """The blobs of an image that are not what their names say, and why. Reads all of them; blocks."""
    for digest, size in version.blobs.items():
        path = store.blob(digest)
        try:
            found = path.stat().st_size
            if found != size:
                yield digest, f"has {found} bytes, and {size} are right"
            elif (other := digest_of(path)) != digest:
                yield digest, f"its SHA-256 is {other}"
        except FileNotFoundError:
            yield digest, "is not there"
        except OSError as error:
            yield digest, f"cannot be read: {error.strerror}"


def set_aside_ref(store: Store, name: str, arch: str) -> Path | None:
    """Moves the file of a name out of the way if it cannot be read; where to. The images behind it are not
    lost before `prune`."""
    try:
        store.read_ref(name, arch)
    except ImageError:
        store.make()
        place = store.quarantine / f"ref-{name}-{arch}"
        store.ref_path(name, arch).replace(place)
        return place
    return None
