"""Gets an image into the store: its manifest, then the files that it names; each checked before it has a
name.

Mirrors, resumption and short waits are decided in `transfer`; long waits are for the caller (see there).
"""

from __future__ import annotations

import hashlib
import shutil
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import urljoin, urlsplit

import trio

from kenaz_engine.images import steps
from kenaz_engine.images.catalog import (
    check_root,
    fingerprint,
)
from kenaz_engine.images.catalogfile import AtManifest, InParts, Published, Source, default_patterns
from kenaz_engine.images.documents import Document, get_document, get_size
from kenaz_engine.images.download import ROOM, Wanted, download, http_client
from kenaz_engine.images.errors import ImageError, Untrusted
from kenaz_engine.images.locks import Held, wait_lock
from kenaz_engine.images.manifest import (
    MAX_MANIFEST,
    Image,
    compose_manifest,
    file_names,
    parse_manifest,
)
from kenaz_engine.images.store import CHUNK, Origin, Store, Version, failure, paths_of
from kenaz_engine.images.transfer import Have, Meter, Patience, Watch, shown

if TYPE_CHECKING:
    import httpx

MAX_SIGNATURE = 4096
SIGNATURE = ".minisig"
"""What a signature's name has more than that of the file."""


class Fetcher:
    """Fetches into a store; an async context, which ends its connections."""

    def __init__(self, store: Store, patience: Patience, watch: Watch) -> None:
        self._store = store
        self._patience = patience
        self._watch = watch
        self._http: httpx.AsyncClient | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._store.make()
        return self

    async def __aexit__(self, *failed: object) -> None:
        await self._stack.aclose()

    async def image(
        self, name: str, arch: str, source: Source, *, current: Version | None = None, how: str = "fetched"
    ) -> tuple[Image, Held]:
        """Fetches what is not here yet of the image, and makes it the current one of `name`, or of the name
        that its manifest has. `current` is what is here under that name. Returns it in use.

        Raises Untrusted; ImageError, which may be transient; FileNotFoundError when others prune at the same
        time.
        """
        held = Held()
        try:
            if isinstance(source, AtManifest):
                image = await self._by_manifest(held, name, arch, source, current, how)
            else:
                image = await self._by_parts(held, name, arch, source, how)
        except FileNotFoundError:
            held.close()
            raise
        except OSError as error:
            held.close()
            raise failure(error, self._store.root) from error
        except BaseException:
            held.close()
            raise
        return image, held

    # --- by a manifest --------------------------------------------------------------------------------------

    async def _by_manifest(
        self, held: Held, name: str, arch: str, source: AtManifest, current: Version | None, how: str
    ) -> Image:
        document = await self._manifest(source, current)
        if document is None:
            assert current is not None
            await self._store.touch_version(name, arch, current.digest, checked=time.time())
            image = self._store.load(current)
            for path in paths_of(image):
                await held.add(path)
            return image
        image = parse_manifest(document.content, self._store.blobs, self._store.blobs)
        if arch and image.arch != arch:
            raise ImageError(f"{shown(document.asked)} is an image for {image.arch}, not for {arch}")
        files = file_names(document.content)
        for part, content in image.parts.items():
            urls = tuple(urljoin(url, files[part]) for url in (document.asked, *source.urls))
            published = Published(tuple(dict.fromkeys(urls)), content.sha256, content.size)
            await self._blob(held, files[part], published)
        await self._named(
            held, name or image.name, image, document.content, how, fingerprint(source), (), document
        )
        return image

    async def _manifest(self, source: AtManifest, current: Version | None) -> Document | None:
        """The manifest; None when what is here is still current. Raises Untrusted and ImageError."""
        if source.sha256 and (content := self._have_manifest(source.sha256)) is not None:
            return Document(content, source.urls[0])
        known = None
        if (
            current is not None
            and not source.sha256
            and not current.by_hand
            and current.pin == fingerprint(source)
        ):
            known = Have(0, current.url, current.etag, current.modified) if self._whole(current) else None

        async def wrong(document: Document) -> str:
            found = hashlib.sha256(document.content).hexdigest()
            if source.sha256 and found != source.sha256:
                return f"its SHA-256 is {found}, and {source.sha256} is promised"
            if not source.sha256 and not _safe(document.last):
                return f"it leads to {shown(document.last)}, and without a digest only https: will do"
            if source.key:
                return await self._unsigned(
                    document.asked, source.key, hashlib.blake2b(document.content).digest()
                )
            return ""

        client = await self._client(source.urls)
        return await get_document(
            client, "image.json", source.urls, MAX_MANIFEST, self._patience, self._watch, known, wrong
        )

    def _have_manifest(self, digest: str) -> bytes | None:
        try:
            with self._store.blob(digest).open("rb") as file:
                content = file.read(MAX_MANIFEST + 1)
        except OSError:
            return None
        return content if hashlib.sha256(content).hexdigest() == digest else None

    def _whole(self, version: Version) -> bool:
        return all(self._store.has(digest, size) for digest, size in version.blobs.items())

    # --- by its parts ---------------------------------------------------------------------------------------

    async def _by_parts(self, held: Held, name: str, arch: str, source: InParts, how: str) -> Image:
        parts: dict[str, tuple[int, str]] = {}
        origins: list[Origin] = []
        for part, published in source.parts.items():
            file = urlsplit(published.urls[0]).path.rsplit("/", 1)[-1] or part
            digest, size = await self._blob(held, file, published)
            parts[part] = (size, digest)
            if digest != published.sha256:
                origins.append(Origin(published.sha256, digest, size))
        root_format = source.root_format or await self._format(parts["root"][1])
        content = compose_manifest(
            name=name if not name.startswith("@") else "disk",
            tag=source.tag,
            arch=arch,
            parts=parts,
            root_format=root_format,
            cmdline=source.cmdline,
            console_device=source.console_device,
            console_patterns=source.console_patterns or default_patterns(),
        )
        image = parse_manifest(content, self._store.blobs, self._store.blobs)
        document = Document(content, source.parts["root"].urls[0])
        await self._named(held, name, image, content, how, fingerprint(source), tuple(origins), document)
        return image

    async def _format(self, digest: str) -> str:
        from kenaz_engine.images.diskfile import inspect_disk

        return (await trio.to_thread.run_sync(inspect_disk, self._store.blob(digest))).format

    async def _named(
        self,
        held: Held,
        name: str,
        image: Image,
        content: bytes,
        how: str,
        pin: str,
        origins: tuple[Origin, ...],
        document: Document,
    ) -> None:
        """Puts the manifest beside the parts, and the name in front of all."""
        await trio.to_thread.run_sync(check_root, image)
        digest = image.digest.removeprefix("sha256:")
        lock = await wait_lock(self._store.lock_path(digest), create=True)
        try:
            path = self._store.part(digest)
            path.write_bytes(content)
            held.take(await trio.to_thread.run_sync(self._store.seal, path, digest))
        finally:
            lock.close(remove=True)
        blobs = {part.sha256: part.size for part in image.parts.values()} | {digest: len(content)}
        now = time.time()
        version = Version(
            digest=digest,
            tag=image.tag,
            blobs=blobs,
            fetched=now,
            checked=now,
            verified=now,
            how=how,
            url=document.asked,
            etag=document.etag,
            modified=document.modified,
            pin=pin,
            origins=origins,
        )
        await self._store.put_version(name, image.arch, version)

    # --- one file -------------------------------------------------------------------------------------------

    async def _blob(self, held: Held, file: str, published: Published) -> tuple[str, int]:
        """Gets a file into the store, unless it is there, and takes it into use. Digest and size of its
        content, which are others than those published when it came packed."""
        came = published.sha256
        if (found := await self._there(held, published)) is not None:
            return found
        meter = Meter(file, published.size, waiting=True)

        def waiting() -> None:
            part = self._store.part(came)
            self._watch(meter.at(time.monotonic(), part.stat().st_size if part.exists() else 0))

        lock = await wait_lock(self._store.lock_path(came), create=True, waiting=waiting)
        try:
            if (found := await self._there(held, published)) is not None:
                return found
            return await self._fetch(held, file, published)
        finally:
            lock.close(remove=True)

    async def _there(self, held: Held, published: Published) -> tuple[str, int] | None:
        digest, size = published.sha256, published.size
        if published.compression != "none":
            origin = self._store.origin(published.sha256)
            if origin is None:
                return None
            digest, size = origin.blob, origin.size
        path = self._store.blob(digest)
        # Of a disk at a URL no size is known; under its digest there is nothing but that.
        if not self._store.has(digest, size or None):
            return None
        try:
            await held.add(path)
        except FileNotFoundError:
            return None
        return digest, path.stat().st_size

    async def _fetch(self, held: Held, file: str, published: Published) -> tuple[str, int]:
        store, came = self._store, published.sha256
        path = store.part(came)
        client = await self._client(published.urls)
        size = published.size or await get_size(client, published.urls, self._patience)
        wanted = Wanted(file, published.urls, came, size, hashed=bool(published.key))
        checked = await download(client, wanted, path, self._patience, self._watch)
        if published.key and (why := await self._any_signed(published, checked.blake2b)):
            path.unlink()
            raise Untrusted(f"{file}: {why}", "nothing of it is used; ask its publisher")
        steps.reached("part checked")
        digest = came
        if published.compression != "none":
            unpacked = store.part(came, "unpacked")
            digest, size = await self._unpack(path, unpacked, published)
            path.unlink()
            path = unpacked
        held.take(await trio.to_thread.run_sync(store.seal, path, digest))
        return digest, size

    async def _unpack(self, path: Path, into: Path, published: Published) -> tuple[str, int]:
        """Unpacks what was checked. Raises Untrusted for what is damaged, or of another length than
        promised."""
        from kenaz_engine.images.unpack import unpacker

        limit = published.unpacked_size or max(0, shutil.disk_usage(into.parent).free - ROOM)
        unpack, digest = unpacker(published.compression, limit=limit), hashlib.sha256()
        size = 0
        with path.open("rb") as packed, into.open("wb") as file:

            def feed() -> bool:
                nonlocal size
                chunk = packed.read(CHUNK)
                for piece in unpack.feed(chunk) if chunk else ():
                    digest.update(piece)
                    file.write(piece)
                    size += len(piece)
                return bool(chunk)

            try:
                while await trio.to_thread.run_sync(feed):
                    pass
                unpack.finish()
            except ImageError as error:
                raise Untrusted(f"{shown(published.urls[0])}: {error}", "nothing of it is used") from None
        if published.unpacked_size and size != published.unpacked_size:
            promised = f"{published.unpacked_size} are promised"
            raise Untrusted(f"{shown(published.urls[0])} unpacks to {size} bytes, and {promised}")
        steps.reached("part unpacked")
        return digest.hexdigest(), size

    async def _any_signed(self, published: Published, blake2b: bytes) -> str:
        """Why none of the mirrors has a signature that is right; empty when one has. Raises ImageError when
        that cannot be told now."""
        whys, later = [], None
        for url in published.urls:
            try:
                if not (why := await self._unsigned(url, published.key, blake2b)):
                    return ""
                whys.append(why)
            except ImageError as error:
                later = error
        if later is not None:
            raise later
        return "; ".join(whys)

    async def _unsigned(self, url: str, key: str, blake2b: bytes) -> str:
        """Why the file at `url` is not signed with the key; empty when it is. Raises ImageError when that
        cannot be told now."""
        from kenaz_engine.images.signature import PublicKey, verify

        beside = (url + SIGNATURE,)
        try:
            client = await self._client(beside)
            found = await get_document(
                client, "the signature", beside, MAX_SIGNATURE, self._patience, self._watch
            )
            assert found is not None
            verify(PublicKey.parse(key), found.content.decode("utf-8", "replace"), blake2b)
        except ImageError as error:
            if error.transient:
                raise
            return str(error)
        return ""

    async def _client(self, urls: tuple[str, ...]) -> httpx.AsyncClient | None:
        """The client, made when the first URL needs one: importing it takes longer than copying an image."""
        if self._http is None and any(urlsplit(url).scheme != "file" for url in urls):
            self._http = await self._stack.enter_async_context(http_client(self._patience))
        return self._http


def _safe(url: str) -> bool:
    return urlsplit(url).scheme in ("https", "file")
