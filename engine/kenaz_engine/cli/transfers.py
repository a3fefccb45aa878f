"""How the fetch of an image is shown: a line that moves on a terminal, now and then a line elsewhere,
JSON."""

from __future__ import annotations

import time
from typing import Any, TextIO

from kenaz_engine.cli.output import columns, cut, plain
from kenaz_engine.images.transfer import Notice, Progress

_MIB = 1 << 20
_REDRAW = 0.1
_EVENT = 0.5
_LINE = 10.0


def in_words(progress: Progress) -> str:
    """`root.ext4  40% of 120.0 MiB, 12.3 MiB/s, 6 s left`."""
    share = progress.done / progress.total if progress.total else 1.0
    words = [f"{plain(progress.file)} {share:4.0%} of {progress.total / _MIB:.1f} MiB"]
    if progress.waiting:
        words.append("another launcher fetches it")
    if progress.rate:
        words.append(f"{progress.rate / _MIB:.1f} MiB/s")
    if progress.remaining and progress.remaining >= 1:
        words.append(f"{progress.remaining:.0f} s left")
    return ", ".join(words)


def as_data(progress: Progress) -> dict[str, Any]:
    """As JSON: sizes in bytes, `rate` in bytes a second, `remaining` in seconds."""
    return {
        "kind": "progress",
        "file": progress.file,
        "done": progress.done,
        "total": progress.total,
        "rate": round(progress.rate),
        "remaining": None if progress.remaining is None else round(progress.remaining, 1),
        "waiting": progress.waiting,
    }


class Pace:
    """Which of the many reports are shown: the last of a file, and else one in so many seconds; as lines,
    those of each quarter, too."""

    def __init__(self, seconds: float, *, quarters: bool = False) -> None:
        self._seconds = seconds
        self._quarters = quarters
        self._quarter = ("", 0)
        self._shown = -1e9

    def due(self, progress: Progress, now: float) -> bool:
        """Whether to show it; `now` in seconds, of any clock."""
        share = progress.done / progress.total if progress.total else 1.0
        quarter = (progress.file, int(share * 4))
        if quarter[0] != self._quarter[0] and self._quarters:
            self._quarter, self._shown = (quarter[0], 0), now
        changed = quarter != self._quarter
        self._quarter = quarter
        if (changed and (self._quarters or share >= 1)) or now - self._shown >= self._seconds:
            self._shown = now
            return True
        return False


def events() -> Pace:
    """The pace of JSON lines."""
    return Pace(_EVENT)


def lines() -> Pace:
    """The pace where no line can be drawn again."""
    return Pace(_LINE, quarters=True)


class Bar:
    """How a fetch goes, on a stream for people."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._terminal = out.isatty()
        self._pace = Pace(_REDRAW) if self._terminal else lines()
        self._open = False

    def watch(self, seen: Progress | Notice) -> None:
        """Shows it, if it is time."""
        if isinstance(seen, Notice):
            self.close()
            self._write(plain(seen.text) + "\n")
        elif self._pace.due(seen, time.monotonic()):
            if self._terminal:
                self._open = seen.done < seen.total
                end = "" if self._open else "\n"
                self._write(f"\r\x1b[K{cut(in_words(seen), columns())}{end}")
            else:
                self._write(in_words(seen) + "\n")

    def close(self) -> None:
        """Ends an unfinished line, so that what is said next has its own."""
        if self._open:
            self._open = False
            self._write("\n")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
