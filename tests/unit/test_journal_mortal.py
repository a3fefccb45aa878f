"""The journal at one of whose records a test has the process killed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kenaz_engine.journal import mortal
from kenaz_engine.journal.mortal import MortalJournal
from kenaz_engine.journal.opening import open_journal, resume_journal
from kenaz_engine.journal.reader import read_journal
from kenaz_engine.journal.records import FORMAT, Damaged
from kenaz_engine.journal.writer import KILL, Journal


class KilledHere(BaseException):
    """Instead of the end of the test."""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def kill(pid: int, number: int) -> None:
        assert (pid, number) == (os.getpid(), mortal.signal.SIGKILL)
        raise KilledHere

    monkeypatch.setattr(mortal.os, "kill", kill)
    return tmp_path / "journal.jsonl"


def test_without_the_variable_it_is_the_ordinary_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KILL, raising=False)
    journal = open_journal(path)
    assert type(journal) is Journal
    journal.close()


@pytest.mark.parametrize(
    ("where", "records", "torn"), [("before", 1, False), ("torn", 1, True), ("after", 2, False)]
)
def test_it_dies_where_it_was_asked_to(
    path: Path, monkeypatch: pytest.MonkeyPatch, where: str, records: int, torn: bool
) -> None:
    monkeypatch.setenv(KILL, f"{where}:1")
    journal = open_journal(path)
    journal.append("header", {"format": FORMAT})
    with pytest.raises(KilledHere):
        journal.append("note", {"about": "x"})
    journal.close()
    found = read_journal(path)
    assert (len(found.records), found.torn) == (records, torn)
    monkeypatch.setenv(KILL, f"{where}:end")
    again, before = resume_journal(path)
    assert (type(again), len(before)) == (MortalJournal, records)
    for number in range(records, 2):
        again.append("note", {"about": str(number)})
    with pytest.raises(KilledHere):
        again.append("end", {})
    again.close()


@pytest.mark.parametrize("asked", ["", "before", "after:x", "never:3", "after:-1"])
def test_what_cannot_be_read_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv(KILL, asked)
    journal = open_journal(path)
    with pytest.raises(ValueError, match="KENAZ_TEST_KILL must be one of before:N, torn:N, after:N"):
        journal.append("header", {})
    journal.close()


def test_a_journal_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "j"
    first = Journal(path, monotonic=iter([5.0, 5.0, 7.0]).__next__, wall=iter([100.0, 102.0]).__next__)
    first.append("header", {"format": FORMAT})
    first.append("note", {"about": "x"})
    first.close()
    with path.open("ab") as file:
        file.write(b'{"seq":2')
    # Another boot: its monotonic clock is another. Six seconds have passed by the wall clock.
    second, records = Journal.resume(
        path, monotonic=iter([1.0, 1.5]).__next__, wall=iter([108.0, 108.5]).__next__
    )
    assert [r["t"] for r in records] == [0.0, 2.0]
    second.append("reap", {})
    second.close()
    found = read_journal(path)
    assert not found.torn
    assert [(r["seq"], r["t"], r["wall"]) for r in found.records] == [
        (0, 0.0, 100.0),
        (1, 2.0, 102.0),
        (2, 8.5, 108.5),
    ]
    # A clock that was set back does not turn time back.
    third, _ = Journal.resume(path, monotonic=iter([0.0, 0.25]).__next__, wall=iter([3.0, 3.0]).__next__)
    assert third.append("end", {})["t"] == 8.75
    third.close()


def test_a_damaged_journal_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(b"zork\nzo")
    with pytest.raises(Damaged):
        Journal.resume(path)
    assert path.read_bytes() == b"zork\nzo"


def test_an_empty_journal_is_begun(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(b'{"seq":0')
    journal, records = Journal.resume(path)
    assert records == []
    journal.append("header", {"format": FORMAT})
    journal.close()
    assert len(read_journal(path).records) == 1
