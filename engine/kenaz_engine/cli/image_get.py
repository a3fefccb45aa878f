"""`image pull` and `image import`: images that come."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import trio

from kenaz_engine.cli.failures import FAILED, SUCCESS, USAGE, CommandError
from kenaz_engine.cli.image import in_words_of
from kenaz_engine.cli.output import plain
from kenaz_engine.images.catalog import (
    Image,
    ImageError,
    ImageMissing,
    catalog,
    default_cache,
    load_image,
)
from kenaz_engine.images.reference import AtUrl, InFile, Named, file_at, parse_reference
from kenaz_engine.images.store import Store

_ATTEMPTS = 4
"""How often `pull` tries what may pass, with longer and longer waits."""

T = TypeVar("T")


class _Told:
    """What `pull` and `import` say: lines, or JSON lines."""

    def __init__(self, as_json: bool) -> None:
        from kenaz_engine.cli.transfers import Bar, events

        self._json = as_json
        self._bar = Bar(sys.stderr)
        self._pace = events()

    def watch(self, seen: Any) -> None:
        from kenaz_engine.cli.transfers import as_data
        from kenaz_engine.images.transfer import Notice

        if not self._json:
            self._bar.watch(seen)
        elif isinstance(seen, Notice):
            self._line({"kind": "notice", "text": seen.text})
        elif self._pace.due(seen, time.monotonic()):
            self._line(as_data(seen))

    def note(self, text: str) -> None:
        """Something that is not as usual."""
        self._bar.close()
        if self._json:
            self._line({"kind": "notice", "text": text})
        else:
            print(f"note: {plain(text)}", file=sys.stderr)

    def result(self, image: Image) -> None:
        self._bar.close()
        if self._json:
            names = {"name": image.name, "tag": image.tag, "arch": image.arch, "digest": image.digest}
            self._line({"kind": "result", "ok": True, **names})
        else:
            print(f"{image.name}:{image.tag} {image.arch} {image.digest}")

    def failed(self, what: str, error: ImageError) -> None:
        self._bar.close()
        if self._json:
            data = {"name": what, "error": str(error), "hint": error.hint or None}
            self._line({"kind": "result", "ok": False, **data, "transient": error.transient})

    def close(self) -> None:
        self._bar.close()

    def _line(self, data: dict[str, Any]) -> None:
        print(json.dumps(data), flush=True)


def pull(arguments: argparse.Namespace) -> int:
    """Fetches one image, or all."""
    if arguments.all == bool(arguments.image):
        raise CommandError("name an image, or --all", "kenaz-launcher image ls", USAGE)
    told = _Told(arguments.json)
    if not arguments.all:
        try:
            reference = _asked_for(arguments.image, arguments.sha256)
            _pull_one(reference, arguments, told)
        except ImageError as error:
            told.failed(arguments.image, error)
            raise
        finally:
            told.close()
        return SUCCESS
    failed = 0
    for name, entry in catalog().items():
        offer = entry.offers.get(arguments.arch)
        if offer is None or offer.source is None:
            told.note(
                f"{name} is published nowhere for {arguments.arch}: {offer.hint if offer else 'no entry'}"
            )
            continue
        try:
            _pull_one(Named(name), arguments, told)
        except ImageError as error:
            failed += 1
            told.failed(name, error)
            print(f"kenaz-launcher: {name}: {plain(in_words_of(error))}", file=sys.stderr)
    told.close()
    return FAILED if failed else SUCCESS


def _asked_for(text: str, sha256: str | None) -> Named | AtUrl:
    try:
        reference = parse_reference(text)
    except ImageError as error:
        raise CommandError(str(error), error.hint, USAGE) from None
    if isinstance(reference, InFile):
        raise CommandError(f"{text} is a file", f"kenaz-launcher image import {text}", USAGE)
    if sha256 is None:
        return reference
    if not isinstance(reference, AtUrl):
        raise CommandError("--sha256 goes with a URL", "write name@sha256:DIGEST", USAGE)
    if len(sha256) != 64 or not all(c in "0123456789abcdef" for c in sha256.lower()):
        raise CommandError("--sha256 is not a SHA-256 digest", "64 hexadecimal digits", USAGE)
    return AtUrl(reference.url, sha256.lower())


def _pull_one(reference: Named | AtUrl, arguments: argparse.Namespace, told: _Told) -> None:
    if isinstance(reference, AtUrl) and not reference.digest:
        reference = AtUrl(reference.url, _first_sight(reference, told))
    if isinstance(reference, AtUrl) and reference.is_manifest:
        told.result(_run(lambda: _pull_manifest(reference, arguments.offline, told), told))
        return
    text = (
        f"{reference.url}@sha256:{reference.digest}" if isinstance(reference, AtUrl) else _written(reference)
    )

    async def ensured() -> Image:
        from kenaz_engine.images.ensure import ensure

        found = await ensure(
            text, arguments.arch, default_cache(), watch=told.watch, offline=arguments.offline, ask=True
        )
        found.held.close()
        for note in found.notes:
            told.note(note)
        return found.image

    told.result(_run(ensured, told))


def _written(named: Named) -> str:
    if named.digest:
        return f"{named.name}@sha256:{named.digest}"
    return f"{named.name}:{named.tag}" if named.tag else named.name


async def _pull_manifest(url: AtUrl, offline: bool, told: _Told) -> Image:
    """A manifest that somebody names by hand gets the name that it has itself."""
    from kenaz_engine.images.catalog import is_remote, source_of
    from kenaz_engine.images.fetch import Fetcher
    from kenaz_engine.images.transfer import Patience

    source = source_of(url)
    if offline and is_remote(source):
        raise ImageMissing(f"offline, and {url.url} is not here")
    async with Fetcher(Store.at(default_cache()), Patience(), told.watch) as fetcher:
        image, held = await fetcher.image("", "", source, how="pulled")
        held.close()
    return image


def _first_sight(url: AtUrl, told: _Told) -> str:
    """The digest of a URL that came without one: a file's own; of what is remote, only said, never
    trusted."""
    from kenaz_engine.images.documents import get_document
    from kenaz_engine.images.download import http_client
    from kenaz_engine.images.manifest import MAX_MANIFEST
    from kenaz_engine.images.transfer import Patience

    if url.url.startswith("file:"):
        return _digest_of_file(url.url)
    if not url.is_manifest:
        raise ImageError(f"{url.url} is not fetched without its SHA-256", "add --sha256 DIGEST")

    async def look() -> str:
        async with http_client(Patience()) as client:
            found = await get_document(client, "image.json", (url.url,), MAX_MANIFEST, Patience(), told.watch)
        assert found is not None
        return hashlib.sha256(found.content).hexdigest()

    found = trio.run(look)
    raise ImageError(
        f"{url.url} is not fetched without the manifest's SHA-256",
        f"now it is {found}: if its publisher says the same, add --sha256 {found}",
    )


def _digest_of_file(url: str) -> str:
    from kenaz_engine.images.store import digest_of

    path = file_at(url)
    try:
        return digest_of(path)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from None


def _run(work: Callable[[], Awaitable[T]], told: _Told) -> T:
    """Runs it, and again after what may pass. Raises ImageError."""
    from kenaz_engine.images.transfer import backoff

    async def attempts() -> T:
        for attempt in range(1, _ATTEMPTS):
            try:
                return await work()
            except ImageError as error:
                if not error.transient:
                    raise
                told.note(f"{error}; trying again in {backoff(attempt):g} s")
                await trio.sleep(backoff(attempt))
        return await work()

    return trio.run(attempts)


def bring(arguments: argparse.Namespace) -> int:
    """Takes an image from a file."""
    path = Path(arguments.file).absolute()
    told = _Told(arguments.json)
    try:
        image = _imported(path, arguments, told)
    except ImageError as error:
        told.failed(arguments.file, error)
        raise
    finally:
        told.close()
    told.result(image)
    return SUCCESS


def _imported(path: Path, arguments: argparse.Namespace, told: _Told) -> Image:
    from kenaz_engine.images.catalog import disk_source
    from kenaz_engine.images.catalogfile import AtManifest, Source
    from kenaz_engine.images.fetch import Fetcher
    from kenaz_engine.images.manifest import NAME, TAG
    from kenaz_engine.images.transfer import Patience

    if not path.is_file():
        raise ImageMissing(f"there is no file {path}")
    digest = _digest_of_file(path.as_uri())
    if arguments.sha256 and arguments.sha256.lower() != digest:
        raise ImageError(f"{path} is not the file that was meant: its SHA-256 is {digest}")
    name, arch = arguments.name or "", ""
    if name and not NAME.fullmatch(name):
        raise CommandError(f"{name} is not the name of an image", "lower-case letters, digits, . _ -", USAGE)
    source: Source
    if path.suffix == ".json":
        load_image(path)
        source = AtManifest((path.as_uri(),), digest)
    elif not name:
        raise CommandError(f"{path.name} is a disk", "give the image a --name", USAGE)
    elif not TAG.fullmatch(arguments.tag):
        raise CommandError(f"{arguments.tag} is not a tag", "letters, digits, . _ -", USAGE)
    else:
        arch = arguments.arch
        source = disk_source(path.as_uri(), digest, path.stat().st_size, tag=arguments.tag)

    async def take() -> Image:
        async with Fetcher(Store.at(default_cache()), Patience(), told.watch) as fetcher:
            image, held = await fetcher.image(name, arch, source, how="imported")
            held.close()
            return image

    return _run(take, told)
