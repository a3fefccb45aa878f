"""What a person is shown of a session that did not go well."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from kenaz_engine.cli.live import GUEST_LINES, Live
from kenaz_engine.session.launch import Result
from kenaz_engine.session.runner import Outcome


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def result(**outcome: Any) -> Result:
    whole: dict[str, Any] = {
        "state": "failed",
        "success": False,
        "verdict": "",
        "also": (),
        "warnings": (),
        "left": (),
        "internal": "",
        "seconds": 1.0,
    }
    return Result(Outcome(**{**whole, **outcome}), Path("/s/s1"), ("last \x1b[2Jwords",), ())


def test_a_failure_is_told_with_all_that_is_known() -> None:
    out = io.StringIO()
    live = Live(out)
    live.record({"kind": "event", "type": "error", "data": {"hint": "mend it"}, "t": 0.0})
    live.record({"kind": "decision", "verdict": "it broke", "warnings": ["odd"], "t": 0.0})
    live.record({"kind": "end"})
    live.finish(result(verdict="it broke", internal="a defect"), 1, ["the disk /d"])
    assert out.getvalue().splitlines() == [
        "    ! it broke",
        "    ! odd",
        "  the guest's last words:",
        "    | last \\x1b[2Jwords",
        "failed: it broke, 1.00 s in all",
        "  what to do: mend it",
        "  a defect",
        "  its record is incomplete: the end of the journal is missing",
        "  journal /s/s1/journal.jsonl",
        "  left behind: the disk /d",
    ]


def test_a_guest_that_repeats_itself_does_not_fill_the_terminal() -> None:
    out = io.StringIO()
    live = Live(out)
    for _ in range(3 * GUEST_LINES):
        live.record({"kind": "channel", "name": "fs.delete", "outcome": "denied", "t": 0.0})
        live.say("hello")
    shown = out.getvalue().splitlines()
    assert len(shown) == GUEST_LINES
    assert shown[-1] == "    (what more the guest does is in the journal only)"


def test_a_success_that_left_something_is_a_failure() -> None:
    out = io.StringIO()
    Live(out).finish(result(success=True), 1, ["the disk /d"])
    assert out.getvalue().startswith("failed: something was left behind, 1.00 s in all\n")


async def test_on_a_terminal_the_time_moves(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    live = Live(out)
    live.record({"kind": "entered", "state": "booting", "t": 0.0})
    with trio.move_on_after(0.35):
        await live.tick()
    assert out.getvalue().count("\r\x1b[K  booting ") == 4
    live.record({"kind": "end", "t": 2.0})
    assert out.getvalue().endswith("\r\x1b[K  booting         2.00 s\n")
