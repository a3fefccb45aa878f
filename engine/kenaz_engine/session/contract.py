"""What an image must do to be launched, point by point, and which of it a session has shown.

Pure: looks at the records of one session's journal. The points and their numbers are those of
docs/reference/guest-contract.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]

POINTS = (
    "boots from a disk of its own, and says nothing on the console that means that it cannot go on",
    "reads the config disk, and dials where that says, within the deadline",
    "proves itself in the hello message: session and token",
    "hands back the name of the build that it was to load",
    "tells its clock: when init, the login, the agent and the hello began",
    "serves: asks the harness, and takes its answer",
    "says bye when it is told to drain, within the deadline",
    "powers off at the power button, within the deadline",
)
"""Numbered from 1. A number never gets another meaning."""


@dataclass(frozen=True, slots=True)
class Point:
    """One point of the contract. `holds` is None where the session ended before it could show."""

    number: int
    text: str
    holds: bool | None
    seen: str


def points(records: Sequence[Record], build: str) -> list[Point]:
    """What the records show of each point; `build` is the one that the session named."""
    hello = _note(records, "hello")
    opened = any(r["kind"] == "acquired" and r["resource"] == "channel" for r in records)
    alarm = _event(records, "guest.panic")
    exited = _event(records, "vm.exited")
    verdict = str(next((r.get("verdict", "") for r in records if r["kind"] == "end"), ""))
    clock = (hello or {}).get("clock") or {}
    answered = [r for r in _messages(records, "from-harness") if r["message"] == "prompt.result"]
    drained = any(r["message"] == "drain" for r in _messages(records, "to-guest"))
    bye = any(r["message"] == "bye" for r in _messages(records, "from-guest"))
    stopping = _entered(records, "stopping")
    clean = bool(exited and exited["data"].get("clean"))
    booted = opened or hello is not None
    found = [
        (booted and alarm is None, str(alarm["data"]["message"]) if alarm else "" if booted else verdict),
        (hello is not None if booted or not alarm else None, "" if hello else verdict),
        (opened if hello else None, "" if opened else verdict),
        (hello["build"] == build if hello else None, f"it says `{hello['build']}`" if hello else ""),
        ({"init", "agent", "hello"} <= clock.keys() if hello else None, _clock(clock)),
        (bool(answered) if opened else None, f"{len(answered)} answered" if opened else ""),
        (bye if drained else None, "" if bye or not drained else "no bye came"),
        (clean if stopping else None, exited["data"]["message"] if exited and stopping else ""),
    ]
    texts = enumerate(zip(POINTS, found, strict=True), 1)
    return [Point(number, text, holds, seen) for number, (text, (holds, seen)) in texts]


def _clock(clock: Mapping[str, float]) -> str:
    return ", ".join(
        f"{name} {clock[name]:.1f} s" for name in ("init", "login", "agent", "hello") if name in clock
    )


def _note(records: Sequence[Record], about: str) -> Record | None:
    return next((r for r in records if r["kind"] == "note" and r.get("about") == about), None)


def _event(records: Sequence[Record], name: str) -> Record | None:
    return next((r for r in records if r["kind"] == "event" and r["type"] == name), None)


def _messages(records: Sequence[Record], direction: str) -> list[Record]:
    return [r for r in records if r["kind"] == "channel" and r["direction"] == direction]


def _entered(records: Sequence[Record], state: str) -> bool:
    return any(r["kind"] == "entered" and r["state"] == state for r in records)
