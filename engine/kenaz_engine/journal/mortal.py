"""For tests: a journal at one of whose records the process dies, as it would by `kill -9`.

`KENAZ_TEST_KILL=before:N` kills before the record with `seq` N is written, `torn:N` when half of its line is,
`after:N` when it is written and, where it is durable, on the disk. With the word `end` for N it is the last
record, whose number is not the same in all sessions. Without that variable nothing of this is imported.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from kenaz_engine.journal.writer import KILL, Journal

WHERE = ("before", "torn", "after")


class MortalJournal(Journal):
    """A journal that kills. Raises ValueError when the variable cannot be read."""

    def append(self, kind: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Writes one record, or dies about it."""
        where, which = _asked()
        dies = which in (str(self._seq), kind)
        if dies and where == "before":
            _die()
        self._torn = dies and where == "torn"
        record = super().append(kind, fields)
        if dies and where == "after":
            _die()
        return record

    def _write(self, line: bytes) -> None:
        if self._torn:
            super()._write(line[: len(line) // 2])
            _die()
        super()._write(line)


def _asked() -> tuple[str, str]:
    where, _, which = os.environ[KILL].partition(":")
    if where not in WHERE or not (which.isdecimal() or which == "end"):
        raise ValueError(f"{KILL} must be one of {', '.join(f'{word}:N' for word in WHERE)}; N may be `end`")
    return where, which


def _die() -> NoReturn:
    if sys.platform == "win32":
        os._exit(9)
    else:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("nobody survives that")
