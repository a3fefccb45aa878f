"""Looks, after a session's end, whether anything that it held is still there.

The ledger says what could not be given back; of what it says was, this looks at the host itself: at files,
sockets and processes. A machine that is a manager's (libvirt, Hyper-V) was ended by that manager's own word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kenaz_drivers.host import is_alive
from kenaz_engine.journal.reader import read_journal
from kenaz_engine.journal.records import Damaged
from kenaz_engine.session.ledger import Left
from kenaz_engine.session.resources import is_same


def leftovers(journal: Path, left: Iterable[Left] = ()) -> list[str]:
    """What is still there of all that the journal's session has acquired, in words; empty for nothing.

    `left` is what the ledger still holds. A journal that cannot be read is told, for it hides what it names.
    """
    held = {entry.id: f"the {entry.resource}: {entry.error}" for entry in left}
    try:
        records = read_journal(journal).records
    except (OSError, Damaged) as exc:
        return [*held.values(), f"perhaps more, for the journal cannot be read: {exc}"]
    acquired = [r for r in records if r["kind"] == "acquired" and r["id"] not in held]
    found = [_left(r) for r in acquired if r["type"] != "image-reference"]
    return [*held.values(), *(text for text in found if text)]


def _left(record: Mapping[str, Any]) -> str:
    handle = record["handle"]
    there = record["type"] == "planned-file" and Path(handle["path"]).exists()
    if there or ("inode" in handle and is_same(handle)):
        return f"the {record['resource']} {handle['path']}"
    if "pid" in handle and is_alive(handle):
        return f"the {record['resource']}, process {handle['pid']}"
    return ""
