"""Frames: the limits, the errors, and what they cost."""

import tracemalloc

import pytest

from kenaz_engine.channel.framing import HEADER, FramingError, LengthPrefixed


def test_a_frame_is_its_length_and_its_payload() -> None:
    assert LengthPrefixed().encode(b"{}") == b"\x00\x00\x00\x02{}"


def test_several_frames_in_one_read_come_in_order() -> None:
    framing = LengthPrefixed()
    data = b"".join(framing.encode(p) for p in (b"a", b"bb", b"ccc"))
    assert framing.feed(data + b"\x00\x00") == [b"a", b"bb", b"ccc"]
    assert framing.pending == 2
    assert framing.feed(b"\x00\x01d") == [b"d"]
    assert framing.pending == 0
    framing.close()


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (b"\x00\x00\x00\x00", "frame_empty"),
        (b"\x00\x00\x00\x09", "frame_too_large"),
        (b"\xff\xff\xff\xff", "frame_too_large"),
    ],
)
def test_a_bad_length_ends_the_stream_after_the_frames_before_it(header: bytes, code: str) -> None:
    framing = LengthPrefixed(8)
    assert framing.feed(framing.encode(b"good") + header + b"rest") == [b"good"]
    assert framing.error is not None
    assert framing.error.code == code
    assert framing.pending == 0
    assert framing.feed(framing.encode(b"late")) == []
    with pytest.raises(FramingError) as caught:
        framing.close()
    assert caught.value.code == code


def test_the_limit_itself_is_allowed() -> None:
    framing = LengthPrefixed(8)
    assert framing.feed(framing.encode(b"8 bytes!")) == [b"8 bytes!"]
    assert framing.error is None


@pytest.mark.parametrize(("payload", "code"), [(b"", "frame_empty"), (b"9 bytes!!", "frame_too_large")])
def test_encode_refuses_what_the_other_side_would(payload: bytes, code: str) -> None:
    with pytest.raises(FramingError) as caught:
        LengthPrefixed(8).encode(payload)
    assert caught.value.code == code


@pytest.mark.parametrize("cut", [1, 3, 4, 5])
def test_an_end_within_a_frame_is_an_error(cut: int) -> None:
    framing = LengthPrefixed()
    framing.feed(framing.encode(b"abc")[:cut])
    with pytest.raises(FramingError) as caught:
        framing.close()
    assert caught.value.code == "frame_cut"


def test_a_length_that_is_announced_costs_nothing_until_the_bytes_come() -> None:
    framing = LengthPrefixed()
    tracemalloc.start()
    try:
        framing.feed((4 * 1024 * 1024).to_bytes(HEADER, "big") + b"x" * 100)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000


def test_byte_by_byte_work_grows_with_the_bytes_only() -> None:
    """Counted, not timed: what the buffer holds never shrinks and grows again within one frame."""
    framing = LengthPrefixed()
    frame = framing.encode(b"x" * 20_000)
    held = []
    for byte in frame[:-1]:
        assert framing.feed(bytes([byte])) == []
        held.append(framing.pending)
    assert held == list(range(1, len(frame)))
    assert framing.feed(frame[-1:]) == [b"x" * 20_000]
