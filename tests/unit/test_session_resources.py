"""Giving back by handle and by intent, what is found to be left, and what a summary makes of a journal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kenaz_drivers._common.identity import identify
from kenaz_engine.journal.writer import Journal
from kenaz_engine.session.ledger import Left
from kenaz_engine.session.leftovers import leftovers
from kenaz_engine.session.resources import (
    BY_HANDLE,
    BY_INTENT,
    file_handle,
    is_same,
    made_directory,
    made_file,
)
from kenaz_engine.session.summary import Phase, phases, states


async def test_a_file_is_given_back_unless_another_has_its_name(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_text("mine")
    made = made_file(path)
    os.link(path, tmp_path / "keeps the inode in use")
    path.unlink()
    path.write_text("theirs")
    assert not is_same(made.handle)
    await made.release()
    assert path.read_text() == "theirs"
    made = made_file(path)
    await made.release()
    await made.release()
    assert not path.exists()


async def test_a_directory_is_given_back_with_all_that_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "root"
    (path / "inner").mkdir(parents=True)
    made = made_directory(path)
    await made.release()
    await made.release()
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        file_handle(path)


@pytest.mark.parametrize("kind", ["file", "socket", "directory", "stream", "cid", "image-reference"])
async def test_every_kind_can_be_given_back_by_intent_or_handle_alone_and_twice(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "thing"
    for ways in (BY_INTENT, BY_HANDLE):
        if kind == "directory":
            (path / "inner").mkdir(parents=True)
        else:
            path.touch()
        handle = file_handle(path)
        for _ in range(2):
            await ways[kind](handle)
        assert path.exists() == (kind not in ("file", "socket", "directory"))


@pytest.mark.parametrize("kind", ["file", "directory"])
async def test_by_its_handle_another_thing_of_that_path_is_not_given_back(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "thing"
    (path.mkdir if kind == "directory" else path.touch)()
    handle = file_handle(path)
    path.rename(tmp_path / "first")  # or its inode might be used again
    (path.mkdir if kind == "directory" else path.touch)()
    await BY_HANDLE[kind](handle)
    assert path.exists()


# What is left


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    journal = Journal(tmp_path / "journal.jsonl")
    yield journal
    journal.close()


def acquired(journal: Journal, number: int, resource: str, kind: str, handle: Any) -> None:
    fields = {"id": number, "resource": resource, "type": kind, "handle": handle}
    journal.append("acquired", fields)


def test_what_is_still_there_is_told(journal: Journal, tmp_path: Path) -> None:
    kept, gone = tmp_path / "kept", tmp_path / "gone"
    kept.touch()
    gone.touch()
    journal.append("header", {"format": 1})
    acquired(journal, 1, "disk", "file", file_handle(kept))
    acquired(journal, 2, "config", "file", file_handle(gone))
    acquired(journal, 3, "image", "image-reference", file_handle(kept))
    acquired(journal, 4, "channel", "stream", {"peer": "pid 1"})
    acquired(journal, 5, "socket", "socket", file_handle(kept))
    gone.unlink()
    assert leftovers(journal.path) == [f"the disk {kept}", f"the socket {kept}"]
    left = [Left(5, "socket", "socket", "took longer than 5 s")]
    assert leftovers(journal.path, left) == ["the socket: took longer than 5 s", f"the disk {kept}"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_a_process_is_known_by_its_start_time(journal: Journal) -> None:
    journal.append("header", {"format": 1})
    acquired(journal, 1, "vm", "machine", identify(os.getpid()))
    acquired(journal, 2, "old", "machine", {**identify(os.getpid()), "start_time": "1"})
    acquired(journal, 3, "dead", "machine", {"pid": 2**22 + 1, "start_time": "1"})
    assert leftovers(journal.path) == [f"the vm, process {os.getpid()}"]


def test_a_journal_that_cannot_be_read_hides_what_is_left(tmp_path: Path) -> None:
    [line] = leftovers(tmp_path / "none.jsonl")
    assert line.startswith("perhaps more, for the journal cannot be read: ")
    (tmp_path / "bad.jsonl").write_text("no journal\n")
    [held, more] = leftovers(tmp_path / "bad.jsonl", [Left(1, "vm", "machine", "is stuck")])
    assert held == "the vm: is stuck"
    assert more.startswith("perhaps more")


# The summary

MADE = {"kind": "acquired", "resource": "vm", "t": 1.0}
HELLO: dict[str, Any] = {"kind": "note", "about": "hello", "t": 5.0}
OPENED = {"kind": "acquired", "resource": "channel", "t": 5.5}


def test_the_way_to_the_channel_is_split_as_far_as_the_guest_told() -> None:
    clock = {"init": 2.0, "agent": 2.5, "hello": 3.0}
    assert phases([MADE, {**HELLO, "clock": clock}, OPENED]) == [
        Phase("host set-up", 1.0),
        Phase("hypervisor", 1.0),
        Phase("kernel", 2.0),
        Phase("user land", 1.0),
        Phase("handshake", 0.5),
    ]
    clock = {"init": 1.0, "login": 2.0, "agent": 2.5, "hello": 3.0}
    assert phases([MADE, {**HELLO, "clock": clock}, OPENED])[2:-1] == [
        Phase("kernel", 1.0),
        Phase("user land", 1.0),
        Phase("desktop", 0.5),
        Phase("workbench", 0.5),
    ]
    assert phases([MADE, HELLO, OPENED]) == [
        Phase("host set-up", 1.0),
        Phase("guest", 4.0),
        Phase("handshake", 0.5),
    ]


@pytest.mark.parametrize("missing", range(3))
def test_a_session_whose_channel_never_opened_has_no_such_way(missing: int) -> None:
    records = [MADE, HELLO, OPENED]
    del records[missing]
    assert phases(records) == []


def test_states_last_until_the_next_or_the_end() -> None:
    entered = [{"kind": "entered", "state": name, "t": t} for name, t in (("a", 0.0), ("b", 2.0))]
    assert states(entered) == [Phase("a", 2.0)]
    assert states([*entered, {"kind": "end", "t": 5.0}]) == [Phase("a", 2.0), Phase("b", 3.0)]
    assert states([]) == []
