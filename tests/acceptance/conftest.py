"""What all acceptance tests share: every journal that they leave replays exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kenaz_engine.journal.reader import read_journal
from kenaz_engine.replay.replayer import replay


@pytest.fixture(autouse=True)
def every_journal_replays(tmp_path: Path) -> Iterator[None]:
    """Of sessions that ended in whatever way, or did not."""
    yield
    for path in tmp_path.rglob("journal.jsonl"):
        result = replay(read_journal(path))
        assert result.ok, str(result)
