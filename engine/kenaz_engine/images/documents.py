"""Small files from a publisher: manifests and signatures, read whole and handed to whoever can judge them."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import trio

from kenaz_engine.images.download import explained, going_on, raw
from kenaz_engine.images.errors import ImageError, Untrusted
from kenaz_engine.images.reference import file_at
from kenaz_engine.images.transfer import Course, Ended, Have, Kind, Notice, Patience, Watch, judge, shown

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True, slots=True)
class Document:
    """A small file that came whole: its bytes, the URL that was asked for it, where it was in the end, and
    its validators there."""

    content: bytes
    asked: str
    last: str = ""
    etag: str = ""
    modified: str = ""


Judge = Callable[[Document], Awaitable[str]]
"""Says what is wrong with a document, so that the next mirror is asked; empty for nothing. Raises ImageError
where that cannot be told."""


async def _nothing_wrong(document: Document) -> str:
    return ""


async def get_document(
    client: httpx.AsyncClient | None,
    file: str,
    urls: tuple[str, ...],
    limit: int,
    patience: Patience,
    watch: Watch,
    known: Have | None = None,
    wrong: Judge = _nothing_wrong,
) -> Document | None:
    """A file of at most `limit` bytes from the first of `urls` that has it, and has it right; None when it is
    still the one that `known` describes.

    Raises Untrusted when the last word was that it is wrong, ImageError, perhaps transient, when no mirror
    has it.
    """
    course = Course(urls)
    while True:
        url = course.urls[0]
        local = urlsplit(url).scheme == "file"
        found = await (_read_file(url, limit) if local else _get(client, url, limit, patience, known))
        if not isinstance(found, Ended):
            try:
                why = await wrong(found) if found is not None else ""
            except ImageError as error:
                found = Ended(Kind.BROKEN if error.transient else Kind.REFUSED, str(error))
            else:
                if not why:
                    return found
                found = Ended(Kind.DAMAGED, why)
        course = course.on(found)
        if not course.urls:
            message = f"{file} could not be fetched: {'; '.join(course.failures)}"
            if course.untrusted:
                raise Untrusted(message, "nothing of it is used; ask its publisher")
            raise ImageError(message, transient=course.transient)
        watch(Notice(going_on(found, course)))
        await trio.sleep(course.wait)


async def get_size(client: httpx.AsyncClient | None, urls: tuple[str, ...], patience: Patience) -> int:
    """Bytes of a file of which only the digest is known. Raises ImageError where no server tells."""
    why, transient = "", False
    for url in urls:
        try:
            if urlsplit(url).scheme == "file":
                return file_at(url).stat().st_size
            found = await _head(client, url, patience)
        except OSError as error:
            found = Ended(Kind.REFUSED, str(error.strerror))
        if isinstance(found, int):
            return found
        why, transient = f"{shown(url)}: {found.why}", transient or found.kind is Kind.BROKEN
    raise ImageError(why, "a catalog entry can say how long it is", transient=transient)


async def _head(client: httpx.AsyncClient | None, url: str, patience: Patience) -> int | Ended:
    import ssl

    import httpx

    assert client is not None
    try:
        with trio.fail_after(patience.connect + patience.window):
            response = await client.head(url, headers={"Accept-Encoding": "identity"})
    except trio.TooSlowError:
        return Ended(Kind.BROKEN, "it did not answer in time")
    except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError) as error:
        return Ended(*explained(error))
    length = response.headers.get("content-length", "")
    if response.status_code == 200 and length.isdecimal():
        return int(length)
    if response.status_code == 200:
        return Ended(Kind.REFUSED, "the server does not say how long it is")
    answer = judge(response.status_code, response.headers, Have(), 0, ranged=False, now=time.time())
    return Ended(Kind.BROKEN if answer.transient else Kind.REFUSED, f"status {response.status_code}")


async def _get(
    client: httpx.AsyncClient | None, url: str, limit: int, patience: Patience, known: Have | None
) -> Document | Ended | None:
    import ssl

    import httpx

    assert client is not None
    headers = {"Accept-Encoding": "identity"}
    if known is not None and known.url == url:
        headers |= {"If-None-Match": known.etag} if known.etag else {}
        headers |= {"If-Modified-Since": known.modified} if known.modified else {}
    content = bytearray()
    try:
        with trio.fail_after(patience.connect + patience.window):
            async with client.stream("GET", url, headers=headers) as response:
                if response.status_code == 304 and len(headers) > 1:
                    return None
                if response.status_code != 200:
                    answer = judge(
                        response.status_code, response.headers, Have(), 0, ranged=False, now=time.time()
                    )
                    kind = Kind.BROKEN if answer.transient else Kind.REFUSED
                    return Ended(kind, f"status {response.status_code}", after=answer.after)
                with trio.CancelScope() as enough:
                    async with aclosing(raw(response)) as chunks:
                        async for chunk in chunks:
                            content += chunk
                            if len(content) > limit:
                                enough.cancel()  # leaving the loop would leave httpx's generators open
                if len(content) > limit:
                    return Ended(Kind.REFUSED, f"is longer than {limit} bytes")
                head, last = response.headers, str(response.url)
                hops = [str(hop.url) for hop in response.history]
    except trio.TooSlowError:
        return Ended(Kind.BROKEN, "it did not answer in time")
    except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError) as error:
        return Ended(*explained(error))
    # Where a redirect leaves TLS, what comes is nobody's, however it goes on.
    unsafe = next((hop for hop in hops if hop.startswith("http:")), last)
    return Document(bytes(content), url, unsafe, head.get("etag", ""), head.get("last-modified", ""))


async def _read_file(url: str, limit: int) -> Document | Ended:
    path = file_at(url)

    def read() -> bytes:
        with path.open("rb") as file:
            return file.read(limit + 1)

    try:
        content = await trio.to_thread.run_sync(read)
    except OSError as error:
        return Ended(Kind.REFUSED, str(error.strerror))
    if len(content) > limit:
        return Ended(Kind.REFUSED, f"is longer than {limit} bytes")
    return Document(content, url, url)
