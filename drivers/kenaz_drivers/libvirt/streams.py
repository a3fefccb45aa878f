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
itself is made of, whose calls are promised to stay as they are. They block: here nobody minds, for each
stream has a process and a connection of its own, so that one who does not read holds up nobody else, and
what he does not read stays with who wrote it. Facts: libvirt-host.h, libvirt-storage.h, libvirt-stream.h
and virterror.h of 9.0.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, Protocol

LIBRARY = "libvirt.so.0"

PIECE = 64 << 10
"""Bytes that go at a time. A message of libvirt holds four times that."""

GAP = 4 << 20
"""Bytes of a hole that are worth a stream of their own to be left out."""

POLL = 1.0
"""Seconds between two looks whether somebody else is done with a file."""

# virErrorNumber.
_OPERATION_INVALID = 55
_NO_STORAGE_VOL = 50
_STORAGE_VOL_EXIST = 90


class Failed(Exception):
    """What libvirt says, and the number of its error."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class Busy(Exception):
    """Somebody else reads or writes that volume just now."""


class Store(Protocol):
    """A pool, as far as a file is put there."""

    def create(self, name: str, size: int) -> bool:
        """Makes a volume of so many zeros; false where there is one of that name."""

    def read(self, name: str, offset: int, length: int) -> bytes:
        """What is there, at the most `length` bytes. Raises Busy."""

    def write(self, name: str, offset: int, length: int, pieces: Iterator[bytes]) -> None:
        """Writes the pieces, of `length` bytes together. Raises Busy before it takes any."""

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
    that goes on is waited for: libvirt lets nobody else at the volume meanwhile. Raises Failed.
    """
    size = os.fstat(file).st_size
    first = _first(file, size)
    made = store.create(name, size)
    idle = 0
    while not made and idle < 2:
        try:
            if store.read(name, first, PIECE) == _piece(file, first):
                return
            idle += 1
        except Busy:
            idle = 0
        told(f"waiting {size}")
        wait(POLL)
    runs = [(start, end) for start, end in extents(file, size) if end > first]
    whole = sum(end - start for start, end in runs)
    done = 0

    def pieces(start: int, end: int) -> Iterator[bytes]:
        nonlocal done
        for at in range(start, end, PIECE):
            data = _piece(file, at, min(PIECE, end - at))
            yield data
            done += len(data)
            told(f"{done} {whole}")

    try:
        last = min(first + PIECE, size)
        for start, end in [*((max(start, last), end) for start, end in runs if end > last), (first, last)]:
            _write(store, name, start, end, pieces, wait)
    except Failed:
        if made:
            store.delete(name)
        raise


def _write(
    store: Store,
    name: str,
    start: int,
    end: int,
    pieces: Callable[[int, int], Iterator[bytes]],
    wait: Callable[[float], None],
) -> None:
    while True:
        try:
            return store.write(name, start, end - start, pieces(start, end))
        except Busy:
            wait(POLL / 10)


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
    """Where the file holds data, with holes that are not worth being left out."""
    if sys.platform == "win32" or not hasattr(os, "SEEK_DATA"):
        yield 0, size
        return
    begun, reached = -1, 0
    while reached < size:
        try:
            start = os.lseek(file, reached, os.SEEK_DATA)
        except OSError:  # holes up to the end
            break
        end = os.lseek(file, start, os.SEEK_HOLE)
        if begun >= 0 and start - reached > GAP:
            yield begun, reached
            begun = -1
        begun, reached = (start if begun < 0 else begun), end
    if begun >= 0:
        yield begun, reached


# --- libvirt ------------------------------------------------------------------------------------------------

_P, _S, _U, _L = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_ulonglong
_HANDLER = ctypes.CFUNCTYPE(None, _P, _P)

_CALLS: dict[str, tuple[Any, ...]] = {
    "virConnectOpen": (_P, _S),
    "virDomainLookupByUUIDString": (_P, _P, _S),
    "virDomainOpenChannel": (ctypes.c_int, _P, _S, _P, _U),
    "virDomainOpenConsole": (ctypes.c_int, _P, _S, _P, _U),
    "virGetLastErrorCode": (ctypes.c_int,),
    "virGetLastErrorMessage": (_S,),
    "virSetErrorFunc": (None, _P, _HANDLER),
    "virStoragePoolLookupByName": (_P, _P, _S),
    "virStorageVolCreateXML": (_P, _P, _S, _U),
    "virStorageVolDelete": (ctypes.c_int, _P, _U),
    "virStorageVolDownload": (ctypes.c_int, _P, _P, _L, _L, _U),
    "virStorageVolLookupByName": (_P, _P, _S),
    "virStorageVolUpload": (ctypes.c_int, _P, _P, _L, _L, _U),
    "virStreamAbort": (ctypes.c_int, _P),
    "virStreamFinish": (ctypes.c_int, _P),
    "virStreamFree": (ctypes.c_int, _P),
    "virStreamNew": (_P, _P, _U),
    "virStreamRecv": (ctypes.c_int, _P, _P, ctypes.c_size_t),
    "virStreamSend": (ctypes.c_int, _P, _S, ctypes.c_size_t),
}


