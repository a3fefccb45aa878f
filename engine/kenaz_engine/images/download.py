"""Moves bytes from a URL into a file of the store, and checks them while they come. Decides nothing
itself."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import trio

from kenaz_engine.images import steps
from kenaz_engine.images.errors import ImageError, Untrusted
from kenaz_engine.images.reference import file_at
from kenaz_engine.images.store import CHUNK, failure
from kenaz_engine.images.transfer import (
    Course,
    Ended,
    Have,
    Kind,
    Meter,
    Notice,
    Patience,
    Take,
    Watch,
    judge,
    request_headers,
    shown,
)
from kenaz_engine.openflags import PLAIN

if TYPE_CHECKING:
    import ssl

    import httpx

ROOM = 64 << 20
"""Bytes that a download leaves free."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file to fetch: what it is called in messages, where it is published, and what it must be. `size` is
    in bytes; with `hashed`, the BLAKE2b-512 of it is wanted too, for its signature."""

    file: str
    urls: tuple[str, ...]
    sha256: str
    size: int
    hashed: bool = False


@asynccontextmanager
async def http_client(patience: Patience) -> AsyncIterator[httpx.AsyncClient]:
    """A client that goes through the environment's proxy, and trusts whom SSL_CERT_FILE or the system trusts.

    Raises ImageError for a proxy that cannot be.
    """
    import httpx

    timeout = httpx.Timeout(patience.window, connect=patience.connect)
    try:
        client = httpx.AsyncClient(follow_redirects=True, timeout=timeout, verify=_trusted())
    except (ValueError, httpx.InvalidURL, OSError) as error:
        raise ImageError(f"the proxy or certificates of the environment cannot be used: {error}") from None
    async with client:
        yield client


def _trusted() -> ssl.SSLContext:
    import ssl

    return ssl.create_default_context(
        cafile=os.environ.get("SSL_CERT_FILE"), capath=os.environ.get("SSL_CERT_DIR")
    )


class _Part:
    """A file that comes, with the digests of what is there of it."""

    def __init__(self, path: Path, wanted: Wanted) -> None:
        self._path = path
        self._beside = path.with_suffix(".json")
        self._hashed = wanted.hashed
        self._file = self._opened()
        self.have = Have(0)
        self._restart_digests()

    def _opened(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | PLAIN
        try:
            return os.open(self._path, flags, 0o644)
        except PermissionError:
            # Another user of a shared store has left it half-way: begun anew, as far as the directory lets
            # us.
            self._path.unlink()
            return os.open(self._path, flags, 0o644)

    def _restart_digests(self) -> None:
        self.sha256 = hashlib.sha256()
        self.blake2b = hashlib.blake2b() if self._hashed else None

    def resume(self, size: int) -> None:
        """Takes up what an earlier launcher left, digesting it. Blocks."""
        there = os.fstat(self._file).st_size
        if there > size:
            self.clear()
            return
        os.lseek(self._file, 0, os.SEEK_SET)
        while chunk := os.read(self._file, CHUNK):
            self._digest(chunk)
        fields: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            data = json.loads(self._beside.read_bytes())
            fields = {name: str(data[name]) for name in ("url", "etag", "modified") if name in data}
        self.have = Have(there, **fields)

    def clear(self) -> None:
        """Throws away what is there."""
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        self._restart_digests()
        self.have = Have(0)

    def came_from(self, url: str, headers: Any) -> None:
        """Notes what the next launcher needs to go on."""
        etag, modified = headers.get("etag", ""), headers.get("last-modified", "")
        self.have = Have(self.have.size, url, etag, modified)
        self._beside.write_text(json.dumps(asdict(self.have)))
        steps.reached("validators written")

    def take(self, chunk: bytes) -> None:
        """Appends. Blocks, hence in a thread."""
        self._digest(chunk)
        view = memoryview(chunk)
        while view:
            view = view[os.write(self._file, view) :]

    def _digest(self, chunk: bytes) -> None:
        self.sha256.update(chunk)
        if self.blake2b is not None:
            self.blake2b.update(chunk)

    def grown(self, count: int) -> None:
        """So many more bytes are there."""
        self.have = Have(self.have.size + count, self.have.url, self.have.etag, self.have.modified)

    def close(self, *, forget: bool = False) -> None:
        """Ends; with `forget`, only the file itself stays, for it is whole."""
        os.close(self._file)
        if forget:
            self._beside.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Checked:
    """What was fetched: its BLAKE2b-512, where that was asked for."""

    blake2b: bytes


async def download(
    client: httpx.AsyncClient | None, wanted: Wanted, path: Path, patience: Patience, watch: Watch
) -> Checked:
    """Fetches `wanted` to `path`, going on with what is there already. The caller holds the lock of its
    digest.

    Afterwards the file has the promised length and digest. After a failure or a cancel what has come so far
    stays at `path`, to go on with. Raises Untrusted when a mirror had something else and none had the right
    thing; ImageError, perhaps transient, for all other ways in which every mirror failed.
    """
    part = await trio.to_thread.run_sync(_open, path, wanted)
    whole = False
    try:
        _see_room(path, wanted.size - part.have.size)
        course = Course(wanted.urls)
        meter = Meter(wanted.file, wanted.size)
        while True:
            ended = await _attempt(client, course, wanted, part, patience, meter, watch)
            if ended is None:
                whole = True
                return Checked(part.blake2b.digest() if part.blake2b else b"")
            course = course.on(ended)
            if course.anew:
                part.clear()
            if not course.urls:
                raise _given_up(wanted, course)
            watch(Notice(going_on(ended, course)))
            await trio.sleep(course.wait)
    except OSError as error:
        raise failure(error, path) from error
    finally:
        part.close(forget=whole)


def _open(path: Path, wanted: Wanted) -> _Part:
    try:
        part = _Part(path, wanted)
        steps.reached("part opened")
        part.resume(wanted.size)
    except OSError as error:
        raise failure(error, path) from error
    return part


def _see_room(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed + ROOM > free:
        raise ImageError(
            f"{needed / (1 << 20):.0f} MiB are needed on the file system of {path.parent}, "
            f"and {free / (1 << 20):.0f} MiB are free",
            "free some, or run `kenaz-launcher image prune`",
        )


def going_on(ended: Ended, course: Course) -> str:
    if course.wait:
        return f"{ended.why}; it asks to be left alone for {course.wait:g} s"
    return f"{ended.why}; going on with {shown(course.urls[0])}"


def _given_up(wanted: Wanted, course: Course) -> ImageError:
    why = "; ".join(course.failures) or "no place is known to fetch it from"
    message = f"{wanted.file} could not be fetched: {why}"
    if course.untrusted:
        return Untrusted(message, "nothing of it is used; ask its publisher")
    return ImageError(message, transient=course.transient)


async def _attempt(
    client: httpx.AsyncClient | None,
    course: Course,
    wanted: Wanted,
    part: _Part,
    patience: Patience,
    meter: Meter,
    watch: Watch,
) -> Ended | None:
    """One attempt at the first mirror; None when the file is whole and right."""
    url, began = course.urls[0], part.have.size

    def ended(kind: Kind, why: str, after: float | None = None) -> Ended:
        return Ended(kind, why, part.have.size, began > 0, after)

    def progress() -> None:
        watch(meter.at(time.monotonic(), part.have.size))

    try:
        if part.have.size < wanted.size or not wanted.size:
            source = _from_file if urlsplit(url).scheme == "file" else _from_http
            failed = await source(client, url, wanted, part, patience, progress)
            if failed is not None:
                return ended(*failed)
            began = min(began, part.have.size)
    except _Slow:
        return ended(Kind.BROKEN, f"it stalled: less than {patience.least} bytes in {patience.window:g} s")
    if part.have.size < wanted.size:
        return ended(Kind.BROKEN, f"it ended after {part.have.size} of {wanted.size} bytes")
    if part.have.size > wanted.size:
        return ended(Kind.DAMAGED, f"has more than the {wanted.size} bytes that are promised")
    steps.reached("part complete")
    found = part.sha256.hexdigest()
    if found != wanted.sha256:
        return ended(Kind.DAMAGED, f"its SHA-256 is {found}, and {wanted.sha256} is promised")
    progress()
    return None


class _Slow(Exception):
    """A server that does not bring enough in time."""


Failed = tuple[Kind, str, float | None] | None


async def _from_http(
    client: httpx.AsyncClient | None,
    url: str,
    wanted: Wanted,
    part: _Part,
    patience: Patience,
    progress: Callable[[], None],
) -> Failed:
    import ssl

    import httpx

    assert client is not None
    headers = request_headers(part.have, url)
    try:
        async with client.stream("GET", url, headers=headers) as response:
            answer = judge(
                response.status_code,
                response.headers,
                part.have,
                wanted.size,
                ranged="Range" in headers,
                now=time.time(),
            )
            match answer.take:
                case Take.FAILED:
                    kind = Kind.BROKEN if answer.transient else Kind.REFUSED
                    return kind, answer.why, answer.after
                case Take.NOTHING:
                    return Kind.CHANGED, "what was fetched of it before does not fit any more", None
                case Take.WHOLE:
                    part.clear()
            part.came_from(url, response.headers)
            await _receive(raw(response), wanted, part, patience, progress)
    except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError) as error:
        return (*explained(error), None)
    return None


def explained(error: Exception) -> tuple[Kind, str]:
    """What a failure of the client means. A certificate that is not trusted will not be trusted in a
    minute."""
    import ssl

    import httpx

    text = str(error) or type(error).__name__
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Kind.REFUSED, f"its certificate is not trusted: {cause.verify_message}"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol | httpx.TooManyRedirects):
        return Kind.REFUSED, text
    if isinstance(error, httpx.TimeoutException):
        return Kind.BROKEN, "it did not answer in time"
    return Kind.BROKEN, text


async def _from_file(
    client: httpx.AsyncClient | None,
    url: str,
    wanted: Wanted,
    part: _Part,
    patience: Patience,
    progress: Callable[[], None],
) -> Failed:
    part.clear()
    try:
        async with await trio.open_file(file_at(url), "rb") as file:
            while part.have.size <= wanted.size and (chunk := await file.read(CHUNK)):
                await trio.to_thread.run_sync(part.take, chunk)
                part.grown(len(chunk))
                progress()
    except OSError as error:
        if error.filename is None:  # not of the file that is read, but of the one that is written
            raise
        return Kind.REFUSED, str(error.strerror), None
    return None


async def _receive(
    stream: AsyncGenerator[bytes, None],
    wanted: Wanted,
    part: _Part,
    patience: Patience,
    progress: Callable[[], None],
) -> None:
    """Takes the body, up to some bytes more than are promised. Digests and writes in a thread while more
    comes.

    What comes before a failure is kept. Raises _Slow, OSError for the disk, and what the client raises.
    """
    send, receive = trio.open_memory_channel[bytes](2)
    window = trio.CancelScope(deadline=trio.current_time() + patience.window)
    broken: Exception | None = None
    full: OSError | None = None

    async def pull() -> None:
        nonlocal broken
        size, pending, mark = part.have.size, bytearray(), 0
        async with send:
            try:
                with window:
                    async with aclosing(stream) as chunks:
                        async for chunk in chunks:
                            size, mark = size + len(chunk), mark + len(chunk)
                            pending += chunk
                            if len(pending) >= CHUNK:
                                await send.send(bytes(pending))
                                pending.clear()
                            if mark >= patience.least:
                                mark, window.deadline = 0, trio.current_time() + patience.window
                            if size > wanted.size:
                                window.cancel()  # leaving the loop would leave httpx's generators open
            except Exception as error:
                broken = error
            if pending:
                await send.send(bytes(pending))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pull)
        try:
            async for data in receive:
                await trio.to_thread.run_sync(part.take, data)
                part.grown(len(data))
                steps.reached("part written")
                progress()
        except OSError as error:
            full = error
            nursery.cancel_scope.cancel()
    if full is not None:
        raise full
    if broken is not None:
        raise broken
    if window.cancelled_caught and part.have.size <= wanted.size:
        raise _Slow


def raw(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The body as it comes, to be closed by whoever asks."""
    return cast("AsyncGenerator[bytes, None]", response.aiter_raw())
