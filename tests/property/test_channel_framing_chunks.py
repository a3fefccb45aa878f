"""However the bytes are cut, the frames are the same."""

from collections.abc import Iterator
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kenaz_engine.channel.framing import HEADER, FramingError, LengthPrefixed

LIMIT = 40
payloads = st.lists(st.binary(min_size=1, max_size=LIMIT), max_size=12)


def chunks(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    edges = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    for start, end in pairwise(edges):
        yield data[start:end]


def decode(parts: Iterator[bytes]) -> tuple[list[bytes], str]:
    """All payloads, and the code with which the stream ended."""
    framing = LengthPrefixed(LIMIT)
    got: list[bytes] = []
    for part in parts:
        got += framing.feed(part)
        assert framing.pending <= LIMIT + HEADER
    try:
        framing.close()
    except FramingError as exc:
        return got, exc.code
    return got, ""


@given(payloads, st.lists(st.integers(0, 600)))
def test_any_chunking_gives_the_same_frames(sent: list[bytes], cuts: list[int]) -> None:
    framing = LengthPrefixed(LIMIT)
    data = b"".join(map(framing.encode, sent))
    assert decode(chunks(data, cuts)) == (sent, "")


@given(payloads, st.binary(max_size=60), st.lists(st.integers(0, 700)))
def test_rubbish_gives_the_same_frames_and_the_same_error_however_it_is_cut(
    sent: list[bytes], rubbish: bytes, cuts: list[int]
) -> None:
    framing = LengthPrefixed(LIMIT)
    data = b"".join(map(framing.encode, sent)) + rubbish
    whole = decode(iter([data]))
    assert decode(chunks(data, cuts)) == whole
    assert decode(bytes([byte]) for byte in data) == whole
    assert whole[0][: len(sent)] == sent
