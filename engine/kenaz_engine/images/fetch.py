"""Downloads an image: its manifest first, then the parts that the manifest names, beside it."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import cast
from urllib.parse import urljoin, urlsplit
from urllib.request import url2pathname

import trio

from kenaz_engine.images.catalog import load_image
from kenaz_engine.images.errors import ImageError
from kenaz_engine.images.manifest import MANIFEST, MAX_MANIFEST, Image, Part, parse_manifest

Report = Callable[[str, int, int], object]
"""Called with a file's name, bytes fetched so far, and bytes in total."""

_CHUNK = 1 << 18
_SILENCE = 30.0
"""Seconds without a byte after which a download has failed."""


async def download_image(url: str, cache: Path, *, sha256: str | None, report: Report) -> Image:
    """Fetches the image whose manifest is at `url` into the cache, in place of one of the same name.

    `url` is `https:`, `http:` or `file:`; `sha256` is the manifest's digest in hexadecimal, and only `file:`
    goes without. Each part is checked against the manifest while it comes. The image appears whole or not at
    all: after any failure, or when cancelled, the cache is as it was. Raises ImageError.
    """
    if urlsplit(url).scheme not in ("https", "http", "file"):
        raise ImageError(f"{url} cannot be fetched", "give the https:, http: or file: URL of an image.json")
    if sha256 is None and urlsplit(url).scheme != "file":
        raise ImageError(
            f"{url} is not fetched without the manifest's SHA-256", "give the digest with the URL"
        )
    images = cache / "images"
    try:
        images.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".download-", dir=images))
        try:
            return await _download(url, images, scratch, sha256, report)
        finally:
            shutil.rmtree(scratch)
    except OSError as error:
        raise ImageError(f"{url} could not be fetched: {error}") from error


async def _download(url: str, images: Path, scratch: Path, sha256: str | None, report: Report) -> Image:
    content = bytearray()
    async with aclosing(_chunks(url)) as chunks:
        async for chunk in chunks:
            content += chunk
            if len(content) > MAX_MANIFEST:
                raise ImageError(f"{url} is longer than {MAX_MANIFEST} bytes and no manifest")
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise ImageError(f"{url} is not the manifest that was asked for: its SHA-256 is {found}")
    new = scratch / "new"
    new.mkdir()
    image = parse_manifest(bytes(content), new)
    for part in image.parts.values():
        await _fetch_part(urljoin(url, part.path.name), part, report)
    (new / MANIFEST).write_bytes(content)
    await trio.to_thread.run_sync(_sync, new)
    home = images / image.name / image.arch
    home.parent.mkdir(exist_ok=True)
    # From here on nothing waits, so that a cancellation cannot come between the two steps.
    if home.exists():
        home.rename(scratch / "old")
    new.rename(home)
    return load_image(home / MANIFEST)


async def _fetch_part(url: str, part: Part, report: Report) -> None:
    digest, size = hashlib.sha256(), 0
    with part.path.open("xb") as file:
        async with aclosing(_chunks(url)) as chunks:
            async for chunk in chunks:
                size += len(chunk)
                if size > part.size:
                    break
                digest.update(chunk)
                file.write(chunk)
                report(part.path.name, size, part.size)
    if size != part.size:
        length = "more" if size > part.size else f"{size}"
        raise ImageError(f"{url} has {length} bytes, and the manifest says {part.size}")
    if digest.hexdigest() != part.sha256:
        raise ImageError(f"{url} is not what the manifest says: its SHA-256 differs")


async def _chunks(url: str) -> AsyncGenerator[bytes, None]:
    """The bytes at `url`. Raises ImageError when the server does not hand them out, OSError for files."""
    if urlsplit(url).scheme == "file":
        async with await trio.open_file(url2pathname(urlsplit(url).path), "rb") as file:
            while chunk := await file.read(_CHUNK):
                yield chunk
        return
    import httpx

    try:
        async with (
            httpx.AsyncClient(follow_redirects=True, timeout=_SILENCE) as client,
            client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as response,
        ):
            response.raise_for_status()
            body = cast("AsyncGenerator[bytes, None]", response.aiter_bytes(_CHUNK))
            async with aclosing(body):
                async for chunk in body:
                    yield chunk
    except httpx.HTTPStatusError as error:
        raise ImageError(f"{url} could not be fetched: status {error.response.status_code}") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ImageError(f"{url} could not be fetched: {error or type(error).__name__}") from None


def _sync(directory: Path) -> None:
    """Makes sure that the files are on the disk before the directory gets its final name."""
    for path in (*sorted(directory.iterdir()), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
