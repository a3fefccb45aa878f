"""libvirt's C library by ctypes: a connection, its streams, and a pool.

virsh is made of it, and its calls are promised to stay as they are. Facts: libvirt-host.h, libvirt-storage.h,
libvirt-stream.h, libvirt-event.h and virterror.h of 9.0.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from kenaz_drivers.libvirt.streams.store import PIECE, Busy, Failed, Gone

LIBRARY = "libvirt.so.0"

# virEventHandleType and virStreamEventType have the same numbers. The last are errors and the end.
READABLE, WRITABLE, ERRORS = 1, 2, 4 | 8

NONBLOCK = 1
"""Of virStreamFlags. A call that would block then returns -2."""

_WOULD_BLOCK = -2

# virErrorNumber.
_SYSTEM_ERROR = 38
_OPERATION_INVALID = 55
_NO_STORAGE_VOL = 50
_STORAGE_VOL_EXIST = 90

_T = TypeVar("_T")

_P, _S, _U, _L = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_ulonglong
_I = ctypes.c_int
_HANDLER = ctypes.CFUNCTYPE(None, _P, _P)
ON_HANDLE = ctypes.CFUNCTYPE(None, _I, _I, _I, _P)
ON_STREAM = ctypes.CFUNCTYPE(None, _P, _I, _P)

_CALLS: dict[str, tuple[Any, ...]] = {
    "virConnectOpenAuth": (_P, _S, _P, _U),
    "virDomainLookupByUUIDString": (_P, _P, _S),
    "virDomainOpenChannel": (_I, _P, _S, _P, _U),
    "virDomainOpenConsole": (_I, _P, _S, _P, _U),
    "virEventAddHandle": (_I, _I, _I, ON_HANDLE, _P, _P),
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
    "virStreamEventAddCallback": (_I, _P, _I, ON_STREAM, _P, _P),
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
