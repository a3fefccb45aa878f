"""Looks, after a session's end, whether anything that its journal names is still there.

The ledger says what was given back; this looks at the host itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kenaz_engine.journal.reader import read_journal
from kenaz_engine.session.resources import is_same


def leftovers(journal: Path) -> list[str]:
    """What is still there of all that the journal's session has acquired, in words; empty for nothing."""
    records = read_journal(journal).records
    found = [_left(r) for r in records if r["kind"] == "acquired" and r["type"] != "image-reference"]
    return [text for text in found if text]


def _left(record: Mapping[str, Any]) -> str:
    handle = record["handle"]
    if "inode" in handle and is_same(handle):
        return f"the {record['resource']} {handle['path']}"
    if "pid" in handle and _runs(handle):
        return f"the {record['resource']}, process {handle['pid']}"
    return ""


def _runs(handle: Mapping[str, Any]) -> bool:
    """True while the process of that pid and start time is there (Linux; elsewhere its end was awaited)."""
    try:
        status = Path(f"/proc/{handle['pid']}/stat").read_text("ascii", "replace")
    except OSError:
        return False
    return status.rsplit(")", 1)[1].split()[19] == str(handle.get("start_time"))
