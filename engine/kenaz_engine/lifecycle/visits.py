"""The way that a session took through its lifecycle, from the records of its journal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Visit:
    """One stay in a state, as a journal tells it.

    `number` counts from 1. `at` is in seconds since the journal's beginning. `seconds` is how long it lasted,
    clean-up included; None in a final state, and in the last one of a journal that stops. `event` led on to
    `target` by the transition in `line` (0: not told); empty where nothing did.
    """

    number: int
    state: str
    at: float
    seconds: float | None = None
    event: str = ""
    target: str = ""
    line: int = 0


def visits(records: Iterable[Mapping[str, Any]]) -> list[Visit]:
    """The way that a session took, from the records of its journal."""
    found: list[Visit] = []
    event, entry = "", 0
    for record in records:
        match record["kind"]:
            case "event":
                event = record["type"]
            case "decision" if found and record["entry"] > entry:
                line = record.get("arm", 0)
                found[-1] = replace(found[-1], event=event, target=record["state"], line=line)
            case "entered" | "end":
                at, state = record["t"], record["state"]
                if found:
                    found[-1] = replace(found[-1], seconds=at - found[-1].at)
                if record["kind"] == "entered" or (found and found[-1].target == state):
                    found.append(Visit(len(found) + 1, state, at))
                entry = record.get("entry", entry)
    return found
