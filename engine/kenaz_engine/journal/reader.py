"""Reads journals from files, whole ones and ones that are still being written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kenaz_engine.journal.records import decode_all


@dataclass(frozen=True, slots=True)
class Recording:
    """A journal as it was read. `torn` says that a last, half-written line was dropped."""

    path: Path
    records: list[dict[str, Any]]
    torn: bool

    @property
    def header(self) -> dict[str, Any] | None:
        """The first record; None in a journal whose launcher died before it was written."""
        return self.records[0] if self.records else None

    @property
    def end(self) -> dict[str, Any] | None:
        """The `end` record; None when the launcher has not ended, or died."""
        return next((r for r in reversed(self.records) if r["kind"] == "end"), None)

    @property
    def being_reaped(self) -> bool:
        """True when another process has begun to give back what was left, and has not written its `end`."""
        kinds = (r["kind"] for r in reversed(self.records))
        return next((kind == "reap" for kind in kinds if kind in ("reap", "end")), False)

    @property
    def state(self) -> str:
        """The state that was entered last, or that the last decision leads to; empty before the first."""
        kinds = ("decision", "entered")
        return next((r.get("state", "") for r in reversed(self.records) if r["kind"] in kinds), "")


def read_journal(path: Path) -> Recording:
    """Raises Damaged (with the line) and OSError."""
    records, torn = decode_all(path.read_bytes())
    return Recording(path, records, torn)
