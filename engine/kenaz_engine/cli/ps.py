"""`kenaz-launcher ps`: the sessions of this user."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from typing import Any

from kenaz_engine.cli.failures import SUCCESS
from kenaz_engine.cli.output import Paint, ago, columns, plain, print_json, table
from kenaz_engine.session.directory import Seen, all_sessions

_HEADINGS = ("ID", "STATUS", "STATE", "DRIVER", "AGE", "JOURNAL")
_STYLES = {"running": "green", "reaping": "yellow", "dead": "red", "damaged": "red"}
_SHOWN = {"dead": "dead, to be reaped"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Which sessions, and the form of the list."""
    parser.add_argument("--all", "-a", action="store_true", help="also those that have ended")
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Lists sessions; what is shown of one follows from its lock and its journal."""
    seen = [session for session in all_sessions() if arguments.all or session.status != "ended"]
    now = time.time()
    if arguments.json:
        print_json([session_data(session, now) for session in seen])
        return SUCCESS
    paint = Paint(sys.stdout)
    lines = table([_HEADINGS, *(_row(session, now) for session in seen)], width=columns())
    print(paint(lines[0], "bold"))
    for session, line in zip(seen, lines[1:], strict=True):
        style = _STYLES.get(session.status)
        print(line.replace(session.status, paint(session.status, style), 1) if style else line)
    return SUCCESS


def _row(session: Seen, now: float) -> tuple[str, ...]:
    data = session_data(session, now)
    age = "-" if data["age"] is None else ago(data["age"])
    status = _SHOWN.get(session.status, session.status)
    cells = (data["id"], status, data["state"] or "-", data["driver"] or "-", age, data["journal"])
    return tuple(plain(str(cell)) for cell in cells)


def session_data(session: Seen, now: float) -> dict[str, Any]:
    """A session as JSON. What its journal does not tell is null."""
    recording = session.recording
    header = (recording.header if recording else None) or {}
    end = (recording.end if recording else None) or {}
    wall = header.get("wall")
    started = float(wall) if isinstance(wall, int | float) else None
    return {
        "id": session.id,
        "status": session.status,
        "state": session.state or None,
        "driver": header.get("driver"),
        "started": None if started is None else _utc(started),
        "age": None if started is None else round(max(0.0, now - started), 3),
        "success": end.get("success"),
        "journal": str(session.path / "journal.jsonl"),
    }


def _utc(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
