"""The store: content by digest, and names for it. docs/reference/image-store.md describes the files.

Everything becomes visible by one rename of a file that is whole, checked and on the disk. What is unfinished
has a name that follows from its digest, so that the next launcher goes on with it, and nothing piles up.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kenaz_engine.images import steps
from kenaz_engine.images.errors import ImageError, ImageMissing
from kenaz_engine.images.locks import FileLock, try_lock, wait_lock
from kenaz_engine.images.manifest import DIGEST, MAX_MANIFEST, Image, parse_manifest
from kenaz_engine.images.policy import Kept

FORMAT = "kenaz image store 1\n"
"""What the file VERSION says."""

CHUNK = 1 << 20
_MAX_REF = 1 << 20


def default_cache() -> Path:
    """Where images are kept: $KENAZ_CACHE_DIR, or the user's cache directory as the platform has it."""
    if given := os.environ.get("KENAZ_CACHE_DIR"):
        return Path(given).absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("kenaz", appauthor=False))


@dataclass(frozen=True, slots=True)
class Origin:
    """A part that came in another form than it is kept in (packed): digest of what came, and of what is
    kept."""

    came: str
    blob: str
    size: int


@dataclass(frozen=True, slots=True)
class Version:
    """An image of the store. Times are in seconds since 1970: when it was put here, when its publisher last
    said that it is current, when its content was last found to be right.

    `digest` is of the manifest, in hexadecimal; `blobs` are sizes by digest, with the manifest's. `how` it
    came: fetched, imported or built. `url` is where the manifest or the disk came from; `etag` and `modified`
    are its validators there; `pin` is what the catalog asked for.
    """

    digest: str
    tag: str
    blobs: Mapping[str, int]
    fetched: float
    checked: float
    verified: float
    how: str
    url: str = ""
    etag: str = ""
    modified: str = ""
    pin: str = ""
    origins: tuple[Origin, ...] = ()

    @property
    def by_hand(self) -> bool:
        """Whether somebody put it here himself, rather than a catalog's publisher."""
        return self.how != "fetched"

    @property
    def size(self) -> int:
        """Bytes of all its blobs."""
        return sum(self.blobs.values())


@dataclass(frozen=True, slots=True)
class Ref:
    """What a name stands for on one architecture: the current version first."""

    name: str
    arch: str
    versions: tuple[Version, ...] = ()

    def find(self, tag: str = "", digest: str = "") -> Version | None:
        """The current version, or the newest of that tag or digest."""
        fitting = (v for v in self.versions if tag in ("", v.tag) and digest in ("", v.digest))
        return next(fitting, None)


