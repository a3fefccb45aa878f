"""Durations and sizes as people write them: `1m30s`, `256MiB`."""

from __future__ import annotations

import re

_MILLISECONDS = {"h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}
_DURATION = re.compile(r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?(?:(\d{1,9})ms)?", re.ASCII)

_BYTES = {"TiB": 1 << 40, "GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "B": 1}
_SIZE = re.compile(r"(\d{1,15})(TiB|GiB|MiB|KiB|B)", re.ASCII)
_LOOSE_SIZE = re.compile(r"(\d{1,15})\s*([tgmk])(?:i?b)?", re.ASCII | re.IGNORECASE)


def parse_duration(text: str) -> float:
    """Seconds in `90s`, `500ms`, `1m30s`, `2h`: whole numbers, each unit once, the largest first.

    Raises ValueError, with a message that says how to write it.
    """
    match = _DURATION.fullmatch(text)
    if not match or not text:
        raise ValueError(f"{_shown(text)} is not a duration; write it like 90s, 500ms, 1m30s or 2h")
    counts = zip(match.groups(), _MILLISECONDS.values(), strict=True)
    return sum(int(count) * unit for count, unit in counts if count) / 1000


def format_duration(seconds: float) -> str:
    """The shortest text that `parse_duration` reads as that time, to the nearest millisecond."""
    rest = round(seconds * 1000)
    parts = []
    for unit, milliseconds in _MILLISECONDS.items():
        count, rest = divmod(rest, milliseconds)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def parse_size(text: str) -> int:
    """Bytes in `512KiB`, `256MiB`, `2GiB`: a whole number and a binary unit.

    Raises ValueError, with a message that says how to write it.
    """
    match = _SIZE.fullmatch(text)
    if match:
        return int(match[1]) * _BYTES[match[2]]
    loose = _LOOSE_SIZE.fullmatch(text.strip())
    if loose:
        raise ValueError(f"{_shown(text)} is not a size; write `{loose[1]}{loose[2].upper()}iB`")
    raise ValueError(f"{_shown(text)} is not a size; write a whole number and a unit, like 256MiB or 2GiB")


def format_size(size: int) -> str:
    """The text that `parse_size` reads as that many bytes, in the largest unit that fits exactly."""
    unit = next(unit for unit, each in _BYTES.items() if size % each == 0 and (size or unit == "B"))
    return f"{size // _BYTES[unit]}{unit}"


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
