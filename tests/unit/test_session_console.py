"""The guest's console: bounded, watched, and safe to show."""

from __future__ import annotations

from pathlib import Path

import pytest

from kenaz_engine.session import console
from kenaz_engine.session.console import Console, printable


@pytest.fixture
def seen() -> list[tuple[str, str]]:
    return []


def make(path: Path, seen: list[tuple[str, str]], *patterns: tuple[str, str]) -> Console:
    return Console(path / "console.log", patterns, lambda name, line: seen.append((name, line)))


def test_a_flood_is_kept_by_its_ends(tmp_path: Path, seen: list[tuple[str, str]]) -> None:
    kept = make(tmp_path, seen)
    for number in range(40):
        kept.feed(b"%06d\n" % number * 10_000)
    kept.close()
    kept.close()
    written = (tmp_path / "console.log").read_bytes()
    assert len(written) <= console.HEAD_BYTES + console.TAIL_BYTES + 64
    assert b"bytes dropped ...]" in written
    assert written.startswith(b"000000\n")
    assert written.endswith(b"000039\n")
    assert kept.tail(2) == ["000039", "000039"]


def test_each_name_is_called_once_for_its_first_line(tmp_path: Path, seen: list[tuple[str, str]]) -> None:
    watched = make(tmp_path, seen, ("guest.panic", "panic: .*"), ("firmware.shell", "^grub>"))
    watched.feed(b"all well\npan")
    assert seen == []
    watched.feed(b"ic: first\npanic: second\n")
    watched.feed(b"grub> ")
    watched.pause()
    watched.close()
    assert seen == [("guest.panic", "panic: first"), ("firmware.shell", "grub>")]


def test_a_line_counts_when_it_has_ended(tmp_path: Path, seen: list[tuple[str, str]]) -> None:
    watched = make(tmp_path, seen, ("guest.panic", "Kernel panic - not syncing: .*"))
    assert not watched.unfinished
    watched.feed(b"Kernel panic - not syncing: sysrq triggered cras")
    assert watched.unfinished
    assert seen == []
    watched.feed(b"h\r\n")
    assert not watched.unfinished
    assert seen == [("guest.panic", "Kernel panic - not syncing: sysrq triggered crash")]
    watched.pause()
    watched.close()
    assert len(seen) == 1


def test_a_line_that_has_counted_at_a_pause_begins_anew(tmp_path: Path, seen: list[tuple[str, str]]) -> None:
    watched = make(tmp_path, seen, ("firmware.shell", "^grub>"), ("guest.panic", "^ls"))
    watched.feed(b"grub>")
    watched.pause()
    watched.feed(b"ls\n")
    watched.close()
    assert seen == [("firmware.shell", "grub>"), ("guest.panic", "ls")]


def test_all_of_a_long_line_is_looked_at(tmp_path: Path, seen: list[tuple[str, str]]) -> None:
    watched = make(tmp_path, seen, ("guest.panic", "panic"))
    watched.feed(b"x" * console.LINE_BYTES + b" panic\n")
    watched.close()
    assert seen == [("guest.panic", "panic")]


def test_an_endless_line_costs_bounded_memory(tmp_path: Path, seen: list[tuple[str, str]]) -> None:
    watched = make(tmp_path, seen, ("guest.panic", "panic"))
    for _ in range(20):
        watched.feed(b"x" * console.LINE_BYTES)
    assert len(watched._line) <= console.LINE_BYTES
    watched.close()


def test_a_full_disk_does_not_end_the_session(tmp_path: Path, seen: list[tuple[str, str]]) -> None:
    full = Console(Path("/dev/full"), (), lambda name, line: None)
    full.feed(b"lost\n")
    assert full.tail(1) == ["lost"]
    full.close()


def test_a_line_cannot_steer_the_terminal() -> None:
    assert printable(b"\x1b[31mred\x1b[0m\x07 \xff\r") == "red \N{REPLACEMENT CHARACTER}"
    assert printable("a\tb\u202ec\x9b31m".encode()) == "a       b\\u202ec\\x9b31m"