@dataclass(frozen=True, slots=True)
class Store:
    """A store, which need not exist yet. What reads creates nothing."""

    root: Path
    _made: list[bool] = field(default_factory=list, compare=False, repr=False)

    @classmethod
    def at(cls, cache: Path) -> Store:
        """The store of a cache directory. Raises ImageError when it is of another format, or not safe."""
        store = cls(cache / "images")
        store._check()
        return store

    @property
    def blobs(self) -> Path:
        """The directory of what is whole."""
        return self.root / "blobs" / "sha256"

    @property
    def quarantine(self) -> Path:
        """The directory of what was found damaged."""
        return self.root / "quarantine"

    @property
    def tmp(self) -> Path:
        """The directory of what is not whole yet."""
        return self.root / "tmp"

    def blob(self, digest: str) -> Path:
        """Where the content of that digest is, once it is here."""
        return self.blobs / digest

    def part(self, digest: str, suffix: str = "part") -> Path:
        """Where it is while it comes."""
        return self.tmp / f"{digest}.{suffix}"

    def ref_path(self, name: str, arch: str) -> Path:
        """The file of a name."""
        return self.root / "refs" / name / f"{arch}.json"

    def lock_path(self, what: str) -> Path:
        """The file whose lock is held while that digest, or name, is worked on."""
        return self.root / "locks" / what

    def make(self) -> None:
        """Makes the directories. Raises ImageError where that cannot be."""
        if self._made:
            return
        try:
            for path in (self.blobs, self.root / "refs", self.tmp, self.quarantine, self.root / "locks"):
                path.mkdir(parents=True, exist_ok=True)
            version = self.root / "VERSION"
            if not version.exists():
                _write_whole(version, self.root / f"VERSION.{os.getpid()}", FORMAT.encode())
        except OSError as error:
            raise failure(error, self.root) from error
        self._made.append(True)

    def has(self, digest: str, size: int | None = None) -> bool:
        """Whether that content is here, of that size."""
        try:
            found = self.blob(digest).stat()
        except OSError:
            return False
        return size is None or found.st_size == size

    # --- names ----------------------------------------------------------------------------------------------

    def read_ref(self, name: str, arch: str) -> Ref:
        """What a name stands for; nothing, where it was never put here. Raises ImageError when it is
        damaged."""
        path = self.ref_path(name, arch)
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return Ref(name, arch)
        except OSError as error:
            raise ImageError(f"{path} cannot be read: {error.strerror}") from None
        try:
            if len(content) > _MAX_REF:
                raise ValueError("too long")
            data = json.loads(content)
            return Ref(name, arch, tuple(_version(item) for item in data["images"]))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ImageError(
                f"{path} is damaged: {error or type(error).__name__}",
                "run `kenaz-launcher image verify --all`",
            ) from None

    def refs(self) -> Iterator[tuple[str, str]]:
        """Every name and architecture that there is, sorted."""
        for path in sorted((self.root / "refs").glob("*/*.json")):
            yield path.parent.name, path.stem

    async def change_ref(self, name: str, arch: str, change: Callable[[Ref], Ref]) -> None:
        """Gives a name another meaning, at once for all who look. Raises ImageError."""
        self.make()
        try:
            lock = await wait_lock(self.lock_path(f"ref-{name}-{arch}"), create=True)
            try:
                self._write_ref(change(self.read_ref(name, arch)))
            finally:
                lock.close(remove=True)
        except OSError as error:
            raise failure(error, self.root) from error

    def _write_ref(self, ref: Ref) -> None:
        path = self.ref_path(ref.name, ref.arch)
        if not ref.versions:
            path.unlink(missing_ok=True)
            return
        data = {"name": ref.name, "arch": ref.arch, "images": [_data(version) for version in ref.versions]}
        path.parent.mkdir(exist_ok=True)
        scratch = self.tmp / f"ref-{ref.name}-{ref.arch}"
        scratch.unlink(missing_ok=True)
        _write_whole(path, scratch, json.dumps(data, indent=2).encode() + b"\n", "ref written")
        steps.reached("ref named")

    async def put_version(self, name: str, arch: str, version: Version) -> None:
        """Makes it the current version of a name."""
        await self.change_ref(
            name,
            arch,
            lambda ref: replace(
                ref, versions=(version, *(v for v in ref.versions if v.digest != version.digest))
            ),
        )

    async def touch_version(self, name: str, arch: str, digest: str, **times: Any) -> None:
        """Notes what was learnt of a version, if it is still there."""
        await self.change_ref(
            name,
            arch,
            lambda ref: replace(
                ref, versions=tuple(replace(v, **times) if v.digest == digest else v for v in ref.versions)
            ),
        )

    def load(self, version: Version) -> Image:
        """A version as an image. Raises ImageMissing when some of it is gone or has another size."""
        path = self.blob(version.digest)
        try:
            with path.open("rb") as file:
                content = file.read(MAX_MANIFEST + 1)
        except OSError as error:
            raise ImageMissing(f"{path}: {error.strerror}", _AGAIN) from None
        if hashlib.sha256(content).hexdigest() != version.digest:
            raise ImageMissing(f"{path} is damaged", _AGAIN)
        image = parse_manifest(content, self.blobs, self.blobs)
        check_sizes(image)
        return image

    def origin(self, came: str) -> Origin | None:
        """What became of a packed file of that digest, when it was last fetched."""
        for name, arch in self.refs():
            try:
                ref = self.read_ref(name, arch)
            except ImageError:
                continue
            for version in ref.versions:
                for origin in version.origins:
                    if origin.came == came and self.has(origin.blob, origin.size):
                        return origin
        return None

    # --- content --------------------------------------------------------------------------------------------

    def seal(self, path: Path, digest: str) -> FileLock:
        """Gives a file of `tmp`, whose content was found to have that digest, its name in the store.

        Returns a shared lock on it, under which it cannot go before it is named by a ref. Blocks for an
        fsync.
        """
        target = self.blob(digest)
        if (there := self._shared(digest, path.stat().st_size)) is not None:
            path.unlink()
            return there
        path.chmod(0o444)
        _fsync(path)
        steps.reached("blob sealed")
        # Locked before it can be seen: whoever prunes sees it only in use.
        lock = try_lock(path, shared=True)
        assert lock is not None
        path.replace(target)
        _fsync(self.blobs)
        steps.reached("blob named")
        return FileLock(target, lock.file)

    def _shared(self, digest: str, size: int) -> FileLock | None:
        """A shared lock on content that is here already; None when it is not, or is about to go."""
        try:
            lock = try_lock(self.blob(digest), shared=True) if self.has(digest, size) else None
        except FileNotFoundError:
            return None
        return lock

    def set_aside(self, digest: str) -> Path:
        """Moves a damaged blob out of the way; who uses it keeps it."""
        self.make()
        number = 1
        while (place := self.quarantine / f"{digest}-{number}").exists():
            number += 1
        self.blob(digest).rename(place)
        _fsync(self.blobs)
        steps.reached("blob set aside")
        return place

    def remove(self, digest: str) -> bool:
        """Removes a blob, unless somebody uses it; True when it is gone."""
        path = self.blob(digest)
        try:
            lock = try_lock(path)
        except FileNotFoundError:
            return True
        except OSError as error:
            raise failure(error, path) from error
        if lock is None:
            return False
        try:
            lock.close(remove=True)
        except OSError as error:
            raise failure(error, path) from error
        finally:
            lock.close()
        steps.reached("blob removed")
        return True

    def present(self) -> list[str]:
        """The digests of all content that is here."""
        try:
            return sorted(path.name for path in self.blobs.iterdir() if DIGEST.fullmatch(path.name))
        except FileNotFoundError:
            return []

    def kept(self, used: Callable[[Version], bool]) -> list[Kept]:
        """All images, as `policy.prune` wants them. Raises ImageError when a ref is damaged: then nothing can
        be said to be unreferenced."""
        return [
            Kept(name, arch, version.digest, version.fetched, version.blobs, used(version))
            for name, arch in self.refs()
            for version in self.read_ref(name, arch).versions
        ]

    def _check(self) -> None:
        try:
            status = self.root.stat()
        except OSError:
            return
        for path in (self.root, self.blobs, self.root / "refs"):
            if hasattr(os, "getuid") and path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o002:
                raise ImageError(
                    f"everybody can write to {path}, and so put images there", f"chmod -R o-w {self.root}"
                )
        assert status is not None
        try:
            found = (self.root / "VERSION").read_text("utf-8", "replace")
        except FileNotFoundError:
            return
        except OSError as error:
            raise ImageError(f"{self.root / 'VERSION'} cannot be read: {error.strerror}") from None
        if found != FORMAT:
            raise ImageError(
                f"{self.root} says {found.strip()[:60]!r}, and this launcher knows {FORMAT.strip()!r}",
                "set KENAZ_CACHE_DIR to another directory, or remove that one",
            )


