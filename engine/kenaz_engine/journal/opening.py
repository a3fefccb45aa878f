"""Opens journals to be written: those of real sessions, or for tests such as kill their process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kenaz_engine.journal.writer import KILL, Journal


def open_journal(path: Path) -> Journal:
    """A new journal. Raises OSError."""
    return _kind()(path)


def resume_journal(path: Path) -> tuple[Journal, list[dict[str, Any]]]:
    """As `Journal.resume`."""
    return _kind().resume(path)


def _kind() -> type[Journal]:
    if KILL not in os.environ:
        return Journal
    from kenaz_engine.journal.mortal import MortalJournal

    return MortalJournal
