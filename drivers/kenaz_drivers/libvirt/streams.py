"""Carries streams of a libvirt on another host: a domain's console and channel, and files into its pool.

Run as a file, `python -I -S streams.py`, with one of

    URI console UUID SOCKET
    URI channel UUID SOCKET
    URI upload POOL FILE NAME [FILE NAME ...]

and nothing at all, which tells whether there is a libvirt to do it with. The first two connect that UNIX
socket to the domain's, say `open`, and go on until one side ends. The last sees to it that each file is in
the pool under that name, and says how far it is, FILE by its number: `FILE BYTES OF`, or `FILE waiting OF`
where somebody else brings it.

virsh has no command for a channel, and its `console` wants a terminal. So this is the C library that virsh
itself is made of, whose calls are promised to stay as they are. Some block: here nobody minds, for each
stream has a process and a connection of its own, so that one who does not read holds up nobody else. Facts:
libvirt-host.h, libvirt-storage.h, libvirt-stream.h, libvirt-event.h and virterror.h of 9.0.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

LIBRARY = "libvirt.so.0"

PIECE = 64 << 10
"""Bytes that go at a time. A message of libvirt holds four times that."""

GAP = 4 << 20
"""Bytes of a hole that are worth a stream of their own to be left out."""

POLL = 1.0
"""Seconds between two looks whether somebody else is done with a file."""

STILL = 10
"""Looks in a row that find a file as it was, after which whoever brought it is taken for gone."""

_UNTOUCHED = 3
"""Looks in a row that find as it was a file whose upload failed. Fewer than STILL, so that nobody has begun
to take it over meanwhile."""

_TRIES = 3
"""Times that a file is begun anew when it goes while it is brought."""

HELD = 4 << 20
"""Bytes for our side that are held before libvirt is left to itself."""

_TRY = 0.02
"""Seconds after which what libvirt did not take is tried again, while nothing may be read from it."""

PACE = 0.1
"""Seconds between two reports of a file."""

# virErrorNumber.
_SYSTEM_ERROR = 38
_OPERATION_INVALID = 55
_NO_STORAGE_VOL = 50
_STORAGE_VOL_EXIST = 90


_T = TypeVar("_T")


class Failed(Exception):
    """What libvirt says, and the number of its error."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class Busy(Exception):
    """Somebody else reads or writes that volume just now."""


class Gone(Failed):
    """There is no such volume, or no more."""


class Store(Protocol):
    """A pool, as far as a file is put there. Whatever asks for a volume raises Gone where there is none."""

    def create(self, name: str, size: int) -> bool:
        """Makes a volume of so many zeros; false where there is one of that name."""

    def read(self, name: str, offset: int, length: int) -> bytes:
        """What is there, at the most `length` bytes. Raises Busy."""

    def write(self, name: str, offset: int, length: int, pieces: Iterator[bytes]) -> None:
        """Writes the pieces, of `length` bytes together. Raises Busy before it takes any."""

    def stamp(self, name: str) -> str:
        """What is another one after each write."""

    def delete(self, name: str) -> None:
        """Removes it, if it can be."""


# --- files --------------------------------------------------------------------------------------------------


