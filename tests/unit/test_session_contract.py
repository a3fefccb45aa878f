"""The points of the guest contract, as the records of a session show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kenaz_engine.journal.reader import read_journal
from kenaz_engine.session.contract import POINTS, points

REFERENCE = Path(__file__).parents[2] / "docs/reference/guest-contract.md"
CLOCK = {"init": 1.0, "login": 2.0, "agent": 3.0, "hello": 4.0}
RECORDS: list[dict[str, Any]] = [
    {"kind": "note", "about": "hello", "build": "b", "clock": CLOCK},
    {"kind": "acquired", "resource": "channel"},
    {"kind": "channel", "direction": "from-harness", "message": "prompt.result"},
    {"kind": "channel", "direction": "to-guest", "message": "drain"},
    {"kind": "channel", "direction": "from-guest", "message": "bye"},
    {"kind": "entered", "state": "stopping"},
    {"kind": "event", "type": "vm.exited", "data": {"clean": True, "message": "it powered off"}},
    {"kind": "end"},
]


def holds(records: list[dict[str, Any]], build: str = "b") -> list[bool | None]:
    return [point.holds for point in points(records, build)]


def test_a_session_that_goes_well_shows_every_point() -> None:
    assert holds(RECORDS) == [True] * 8
    assert points(RECORDS, "b")[4].seen == "init 1.0 s, login 2.0 s, agent 3.0 s, hello 4.0 s"


@pytest.mark.parametrize(
    ("gone", "number"), [(1, 3), (2, 6), (4, 7), (6, 8)], ids=["channel", "answer", "bye", "power-off"]
)
def test_what_is_missing_is_the_point_that_fails(gone: int, number: int) -> None:
    assert holds(RECORDS[:gone] + RECORDS[gone + 1 :])[number - 1] is False


def test_a_wrong_build_and_a_clock_that_is_not_told_fail() -> None:
    hello = {"kind": "note", "about": "hello", "build": "a", "clock": {}}
    found = points([hello, *RECORDS[1:]], "b")
    assert [point.number for point in found if not point.holds] == [4, 5]
    assert found[3].seen == "it says `a`"


def test_after_a_panic_or_without_a_dial_the_rest_is_not_seen() -> None:
    panic = {"kind": "event", "type": "guest.panic", "data": {"message": "Kernel panic"}}
    assert holds([panic, {"kind": "end", "verdict": "guest panicked"}]) == [False] + [None] * 7
    silent = points([{"kind": "end", "verdict": "guest did not dial in time"}], "b")
    assert [point.holds for point in silent] == [False, False] + [None] * 6
    assert silent[1].seen == "guest did not dial in time"


@pytest.mark.parametrize("name", ["qemu-hello"])
def test_a_recorded_session_is_read(name: str) -> None:
    records = read_journal(Path(__file__).parents[1] / f"journals/{name}.journal.jsonl").records
    assert all(holds(list(records), "2026.11"))


def test_the_reference_has_the_same_points_by_number() -> None:
    rows = [line.split("|")[1:3] for line in REFERENCE.read_text().splitlines() if line.startswith("| ")]
    told = {int(number): text.strip() for number, text in rows if number.strip().isdecimal()}
    assert {n: text[3:].rstrip(".") for n, text in told.items()} == dict(enumerate(POINTS, 1))
