"""Unpacks what comes packed, while it comes: in bounded pieces, and never to more than was promised.

Pure: bytes in, bytes out. Facts: RFC 8878 (zstd), RFC 1952 (gzip), and the .xz file format 1.2. Several
frames or members one after the other are one content, as the programs have it; anything else behind the end
is damage, also the padding with zeros that `xz` allows.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

from kenaz_engine.images.errors import ImageError

KINDS = ("none", "zstd", "xz", "gz")
"""What content may be packed with."""

PIECE = 1 << 20
"""Bytes of the largest piece that is handed out at once."""

_SLICE = 1 << 14  # what a stream leaves unread is copied: many small streams must not cost a square
_WINDOW_LOG = 27  # 128 MiB, the most that `zstd -d` takes by itself
_XZ_MEMORY = 128 << 20  # `xz -9` needs 65 MiB


class _Stream(Protocol):
    """One frame, as the newer of the standard library's decompressors have it."""

    def decompress(self, data: bytes, max_length: int) -> bytes: ...

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...


class Unpacker(Protocol):
    """Unpacks one content; `unpacker` makes it."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What `data` unpacks to, in pieces of at most PIECE bytes; to be exhausted before the next call.

        Raises ImageError for what is damaged, and for more than the limit before it is handed out.
        """
        ...

    def finish(self) -> None:
        """Raises ImageError unless the content has come to its end."""
        ...


class _Packed:
    """Content of one or several frames."""

    def __init__(
        self, kind: str, begin: Callable[[], _Stream], damage: tuple[type[Exception], ...], limit: int
    ):
        self._kind = kind
        self._begin = begin
        self._damage = damage
        self._limit = limit
        self._stream: _Stream | None = None
        self._frames = 0
        self._size = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        view = memoryview(data)
        for start in range(0, len(view), _SLICE):
            yield from self._feed(bytes(view[start : start + _SLICE]))

    def finish(self) -> None:
        if self._stream is not None or not self._frames:
            raise ImageError(f"the {self._kind} data is cut short")

    def _feed(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._stream is None:
                self._stream = self._begin()
            piece = self._decompress(data)
            while True:
                self._size += len(piece)
                if self._size > self._limit:
                    raise ImageError(f"the {self._kind} data unpacks to more than {self._limit} bytes")
                if piece:
                    yield piece
                if self._stream.eof or self._stream.needs_input:
                    break
                piece = self._decompress(b"")
            data = b""
            if self._stream.eof:
                data = self._stream.unused_data
                self._stream = None
                self._frames += 1

    def _decompress(self, data: bytes) -> bytes:
        assert self._stream is not None
        try:
            return self._stream.decompress(data, PIECE)
        except self._damage as error:
            where = "has something else behind its end" if self._frames else "is damaged"
            raise ImageError(f"the {self._kind} data {where}: {error}") from None


class _Plain:
    """Content that is not packed."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._size += len(data)
        if self._size > self._limit:
            raise ImageError(f"the data has more than {self._limit} bytes")
        for start in range(0, len(data), PIECE):
            yield data[start : start + PIECE]

    def finish(self) -> None:
        pass


class _Gzip:
    """zlib's decompressor in the shape of the newer ones."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self.needs_input = True

    def decompress(self, data: bytes, max_length: int) -> bytes:
        piece = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        # A full piece may have more behind it, even where all input was read.
        self.needs_input = len(piece) < max_length and not self._inner.unconsumed_tail
        return piece

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data


def unpacker(kind: str, *, limit: int) -> Unpacker:
    """An unpacker of content that is packed as `kind`, one of KINDS, into at most `limit` bytes.

    Needs some 130 MiB at the most, whatever it is fed; what would need more is refused as damaged. Raises
    ValueError for another kind.
    """
    match kind:
        case "none":
            return _Plain(limit)
        case "zstd":
            return _zstd(limit)
        case "xz":
            return _Packed(
                kind,
                lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY),
                (lzma.LZMAError,),
                limit,
            )
        case "gz":
            return _Packed(kind, _Gzip, (zlib.error,), limit)
    raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")


def _zstd(limit: int) -> Unpacker:
    import sys

    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}
    return _Packed("zstd", lambda: zstd.ZstdDecompressor(options=options), (zstd.ZstdError,), limit)