def put(
    store: Store,
    file: int,
    name: str,
    told: Callable[[str], None],
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Sees to it that the volume of that name has the content of the file.

    The name says what the content is, so whoever writes there writes the same. The first piece that is not
    all zeros is written last: where it is there, all is; what an upload that broke off has left is none. One
    that goes on is waited for. libvirt keeps nobody from a volume that is being written, but the
    file's time tells: as long as it moves, somebody is at it. Raises Failed.
    """
    upload = _Upload(store, file, name, told, wait)
    for _ in range(_TRIES - 1):
        with contextlib.suppress(Gone):
            return upload.run()
    return upload.run()


class _Upload:
    """One file on its way; the words are those of `put`."""

    def __init__(
        self,
        store: Store,
        file: int,
        name: str,
        told: Callable[[str], None],
        wait: Callable[[float], None],
    ) -> None:
        self._store = store
        self._file = file
        self._name = name
        self._told = told
        self._wait = wait
        self._size = os.fstat(file).st_size
        self._first = _first(file, self._size)

    def run(self) -> None:
        """Raises Gone when the volume went meanwhile: another try makes it anew."""
        if self._store.create(self._name, self._size):
            try:
                self._bring()
            except Gone:
                raise
            except Failed:
                if self._untouched():
                    self._store.delete(self._name)
                raise
        elif not self._waited():
            self._bring()

    def _waited(self) -> bool:
        """Whether all is there, be it that somebody else has brought it; false when nobody is at it."""
        stamp, still = "", 0
        while still < STILL:
            try:
                if self._store.read(self._name, self._first, PIECE) == _piece(self._file, self._first):
                    return True
                before, stamp = stamp, self._store.stamp(self._name)
                still = still + 1 if stamp == before else 0
            except Busy:
                still = 0
            self._told(f"waiting {self._size}")
            self._wait(POLL)
        return False

    def _untouched(self) -> bool:
        """Whether nobody else writes there: another may have taken it over, and must not lose it."""
        try:
            stamp = self._store.stamp(self._name)
            for _ in range(_UNTOUCHED):
                self._wait(POLL)
                if self._store.stamp(self._name) != stamp:
                    return False
        except Failed:
            return False
        return True

    def _bring(self) -> None:
        first, last = self._first, min(self._first + PIECE, self._size)
        rest = [(max(start, last), end) for start, end in extents(self._file, self._size) if end > last]
        self._whole = last - first + sum(end - start for start, end in rest)
        self._done = 0
        for start, end in rest:
            self._write(start, end)
        if rest and not self._has(max(rest[-1][0], rest[-1][1] - PIECE)):
            raise Gone(f"the volume {self._name} was made anew while it was written")
        self._write(first, last)

    def _has(self, at: int) -> bool:
        """Whether what was written there is there: not, where somebody has deleted the volume meanwhile and
        another one of that name is being filled, which the first piece would then call whole."""
        while True:
            try:
                return self._store.read(self._name, at, PIECE) == _piece(self._file, at)
            except Busy:
                self._wait(POLL / 10)

    def _write(self, start: int, end: int) -> None:
        while True:
            try:
                return self._store.write(self._name, start, end - start, self._pieces(start, end))
            except Busy:
                self._wait(POLL / 10)

    def _pieces(self, start: int, end: int) -> Iterator[bytes]:
        for at in range(start, end, PIECE):
            data = _piece(self._file, at, min(PIECE, end - at))
            yield data
            self._done += len(data)
            self._told(f"{self._done} {self._whole}")


def _first(file: int, size: int) -> int:
    """Where the first piece begins that is not all zeros; of a file without one, the first of all."""
    for start, end in extents(file, size):
        for at in range(start - start % PIECE, end, PIECE):
            if any(_piece(file, at)):
                return at
    return 0


def _piece(file: int, at: int, length: int = PIECE) -> bytes:
    os.lseek(file, at, os.SEEK_SET)
    data = b""
    while len(data) < length and (more := os.read(file, length - len(data))):
        data += more
    return data


def extents(file: int, size: int) -> Iterator[tuple[int, int]]:
    """Where the file holds data, with holes that are not worth being left out; all of it where the platform
    does not tell."""
    if sys.platform == "win32" or not hasattr(os, "SEEK_DATA"):
        yield 0, size
    else:
        begun, reached = -1, 0
        while reached < size:
            try:
                start = os.lseek(file, reached, os.SEEK_DATA)
            except OSError as exc:
                if exc.errno == errno.ENXIO:  # holes up to the end
                    break
                yield 0, size  # a file system that does not tell
                return
            end = os.lseek(file, start, os.SEEK_HOLE)
            if begun >= 0 and start - reached > GAP:
                yield begun, reached
                begun = -1
            begun, reached = (start if begun < 0 else begun), end
        if begun >= 0:
            yield begun, reached


# --- libvirt ------------------------------------------------------------------------------------------------

_P, _S, _U, _L = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_ulonglong
_I = ctypes.c_int
_HANDLER = ctypes.CFUNCTYPE(None, _P, _P)
_ON_HANDLE = ctypes.CFUNCTYPE(None, _I, _I, _I, _P)
_ON_STREAM = ctypes.CFUNCTYPE(None, _P, _I, _P)

# virEventHandleType and virStreamEventType have the same numbers. The last are errors and the end.
_READABLE, _WRITABLE, _ERRORS = 1, 2, 4 | 8

_NONBLOCK = 1
"""Of virStreamFlags. A call that would block then returns -2."""

_WOULD_BLOCK = -2

_CALLS: dict[str, tuple[Any, ...]] = {
    "virConnectOpenAuth": (_P, _S, _P, _U),
    "virDomainLookupByUUIDString": (_P, _P, _S),
    "virDomainOpenChannel": (_I, _P, _S, _P, _U),
    "virDomainOpenConsole": (_I, _P, _S, _P, _U),
    "virEventAddHandle": (_I, _I, _I, _ON_HANDLE, _P, _P),
    "virEventRegisterDefaultImpl": (_I,),
    "virEventRunDefaultImpl": (_I,),
    "virEventUpdateHandle": (None, _I, _I),
    "virGetLastErrorCode": (_I,),
    "virGetLastErrorMessage": (_S,),
    "virSetErrorFunc": (None, _P, _HANDLER),
    "virStoragePoolLookupByName": (_P, _P, _S),
    "virStoragePoolRefresh": (_I, _P, _U),
    "virStorageVolCreateXML": (_P, _P, _S, _U),
    "virStorageVolDelete": (_I, _P, _U),
    "virStorageVolDownload": (_I, _P, _P, _L, _L, _U),
    "virStorageVolGetXMLDesc": (_S, _P, _U),
    "virStorageVolLookupByName": (_P, _P, _S),
    "virStorageVolUpload": (_I, _P, _P, _L, _L, _U),
    "virStreamEventAddCallback": (_I, _P, _I, _ON_STREAM, _P, _P),
    "virStreamEventUpdateCallback": (_I, _P, _I),
    "virStreamFinish": (_I, _P),
    "virStreamFree": (_I, _P),
    "virStreamNew": (_P, _P, _U),
    "virStreamRecv": (_I, _P, _P, ctypes.c_size_t),
    "virStreamSend": (_I, _P, _S, ctypes.c_size_t),
}


def _credentials(library: Any) -> Any:
    """How virsh answers a host that asks who we are: SASL uses the user's auth.conf only with this."""
    return ctypes.c_void_p.in_dll(library, "virConnectAuthPtrDefault")


class Connection:
    """A connection to a libvirt. Its calls block, and let other threads run meanwhile."""

    def __init__(self, uri: str, library: Any, *, events: bool = False) -> None:
        for name, (result, *arguments) in _CALLS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.library = library
        self._buffer = ctypes.create_string_buffer(PIECE)
        # Otherwise it prints each error besides.
        self._silent = _HANDLER(lambda data, error: None)
        library.virSetErrorFunc(None, self._silent)
        if events:
            self.call("virEventRegisterDefaultImpl")
        self._connection = self.call("virConnectOpenAuth", uri.encode(), _credentials(library), 0)

    def call(self, name: str, *arguments: Any) -> Any:
        """Raises Failed where libvirt says that it failed: nothing, or a negative number."""
        result = getattr(self.library, name)(*arguments)
        if result is None or (_CALLS[name][0] is _I and result < 0 and result != _WOULD_BLOCK):
            said = self.library.virGetLastErrorMessage()
            code = self.library.virGetLastErrorCode()
            raise (Gone if code == _NO_STORAGE_VOL else Failed)(said.decode("utf-8", "replace"), code)
        return result

    def stream(self, flags: int = 0) -> Any:
        """A stream that is not used yet."""
        return self.call("virStreamNew", self._connection, flags)

    def domain(self, uuid: str) -> Any:
        """The domain of that UUID."""
        return self.call("virDomainLookupByUUIDString", self._connection, uuid.encode())

    def pool(self, name: str) -> Pool:
        """The pool of that name."""
        return Pool(self, self.call("virStoragePoolLookupByName", self._connection, name.encode()))

    def receive(self, stream: Any) -> bytes | None:
        """What comes next; empty at the end. None where it would have to be waited for."""
        length = self.call("virStreamRecv", stream, self._buffer, PIECE)
        return None if length == _WOULD_BLOCK else ctypes.string_at(self._buffer, length)

    def send(self, stream: Any, data: bytes) -> int | None:
        """How much of it was sent. None where it would have to be waited for."""
        sent: int = self.call("virStreamSend", stream, data, len(data))
        return None if sent == _WOULD_BLOCK else sent


class Pool:
    """A pool of that connection's host.

    libvirt knows what was there when it last looked, and what it did itself. Where that may be why it fails,
    it is made to look: files come and go by hand, and by other hosts where a pool is a file system of many.
    """

    def __init__(self, connection: Connection, pool: Any) -> None:
        self._connection = connection
        self._pool = pool

    def create(self, name: str, size: int) -> bool:
        return self._anew(_OPERATION_INVALID, lambda: self._create(name, size))

    def _create(self, name: str, size: int) -> bool:
        xml = (
            f"<volume><name>{name}</name><capacity>{size}</capacity><allocation>0</allocation>"
            "<target><format type='raw'/></target></volume>"
        )
        try:
            self._connection.call("virStorageVolCreateXML", self._pool, xml.encode(), 0)
        except Failed as error:
            if error.code != _STORAGE_VOL_EXIST:
                raise
            return False
        return True

    def read(self, name: str, offset: int, length: int) -> bytes:
        stream = self._open("virStorageVolDownload", name, offset, length)
        data = b""
        while more := self._connection.receive(stream):
            data += more
        self._end(stream)
        return data

    def write(self, name: str, offset: int, length: int, pieces: Iterator[bytes]) -> None:
        stream = self._open("virStorageVolUpload", name, offset, length)
        for data in pieces:
            while data:
                data = data[self._connection.send(stream, data) :]
        self._end(stream)

    def stamp(self, name: str) -> str:
        told: bytes = self._connection.call("virStorageVolGetXMLDesc", self._volume(name), 0)
        return told.decode().partition("<mtime>")[2].partition("<")[0]

    def delete(self, name: str) -> None:
        try:
            self._connection.call("virStorageVolDelete", self._volume(name), 0)
        except Failed:
            return  # somebody else is at it

    def _volume(self, name: str) -> Any:
        return self._connection.call("virStorageVolLookupByName", self._pool, name.encode())

    def _anew(self, code: int, action: Callable[[], _T]) -> _T:
        """Does that, and where it fails with that number once more, after libvirt has looked."""
        try:
            return action()
        except Failed as error:
            if error.code != code:
                raise
        with contextlib.suppress(Failed):  # the second try tells more
            self._connection.call("virStoragePoolRefresh", self._pool, 0)
        return action()

    def _open(self, what: str, name: str, offset: int, length: int) -> Any:
        stream = self._connection.stream()

        def opened() -> None:
            self._connection.call(what, self._volume(name), stream, offset, length, 0)

        try:
            self._anew(_SYSTEM_ERROR, opened)
        except Failed as error:
            if error.code == _OPERATION_INVALID:
                raise Busy from None
            raise
        return stream

    def _end(self, stream: Any) -> None:
        self._connection.call("virStreamFinish", stream)
        self._connection.call("virStreamFree", stream)


# --- console and channel ------------------------------------------------------------------------------------


class Carrier:
    """Joins a stream of libvirt with a socket of ours, in libvirt's own event loop.

    One thread: of two that use a connection of libvirt 9.0 at once, one may wait for ever. What our side does
    not take is held back where it comes from, once there is more than HELD of it: libvirt then reads no more.
    """

    def __init__(self, connection: Connection, stream: Any, near: socket.socket) -> None:
        self._connection = connection
        self._stream = stream
        self._near = near
        self._to_near = bytearray()
        self._to_far = b""
        self._over = False
        self._failure: Exception | None = None
        self._callbacks = _ON_STREAM(self._on_stream), _ON_HANDLE(self._on_near)
        near.setblocking(False)
        call = connection.call
        call("virStreamEventAddCallback", stream, _READABLE | _ERRORS, self._callbacks[0], None, None)
        self._watch = call("virEventAddHandle", near.fileno(), _READABLE, self._callbacks[1], None, None)

    def run(self) -> None:
        """Returns when one side has ended and all that it had said was handed on. Raises Failed, OSError."""
        while not self._over:
            if len(self._to_near) > HELD:
                self._wait_for_near()
            else:
                self._connection.call("virEventRunDefaultImpl")
            if self._failure is not None:
                raise self._failure
        self._near.setblocking(True)
        self._near.sendall(self._to_near)

    def _wait_for_near(self) -> None:
        """Our side alone, for libvirt would read on. What it did not take is tried again."""
        reads = [] if self._to_far else [self._near]
        ready = select.select(reads, [self._near], [], _TRY if self._to_far else None)
        with self._noting():
            self._send()
        self._on_near(0, 0, _READABLE * bool(ready[0]) | _WRITABLE * bool(ready[1]), None)

    def _on_stream(self, stream: Any, events: int, data: Any) -> None:
        with self._noting():
            if events & _WRITABLE:
                self._send()
            while len(self._to_near) <= HELD and (got := self._receive()) is not None:
                self._over = self._over or not got
                self._to_near += got
                if not got:
                    break
            self._flush()

    def _on_near(self, watch: int, file: int, events: int, data: Any) -> None:
        with self._noting():
            if events & (_READABLE | _ERRORS) and not self._to_far:
                self._to_far = self._near.recv(PIECE)
                self._over = not self._to_far
                self._send()
            self._flush()

    def _receive(self) -> bytes | None:
        """What has come; empty at the end, None where nothing has."""
        return self._connection.receive(self._stream)

    def _send(self) -> None:
        while self._to_far and (sent := self._connection.send(self._stream, self._to_far)) is not None:
            self._to_far = self._to_far[sent:]

    def _flush(self) -> None:
        """Hands on what our side takes, and asks for what is waited for."""
        with contextlib.suppress(BlockingIOError):
            while self._to_near:
                del self._to_near[: self._near.send(self._to_near)]
        library = self._connection.library
        near = (_WRITABLE if self._to_near else 0) | (0 if self._to_far else _READABLE)
        library.virEventUpdateHandle(self._watch, near)
        far = _READABLE | _ERRORS | (_WRITABLE if self._to_far else 0)
        self._connection.call("virStreamEventUpdateCallback", self._stream, far)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """What is raised within a call of libvirt's is lost."""
        try:
            yield
        except (Failed, OSError) as error:
            self._failure = error


def carry(connection: Connection, kind: str, uuid: str, path: str) -> None:
    """Joins the domain's console or channel with that socket, until one of them ends."""
    stream = connection.stream(_NONBLOCK)
    opening = "virDomainOpenConsole" if kind == "console" else "virDomainOpenChannel"
    connection.call(opening, connection.domain(uuid), None, stream, 0)
    with _dial(path) as near:
        carrier = Carrier(connection, stream, near)
        say("open")
        carrier.run()


if sys.platform == "win32":

    def _dial(path: str) -> socket.socket:
        raise OSError("there are no UNIX sockets on this platform")

else:

    def _dial(path: str) -> socket.socket:
        dialled = socket.socket(socket.AF_UNIX)
        dialled.connect(path)
        return dialled


# --- the program --------------------------------------------------------------------------------------------


def say(line: str) -> None:
    """Tells the launcher."""
    print(line, flush=True)


def upload(pool: Store, pairs: list[tuple[str, str]]) -> None:
    """Puts those files there, by those names."""
    for number, (path, name) in enumerate(pairs):
        said = -1.0

        def told(line: str, number: int = number) -> None:
            nonlocal said
            done, _, whole = line.partition(" ")
            if done == whole or time.monotonic() - said > PACE:
                said = time.monotonic()
                say(f"{number} {line}")

        with Path(path).open("rb") as file:
            put(pool, file.fileno(), name, told)


def main(words: list[str]) -> int:
    try:
        library = ctypes.CDLL(LIBRARY)
        if not words:
            return 0
        uri, what, *rest = words
        if what == "upload":
            pairs = list(zip(rest[1::2], rest[2::2], strict=True))
            upload(Connection(uri, library).pool(rest[0]), pairs)
        else:
            carry(Connection(uri, library, events=True), what, *rest)
    except (Failed, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