_AGAIN = "get the image again"


def check_sizes(image: Image) -> None:
    """Whether all parts are there with their sizes. Raises ImageMissing that names the first that is not."""
    for part in image.parts.values():
        try:
            size = part.path.stat().st_size
        except OSError as error:
            raise ImageMissing(f"{part.path}: {error.strerror}", _AGAIN) from None
        if size != part.size:
            raise ImageMissing(f"{part.path} has {size} bytes, and the manifest says {part.size}", _AGAIN)


def failure(error: OSError, path: Path) -> ImageError:
    """An error of the system at the store, in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ImageError(
            f"no space left on the file system of {path}", "free some, or run `kenaz-launcher image prune`"
        )
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return ImageError(
            f"you may not write to {error.filename or path}",
            "set KENAZ_CACHE_DIR to a directory of your own, or ask its owner",
        )
    return ImageError(f"{error.filename or path}: {error.strerror or error}")


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Blocks, about as long as `sha256sum`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_whole(path: Path, scratch: Path, content: bytes, point: str = "") -> None:
    """Writes a file that is seen whole or not at all."""
    with scratch.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if point:
        steps.reached(point)
    scratch.replace(path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    try:
        file = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no directory
        return
    try:
        os.fsync(file)
    finally:
        os.close(file)


_TIMES = ("fetched", "checked", "verified")


def _data(version: Version) -> dict[str, Any]:
    origins = [{"came": o.came, "blob": o.blob, "size": o.size} for o in version.origins]
    data = {
        "digest": version.digest,
        "tag": version.tag,
        "how": version.how,
        "url": version.url,
        "etag": version.etag,
        "modified": version.modified,
        "pin": version.pin,
        **{name: moment(getattr(version, name)) for name in _TIMES},
        "blobs": dict(version.blobs),
    }
    return data | ({"origins": origins} if origins else {})


def _version(data: Mapping[str, Any]) -> Version:
    blobs = {_digest(digest): int(size) for digest, size in data["blobs"].items()}
    origins = (
        Origin(_digest(o["came"]), _digest(o["blob"]), int(o["size"])) for o in data.get("origins", ())
    )
    texts: dict[str, Any] = {
        name: str(data[name]) for name in ("tag", "how", "url", "etag", "modified", "pin")
    }
    times: dict[str, Any] = {name: datetime.fromisoformat(data[name]).timestamp() for name in _TIMES}
    return Version(digest=_digest(data["digest"]), blobs=blobs, origins=tuple(origins), **texts, **times)


def _digest(text: object) -> str:
    if not isinstance(text, str) or not DIGEST.fullmatch(text):
        raise ValueError(f"{text!r} is no digest")
    return text


def moment(seconds: float) -> str:
    """A time as refs and JSON have it: UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def paths_of(image: Image) -> Iterable[Path]:
    """All files of an image."""
    manifest = (image.manifest,) if image.manifest else ()
    return (*manifest, *(part.path for part in image.parts.values()))
