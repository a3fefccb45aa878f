"""Unpacking gives back what was packed, however it comes, and never takes damage for content."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import lzma
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kenaz_engine.images.errors import ImageError
from kenaz_engine.images.unpack import unpacker

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def packed_by_zstd(content: bytes) -> bytes:
    return zstd.compress(content, options={zstd.CompressionParameter.checksum_flag: 1})


PACK: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "zstd": packed_by_zstd,
    "xz": lambda content: lzma.compress(content, preset=0),
    "gz": lambda content: gzip.compress(content, mtime=0),
}
LIMIT = 1 << 22

kinds = st.sampled_from(sorted(PACK))
contents = st.binary(max_size=300) | st.builds(
    lambda word, times: word * times, st.binary(min_size=1, max_size=40), st.integers(0, 50_000)
)
cuts = st.lists(st.integers(0, 1 << 20), max_size=8)


def unpack(kind: str, packed: bytes, at: list[int]) -> bytes:
    unpacking = unpacker(kind, limit=LIMIT)
    places = sorted({0, len(packed), *(place for place in at if place < len(packed))})
    content = bytearray()
    for start, end in itertools.pairwise(places):
        for piece in unpacking.feed(packed[start:end]):
            content += piece
    unpacking.finish()
    return bytes(content)


@given(kinds, st.lists(contents, min_size=1, max_size=3), cuts)
def test_it_gives_back_what_was_packed(kind: str, parts: list[bytes], at: list[int]) -> None:
    packed = b"".join(PACK[kind](part) for part in parts)
    assert unpack(kind, packed, at) == b"".join(parts)


@given(st.sampled_from(["zstd", "xz", "gz"]), contents, st.data())
def test_a_part_of_it_is_cut_short(kind: str, content: bytes, data: st.DataObject) -> None:
    packed = PACK[kind](content)
    end = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(ImageError, match="is cut short"):
        unpack(kind, packed[:end], [])


@given(st.sampled_from(["zstd", "xz", "gz"]), contents, st.data())
def test_damage_never_passes_for_content(kind: str, content: bytes, data: st.DataObject) -> None:
    """All three have checksums. Bits that say nothing of the content, as gzip's time stamp, may be any."""
    packed = bytearray(PACK[kind](content))
    place = data.draw(st.integers(0, len(packed) - 1))
    packed[place] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(ImageError):
        found = unpack(kind, bytes(packed), [])
        assert hashlib.sha256(found).digest() == hashlib.sha256(content).digest()


@given(kinds, st.binary(max_size=2000), cuts)
def test_anything_else_is_refused_or_content_of_bounded_size(kind: str, data: bytes, at: list[int]) -> None:
    with contextlib.suppress(ImageError):
        assert len(unpack(kind, data, at)) <= LIMIT
