from __future__ import annotations

import pytest

from kenaz_engine.spec.units import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("500ms", 0.5),
        ("1m30s", 90),
        ("30m", 1800),
        ("2h", 7200),
        ("1h1m1s1ms", 3661.001),
        ("0s", 0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "90", "s", "1.5s", "-1s", "30s1m", "1s1s", "1 s", "1S", "1d", "٣s", "9" * 10 + "s"]
)
def test_what_is_no_duration_is_told_how_to_write_one(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration; write it like 90s"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(90, "1m30s"), (0.5, "500ms"), (7200, "2h"), (0, "0s"), (0.0004, "0s"), (1e-3, "1ms")],
)
def test_durations_are_written_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "size"),
    [("256MiB", 256 << 20), ("2GiB", 2 << 30), ("512KiB", 512 << 10), ("1TiB", 1 << 40), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert format_size(size) == text


@pytest.mark.parametrize("text", ["256M", "256MB", "256mb", "256 MiB", "256m"])
def test_a_loose_size_is_told_how_to_write_it(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write `256MiB`"):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "MiB", "1.5GiB", "-1MiB", "1PiB", "1", "x" * 100])
def test_what_is_no_size_is_told_how_to_write_one(text: str) -> None:
    with pytest.raises(ValueError, match="write a whole number and a unit, like 256MiB or 2GiB") as caught:
        parse_size(text)
    assert len(str(caught.value)) < 150


def test_zero_bytes() -> None:
    assert format_size(0) == "0B"
    assert parse_size("0B") == 0
