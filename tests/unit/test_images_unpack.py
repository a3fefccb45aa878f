"""Unpacking: what the bounds refuse, and what counts as the end."""

from __future__ import annotations

import gzip
import lzma
import sys
import tracemalloc
from collections.abc import Callable

import pytest

from kenaz_engine.images.errors import ImageError
from kenaz_engine.images.unpack import KINDS, PIECE, unpacker

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MIB = 1 << 20
PACK: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "zstd": zstd.compress,
    "xz": lzma.compress,
    "gz": gzip.compress,
}
PACKED = [kind for kind in KINDS if kind != "none"]


def unpack(kind: str, data: bytes, *, limit: int = MIB) -> bytes:
    unpacking = unpacker(kind, limit=limit)
    content = b"".join(unpacking.feed(data))
    unpacking.finish()
    return content


@pytest.mark.parametrize("kind", PACKED)
def test_a_bomb_is_refused_before_it_has_gone_off(kind: str) -> None:
    packed = PACK[kind](bytes(24 * MIB))
    assert len(packed) < 30_000
    unpacking = unpacker(kind, limit=8 * MIB)
    seen = 0
    tracemalloc.start()
    with pytest.raises(ImageError, match=f"the {kind} data unpacks to more than 8388608 bytes"):
        for piece in unpacking.feed(packed):
            assert len(piece) <= PIECE
            seen += len(piece)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen == 8 * MIB
    assert peak < 16 * MIB


@pytest.mark.parametrize("kind", KINDS)
def test_the_limit_is_the_last_size_that_is_taken(kind: str) -> None:
    packed = PACK[kind](b"x" * 100)
    assert unpack(kind, packed, limit=100) == b"x" * 100
    with pytest.raises(ImageError, match="more than 99 bytes"):
        unpack(kind, packed, limit=99)


@pytest.mark.parametrize("kind", PACKED)
def test_several_frames_are_one_content(kind: str) -> None:
    pack = PACK[kind]
    assert unpack(kind, pack(b"a" * 70_000) + pack(b"") + pack(b"b")) == b"a" * 70_000 + b"b"
    with pytest.raises(ImageError, match="unpacks to more than 3 bytes"):
        unpack(kind, pack(b"ab") * 2, limit=3)


@pytest.mark.parametrize("kind", PACKED)
def test_many_frames_of_nothing_are_nothing(kind: str) -> None:
    empty = PACK[kind](b"")
    assert unpack(kind, empty * (50_000 // len(empty)), limit=0) == b""


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("garbage", [b"garbage", b"\0\0\0\0", b"\0" * 600])
def test_what_comes_behind_the_end_is_refused(kind: str, garbage: bytes) -> None:
    with pytest.raises(ImageError, match=f"the {kind} data (has something else behind its end|is cut short)"):
        unpack(kind, PACK[kind](b"content") + garbage)


@pytest.mark.parametrize("kind", PACKED)
def test_nothing_at_all_is_cut_short(kind: str) -> None:
    with pytest.raises(ImageError, match=f"the {kind} data is cut short"):
        unpack(kind, b"")


def test_what_is_not_packed_may_be_empty_and_comes_in_pieces_too() -> None:
    assert unpack("none", b"") == b""
    assert [len(piece) for piece in unpacker("none", limit=3 * PIECE).feed(b"x" * (PIECE + 1))] == [PIECE, 1]


def test_another_kind_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="'bz2' is none of none, zstd, xz, gz"):
        unpacker("bz2", limit=1)


@pytest.mark.parametrize("kind", PACKED)
def test_another_packing_is_damage(kind: str) -> None:
    for other in KINDS:
        if other != kind:
            with pytest.raises(ImageError, match=f"the {kind} data is damaged"):
                unpack(kind, PACK[other](b"content" * 10))


def test_windows_that_need_too_much_memory_are_refused() -> None:
    wide = {zstd.CompressionParameter.window_log: 28, zstd.CompressionParameter.content_size_flag: 0}
    packing = zstd.ZstdCompressor(options=wide)
    packed = packing.compress(bytes(MIB)) + packing.flush()
    with pytest.raises(ImageError, match="the zstd data is damaged"):
        unpack("zstd", packed)
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 256 * MIB, "mode": lzma.MODE_FAST, "mf": lzma.MF_HC3}]
    packed = lzma.compress(bytes(1000), filters=filters)
    with pytest.raises(ImageError, match="the xz data is damaged: Memory usage limit exceeded"):
        unpack("xz", packed)
