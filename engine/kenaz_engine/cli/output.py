"""What commands print: colours and widths that fit where it goes, and JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, Protocol

_CODES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33}


class Stream(Protocol):
    """What can tell whether it is a terminal."""

    def isatty(self) -> bool:
        """Whether it is."""
        ...


class Paint:
    """Colours for one stream: on a terminal, and not where NO_COLOR is set or the terminal is dumb."""

    def __init__(self, stream: Stream) -> None:
        wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.on = wanted and stream.isatty()

    def __call__(self, text: str, style: str) -> str:
        """`text` in one of the styles bold, dim, red, green, yellow; as it is where there are no colours."""
        return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if self.on and text else text


def columns() -> int | None:
    """The width of the terminal that stdout is; None where it is none, so that nothing need be cut."""
    import shutil

    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def plain(text: str) -> str:
    """Text of others (a guest, a file) on one line, with what could steer a terminal spelled out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


def print_json(data: Any) -> None:
    """One document of indented JSON."""
    print(json.dumps(data, indent=2))


def table(rows: Sequence[Sequence[str]], *, width: int | None = None, indent: str = "") -> list[str]:
    """Rows in aligned columns; a line longer than `width` is cut, and shows that it was."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(size) for cell, size in zip(row, widths, strict=True)]
        lines.append(cut(f"{indent}{'  '.join(cells).rstrip()}", width))
    return lines


def cut(line: str, width: int | None) -> str:
    """The line, in at most `width` characters."""
    return line if width is None or len(line) <= width else f"{line[: max(0, width - 3)]}..."


def ago(seconds: float) -> str:
    """A time span in its two largest units, as tables show it: `42s`, `3m10s`, `5h2m`, `12d3h`."""
    rest = max(0, int(seconds))
    units = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    parts: list[str] = []
    for unit, size in units:
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append(f"{count}{unit}")
    return "".join(parts[:2]) or "0s"