class Connection:
    """A connection to a libvirt. Its calls block, and let other threads run meanwhile."""

    def __init__(self, uri: str, library: Any) -> None:
        for name, (result, *arguments) in _CALLS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._library = library
        # Otherwise it prints each error besides.
        self._silent = _HANDLER(lambda data, error: None)
        library.virSetErrorFunc(None, self._silent)
        self._connection = self.call("virConnectOpen", uri.encode())

    def call(self, name: str, *arguments: Any) -> Any:
        """Raises Failed where libvirt says that it failed: no pointer, or a negative number."""
        result = getattr(self._library, name)(*arguments)
        if (result is None) if _CALLS[name][0] is _P else result < 0:
            said = self._library.virGetLastErrorMessage()
            raise Failed(said.decode("utf-8", "replace"), self._library.virGetLastErrorCode())
        return result

    def stream(self) -> Any:
        """A stream that is not used yet."""
        return self.call("virStreamNew", self._connection, 0)

    def domain(self, uuid: str) -> Any:
        """The domain of that UUID."""
        return self.call("virDomainLookupByUUIDString", self._connection, uuid.encode())

    def pool(self, name: str) -> Pool:
        """The pool of that name."""
        return Pool(self, self.call("virStoragePoolLookupByName", self._connection, name.encode()))

    def receive(self, stream: Any, buffer: ctypes.Array[ctypes.c_char]) -> bytes:
        """What comes next; empty at the end."""
        length = self.call("virStreamRecv", stream, buffer, len(buffer))
        return ctypes.string_at(buffer, length)

    def send(self, stream: Any, data: bytes) -> None:
        """Sends all of it."""
        while data:
            data = data[self.call("virStreamSend", stream, data, len(data)) :]


class Pool:
    """A pool of that connection's host."""

    def __init__(self, connection: Connection, pool: Any) -> None:
        self._connection = connection
        self._pool = pool

    def create(self, name: str, size: int) -> bool:
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
        buffer = ctypes.create_string_buffer(length)
        data = b""
        while more := self._connection.receive(stream, buffer):
            data += more
        self._end(stream)
        return data

    def write(self, name: str, offset: int, length: int, pieces: Iterator[bytes]) -> None:
        stream = self._open("virStorageVolUpload", name, offset, length)
        for data in pieces:
            self._connection.send(stream, data)
        self._end(stream)

    def delete(self, name: str) -> None:
        try:
            self._connection.call("virStorageVolDelete", self._volume(name), 0)
        except Failed:
            return  # somebody else is at it

    def _volume(self, name: str) -> Any:
        return self._connection.call("virStorageVolLookupByName", self._pool, name.encode())

    def _open(self, what: str, name: str, offset: int, length: int) -> Any:
        stream = self._connection.stream()
        try:
            self._connection.call(what, self._volume(name), stream, offset, length, 0)
        except Failed as error:
            if error.code == _OPERATION_INVALID:
                raise Busy from None
            raise
        return stream

    def _end(self, stream: Any) -> None:
        self._connection.call("virStreamFinish", stream)
        self._connection.call("virStreamFree", stream)


# --- console and channel ------------------------------------------------------------------------------------


def carry(connection: Connection, kind: str, uuid: str, path: str) -> NoReturn:
    """Joins the domain's console or channel with that socket, until one of them ends."""
    stream = connection.stream()
    domain = connection.domain(uuid)
    if kind == "console":
        connection.call("virDomainOpenConsole", domain, None, stream, 0)
    else:
        connection.call("virDomainOpenChannel", domain, None, stream, 0)
    near = _dial(path)
    say("open")
    threading.Thread(target=_until_end, args=(_here, connection, stream, near), daemon=True).start()
    _until_end(_there, connection, stream, near)


if sys.platform == "win32":

    def _dial(path: str) -> socket.socket:
        raise OSError("there are no UNIX sockets on this platform")

else:

    def _dial(path: str) -> socket.socket:
        dialled = socket.socket(socket.AF_UNIX)
        dialled.connect(path)
        return dialled


def _here(connection: Connection, stream: Any, near: socket.socket) -> None:
    while data := near.recv(PIECE):
        connection.send(stream, data)


def _there(connection: Connection, stream: Any, near: socket.socket) -> None:
    buffer = ctypes.create_string_buffer(PIECE)
    while data := connection.receive(stream, buffer):
        near.sendall(data)


def _until_end(pump: Callable[..., None], *what: Any) -> NoReturn:
    """Where one direction ends the other is of no use, and waits in a call that nothing else would end."""
    code = 0
    try:
        pump(*what)
    except (Failed, OSError) as error:
        print(error, file=sys.stderr, flush=True)
        code = 1
    finally:
        os._exit(code)


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
            if time.monotonic() - said > 0.1:
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
        connection = Connection(uri, library)
        if what != "upload":
            carry(connection, what, *rest)
        upload(connection.pool(rest[0]), list(zip(rest[1::2], rest[2::2], strict=True)))
    except (Failed, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
