"""Lifecycles, events and decisions as the fields of journal records, and back from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kenaz_engine.lifecycle import loader
from kenaz_engine.lifecycle.machine import Decision, Event
from kenaz_engine.lifecycle.model import Lifecycle


def lifecycle_fields(lifecycle: Lifecycle) -> dict[str, Any]:
    """The fields of a `header` that a replay decides by."""
    return {"lifecycle": loader.to_data(lifecycle), "lines": loader.lines(lifecycle)}


def lifecycle_from(header: Mapping[str, Any], file: str) -> Lifecycle:
    """The lifecycle of a `header`, with the lines of the file that it was read from. Raises InvalidFile.

    `file` names the journal, for messages.
    """
    given = header.get("lines")
    lines = {k: n for k, n in given.items() if type(n) is int} if isinstance(given, dict) else {}
    return loader.from_data(header.get("lifecycle"), loader.places(lines, file))


def event_fields(event: Event) -> dict[str, Any]:
    """The fields of an `event` record; what an event does not carry is left out."""
    fields: dict[str, Any] = {"type": event.type}
    if event.data:
        fields["data"] = dict(event.data)
    if event.entry is not None:
        fields["entry"] = event.entry
    if event.activity:
        fields["activity"] = event.activity
    if event.id is not None:
        fields["id"] = event.id
    return fields


def event_from(record: Mapping[str, Any]) -> Event:
    """The event of an `event` record."""
    return Event(
        record["type"],
        record.get("data", {}),
        record.get("entry"),
        record.get("activity", ""),
        record.get("id"),
    )


def decision_fields(decision: Decision) -> dict[str, Any]:
    """The fields of a `decision` record; a replay compares them all."""
    at = decision.snapshot
    fields: dict[str, Any] = {"state": at.state, "entry": at.entry, "attempt": at.attempt}
    if decision.reason:
        fields["reason"] = decision.reason
    if decision.arm:
        fields["arm"] = decision.arm
    if at.waiting:
        fields["waiting"] = True
    if at.verdict:
        fields["verdict"] = at.verdict
    if at.also:
        fields["also"] = list(at.also)
    if at.warnings:
        fields["warnings"] = list(at.warnings)
    if at.counters:
        fields["counters"] = dict(at.counters)
    return fields
