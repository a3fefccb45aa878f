"""Journals in files: how they are made, what is durable, and what a reader sees."""

from __future__ import annotations

import errno
import itertools
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from kenaz_engine.journal.reader import Recording, read_journal
from kenaz_engine.journal.records import DURABLE, FORMAT, KINDS, Damaged
from kenaz_engine.journal.writer import Journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def clocks() -> dict[str, Any]:
    return {"monotonic": itertools.count(100, 0.25).__next__, "wall": itertools.count(1.7e9).__next__}


def test_what_is_written_is_read(path: Path) -> None:
    journal = Journal(path, **clocks())
    header = journal.append("header", {"format": FORMAT, "session": "x"})
    journal.append("decision", {"state": "b"})
    journal.append("end", {"left": []})
    journal.close()
    journal.close()
    recording = read_journal(path)
    assert recording.path == path
    assert [(r["seq"], r["t"], r["wall"], r["kind"]) for r in recording.records] == [
        (0, 0.25, 1.7e9, "header"),
        (1, 0.5, 1.7e9 + 1, "decision"),
        (2, 0.75, 1.7e9 + 2, "end"),
    ]
    assert not recording.torn
    assert recording.header is not None
    assert recording.header["session"] == header["session"] == "x"
    assert recording.end == recording.records[-1]


def test_a_journal_is_its_owners_alone(path: Path) -> None:
    Journal(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_journal_is_never_written_over(path: Path) -> None:
    path.write_bytes(b"something")
    with pytest.raises(FileExistsError):
        Journal(path)
    assert path.read_bytes() == b"something"


def test_what_others_may_have_to_act_on_is_durable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path)
    synced: list[str] = []
    kind = ""
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(kind))
    for kind in sorted(KINDS):
        journal.append(kind, {})
    journal.close()
    assert set(synced) == DURABLE == {"header", "intent", "acquired", "released", "end", "reap"}


def test_a_short_write_is_finished(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path)
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    journal.append("header", {"format": FORMAT})
    journal.close()
    assert len(read_journal(path).records) == 1


def test_a_full_disk_is_told_and_leaves_a_torn_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path)
    journal.append("header", {"format": FORMAT})
    write = os.write

    def full(file: int, data: bytes) -> int:
        monkeypatch.setattr(os, "write", refuse)
        return write(file, data[:7])

    def refuse(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        journal.append("note", {"about": "x"})
    monkeypatch.undo()
    journal.close()
    recording = read_journal(path)
    assert (len(recording.records), recording.torn) == (1, True)


def test_what_cannot_be_encoded_leaves_the_journal_whole(path: Path) -> None:
    journal = Journal(path)
    journal.append("header", {"format": FORMAT})
    with pytest.raises(TypeError):
        journal.append("note", {"about": object()})
    journal.append("note", {"about": "x"})
    journal.close()
    assert [r["seq"] for r in read_journal(path).records] == [0, 1]


def test_damage_is_told_with_its_line(path: Path) -> None:
    path.write_bytes(b"zork\n")
    with pytest.raises(Damaged, match="line 1: is not JSON"):
        read_journal(path)


def recording(*records: dict[str, Any]) -> Recording:
    return Recording(Path("x"), list(records), torn=False)


def test_the_state_is_that_of_the_last_decision_or_entry() -> None:
    """A session in its first state has had no decision yet."""
    header = {"kind": "header"}
    entered = {"kind": "entered", "state": "a"}
    decision = {"kind": "decision", "state": "b"}
    assert recording().state == ""
    assert recording(header).state == ""
    assert recording(header, entered).state == "a"
    assert recording(header, entered, decision, {"kind": "note"}).state == "b"


def test_a_journal_that_was_never_begun_has_neither_header_nor_end() -> None:
    assert recording().header is None
    assert recording().end is None
    assert recording({"kind": "header"}).end is None
