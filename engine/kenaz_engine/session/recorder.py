"""What a session remembers: its journal, and whoever watches it being written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kenaz_engine.journal.writer import Sink
from kenaz_engine.shortage import what_to_do

Observer = Callable[[Mapping[str, Any]], None]


LOST = "the journal could not be written"


class RecordLost(Exception):
    """The journal could not be written. Nothing new may be acquired after that."""


class Recorder:
    """A sink that outlives its journal's disk.

    When the journal cannot be written, `fault` says why (`cause` is what was raised), nothing more is written
    to it (a torn line in the middle would hide the rest), and `on_fault` is called once. Clean-up goes on
    unrecorded; an `intent` raises RecordLost, for what is not written down must not be made.
    """

    def __init__(self, journal: Sink, observers: tuple[Observer, ...] = ()) -> None:
        self._journal = journal
        self._observers = list(observers)
        self.fault = ""
        self.cause: OSError | None = None
        self.on_fault: Callable[[str], None] = lambda fault: None

    def append(self, kind: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Writes one record, shows it to the observers, and returns it."""
        record: Mapping[str, Any] = {"kind": kind, **fields}
        if not self.fault:
            try:
                record = self._journal.append(kind, fields)
            except OSError as exc:
                self.cause = exc
                mend = what_to_do(exc)
                why = f"{exc.strerror or exc}{mend and f' ({mend})'}"
                self.fault = f"{LOST}: {why}"
                self.on_fault(self.fault)
        if self.fault and kind == "intent":
            raise RecordLost(self.fault) from self.cause
        faults = [fault for observer in list(self._observers) if (fault := self._show(observer, record))]
        for fault in faults:
            self.append("note", {"about": "observer", "error": fault})
        return record

    def _show(self, observer: Observer, record: Mapping[str, Any]) -> str:
        """An observer that fails (a closed terminal) is asked no more; the session and its clean-up go on."""
        try:
            observer(record)
        except Exception as exc:
            self._observers.remove(observer)
            return f"{type(exc).__name__}: {exc}"
        return ""
