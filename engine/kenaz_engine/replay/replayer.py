"""Decides a journal's events again and compares: does the lifecycle still do what history says it did?

Two sides are told apart everywhere. *History* is what the journal says; *the lifecycle* is what the pure core
makes of the same events, with the lifecycle in the journal's header or with another one. Timers are never
derived: when they came is history. The first point where the two part is a `Divergence`; what came after it
followed from a decision that was not taken, so nothing after it is compared.
"""

from __future__ import annotations

import json
import marshal
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from kenaz_engine.journal.reader import Recording
from kenaz_engine.journal.records import Damaged
from kenaz_engine.lifecycle.deadlines import with_deadlines
from kenaz_engine.lifecycle.machine import (
    Decision,
    Effect,
    Enter,
    Finish,
    Restart,
    Table,
    UnexpectedEvent,
    Wait,
)
from kenaz_engine.lifecycle.model import Arm, Lifecycle
from kenaz_engine.lifecycle.recorded import decision_fields, event_from, lifecycle_from
from kenaz_engine.lifecycle.vocabulary import Vocabulary
from kenaz_engine.session.vocabulary import VOCABULARY
from kenaz_engine.spec.faults import InvalidFile
from kenaz_engine.spec.units import format_duration, parse_duration

Record = Mapping[str, Any]

AROUND = 4
"""Records that are shown before and after the one where history and lifecycle part."""

About = Literal["decision", "outcome", "order", "state", "ledger", "end"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One field that the two sides do not agree on; None where a side does not have it."""

    field: str
    history: Any
    lifecycle: Any


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first record at which history and lifecycle part, and how.

    `about` is what disagrees: a `decision`; an `outcome` of an activity that the state does not invoke; the
    `order` of records; what a record of a `state`, of the `ledger` or of the `end` says. `state`, `entry` and
    `event` are where the session stood and what it was given. `history_arm` and `lifecycle_arm` are the
    transitions that each side took, None where it took none.
    """

    seq: int
    about: About
    message: str
    state: str
    entry: int
    event: str = ""
    differences: tuple[Difference, ...] = ()
    history_arm: Arm | None = None
    lifecycle_arm: Arm | None = None


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What a replay came to. `str()` of it is for people, `as_data()` for programs.

    `records` and `events` count what was compared. `stopped` says why that is not all of a session, and is
    empty for a journal that goes to its end. `warnings` are of another lifecycle only: where its deadlines
    would have come before what history says, or later. `around` are the records about the divergence.
    """

    path: Path
    session: str
    launcher: str
    recorded_with: str
    decided_with: str
    records: int = 0
    events: int = 0
    states: tuple[str, ...] = ()
    divergence: Divergence | None = None
    warnings: tuple[str, ...] = ()
    stopped: str = ""
    around: tuple[Record, ...] = ()

    @property
    def ok(self) -> bool:
        """True when the lifecycle decides all of it as history says."""
        return self.divergence is None

    def __str__(self) -> str:
        lines = list(_told(self, self.divergence)) if self.divergence else [f"{self.path}: {self.summary}"]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        if self.stopped:
            lines.append(f"  note: {self.stopped}")
        return "\n".join(lines)

    @property
    def summary(self) -> str:
        """The result on one line, without the name of the journal."""
        if self.divergence is not None:
            return f"diverges at record {self.divergence.seq}: {self.divergence.message}"
        return f"replays: {self.records} records, {self.events} events, {self.decided_with}"

    def as_data(self) -> dict[str, Any]:
        """The result as plain JSON data."""
        found = self.divergence
        return {
            "journal": str(self.path),
            "ok": self.ok,
            "session": self.session,
            "launcher": self.launcher,
            "history": self.recorded_with,
            "lifecycle": self.decided_with,
            "records": self.records,
            "events": self.events,
            "states": list(self.states),
            "stopped": self.stopped or None,
            "warnings": list(self.warnings),
            "divergence": None
            if found is None
            else {
                "seq": found.seq,
                "line": found.seq + 1,
                "about": found.about,
                "message": found.message,
                "state": found.state,
                "entry": found.entry,
                "event": found.event or None,
                "differences": [
                    {"field": d.field, "history": d.history, "lifecycle": d.lifecycle}
                    for d in found.differences
                ],
                "historyLine": _line(found.history_arm),
                "lifecycleLine": _line(found.lifecycle_arm),
                "around": [dict(record) for record in self.around],
            },
        }


def replay(
    recording: Recording,
    lifecycle: Lifecycle | None = None,
    *,
    until: int | None = None,
    vocabulary: Vocabulary = VOCABULARY,
) -> ReplayResult:
    """Decides the recorded events again, up to the record `until`, and compares every decision.

    With `lifecycle`, that one decides, with the deadlines that the recorded spec and host would have given
    it; lines of its file may then differ from the recorded ones. Raises Damaged for records that are not of
    the form that they should have.
    """
    if recording.header is None:
        stopped = "the journal is empty: its launcher died before the header was written"
        return ReplayResult(recording.path, "", "", "", "", stopped=stopped)
    replayer = Replayer(recording, lifecycle, vocabulary)
    divergence = None
    for record in recording.records if until is None else recording.records[: until + 1]:
        divergence = replayer.take(record)
        if divergence is not None:
            break
    return replayer.result(divergence)


class Replayer:
    """A replay, record by record. `held` are the ledger's open entries, by id."""

    def __init__(
        self, recording: Recording, lifecycle: Lifecycle | None = None, vocabulary: Vocabulary = VOCABULARY
    ) -> None:
        """Raises Damaged when the journal's header cannot be read."""
        self._recording = recording
        recorded = _recorded(recording)
        self._recorded = recorded.lifecycle
        header = recording.records[0]
        self._other = lifecycle is not None
        self._compares_lines = not self._other and "lines" in header
        self._lifecycle = _as_run(lifecycle, header, vocabulary) if lifecycle else self._recorded
        shared = not self._other and vocabulary is VOCABULARY
        self._table = recorded if shared else Table(self._lifecycle, vocabulary)
        start = self._table.start()
        self.snapshot = self._before = start.snapshot
        self.held: dict[int, _Held] = {}
        self._due: Effect | Decision | None = start.effects[0]
        self._event: Record = {}
        self._defect = ""
        self._ended = self._reaped = False
        self._last_id = self._records = self._events = 0
        self._entered: dict[int, str] = {}
        self._watch = _Watch()
        self._states: list[str] = []
        self._warnings: list[str] = []
        self._take: dict[str, Callable[[Record], Divergence | None]] = {
            "header": self._header,
            "event": self._take_event,
            "decision": self._take_decision,
            "entered": self._take_entered,
            "backoff": self._take_backoff,
            "activity": self._take_activity,
            "intent": self._take_intent,
            "acquired": self._take_acquired,
            "released": self._take_released,
            "end": self._take_end,
            "reap": self._take_reap,
        }

    def take(self, record: Record) -> Divergence | None:
        """Compares the next record; after a divergence there is no next. Raises Damaged."""
        kind = record["kind"]
        take = self._take.get(kind)
        try:
            if self._ended and kind not in ("note", "reap"):
                return self._misplaced(record, "nothing")
            if self._reaped and kind not in _REAPERS:
                return self._misplaced(record, "nothing but what a reaper does")
            found = take(record) if take is not None else self._take_remark(record)
        except MISSHAPEN:
            # The one at fault may be an earlier one, which this one was compared with.
            for each in (record, *self._recording.records):
                check_shape(each)
            raise
        self._records += 1
        return found

    def result(self, divergence: Divergence | None) -> ReplayResult:
        """What the replay came to, with `divergence` as its end."""
        recording, header = self._recording, self._recording.records[0]
        around: Sequence[Record] = ()
        if divergence is not None:
            around = recording.records[max(0, divergence.seq - AROUND) : divergence.seq + AROUND + 1]
        return ReplayResult(
            path=recording.path,
            session=str(header.get("session", "")),
            launcher=str(header.get("launcher", "")),
            recorded_with=f"lifecycle {self._recorded.name}",
            decided_with=self._side(),
            records=self._records,
            events=self._events,
            states=tuple(self._states),
            divergence=divergence,
            warnings=tuple(self._warnings),
            stopped="" if divergence else self._stopped(),
            around=tuple(around),
        )

    def _side(self) -> str:
        if not self._other:
            return f"lifecycle {self._lifecycle.name} of its own header"
        return f"lifecycle {self._lifecycle.name} of {self._lifecycle.file or 'the caller'}"

    def _stopped(self) -> str:
        recording = self._recording
        if self._records < len(recording.records):
            return f"looked at no further than record {self._records - 1}"
        torn = "the last line is half-written and was left out; " if recording.torn else ""
        if not self._ended:
            where = f"it stops at record {self._records - 1}, in state {self.snapshot.state}"
            return f"{torn}the session has not ended, or its launcher died: {where}"
        return torn.removesuffix("; ")

    # --- what history says happened -------------------------------------------------------------------------

    def _header(self, record: Record) -> Divergence | None:
        return self._misplaced(record, "no second header") if record["seq"] else None

    def _take_remark(self, record: Record) -> Divergence | None:
        """A channel record or a note: nothing follows from it, but that the channel was not idle."""
        if record["kind"] == "channel":
            if isinstance(self._due, Decision):
                return self._misplaced(record, "the decision on the event before")
            self._silent(record)
            self._watch.touched = record["t"]
        return None

    def _take_event(self, record: Record) -> Divergence | None:
        if self._due is not None:
            return self._misplaced(record, _awaited(self._due))
        at = self._before = self.snapshot
        self._event = record
        self._events += 1
        event = event_from(record)
        if self._other:
            self._time(record)
        invoked = self._table.lifecycle.states[at.state].invoke
        if event.activity and event.entry == at.entry and event.activity != invoked:
            message = f"{event.activity} ended in state `{at.state}`, which invokes {invoked}"
            differences = (Difference("activity", event.activity, invoked),)
            return self._parted(record, "outcome", message, differences)
        try:
            decision = self._table.decide(at, event)
        except UnexpectedEvent as defect:
            self._defect = str(defect)
            self._due = Decision(at)
            return None
        self.snapshot = decision.snapshot
        self._due = decision
        return None

    def _take_decision(self, record: Record) -> Divergence | None:
        decision = self._due
        if not isinstance(decision, Decision):
            return self._misplaced(record, _awaited(decision))
        if self._defect:
            message = f"the lifecycle is strict, and {self._defect}"
            return self._parted(record, "decision", message)
        fields = decision_fields(decision)
        common = _COMMON
        if not self._compares_lines:
            fields.pop("arm", None)
            common += "arm" in record
        if len(record) != len(fields) + common or not fields.items() <= record.items():
            return self._decided_otherwise(record, fields)
        effects = decision.effects
        self._due = effects[0] if effects and not isinstance(effects[0], Restart) else None
        return None

    def _take_entered(self, record: Record) -> Divergence | None:
        due = self._due
        if not isinstance(due, Enter):
            return self._misplaced(record, _awaited(due))
        state = self._table.lifecycle.states[due.state]
        expected = [due.state, due.entry, state.invoke]
        got = [record.get("state"), record.get("entry"), record.get("activity")]
        if not self._other:
            expected += [_rounded(state.timeout), _rounded(state.idle)]
            got += [_rounded(record["timeout"]), _rounded(record.get("idle"))]
        if got != expected:
            message = f"what history says of entering `{record['state']}` is not what the lifecycle says"
            sides = (dict(zip(_ENTERED, side, strict=False)) for side in (got, expected))
            return self._parted(record, "state", message, _differences(*sides))
        self._due = None
        self._entered[due.entry] = state.invoke
        self._states.append(due.state)
        self._watch = _Watch(record, record["t"])
        return None

    def _take_backoff(self, record: Record) -> Divergence | None:
        due = self._due
        if not isinstance(due, Wait):
            return self._misplaced(record, _awaited(due))
        at = self.snapshot
        expected: dict[str, float] = {"entry": at.entry, "attempt": at.attempt}
        got: dict[str, float] = {name: record[name] for name in expected}
        retry = self._table.lifecycle.states[at.state].retry
        assert retry is not None
        most = due.seconds * retry.backoff.jitter + 1e-6
        if not self._other and abs(record["seconds"] - due.seconds) > most:
            expected["seconds"], got["seconds"] = due.seconds, record["seconds"]
        if got != expected:
            return self._parted(
                record, "state", f"the wait in `{at.state}` is another", _differences(got, expected)
            )
        self._due = None
        return None

    def _take_activity(self, record: Record) -> Divergence | None:
        invoked = self._entered.get(record["entry"])
        if record["activity"] == invoked:
            return None
        message = f"an activity ended that entry {record['entry']} did not start"
        differences = (Difference("activity", record["activity"], invoked),)
        return self._parted(record, "state", message, differences)

    # --- the ledger -----------------------------------------------------------------------------------------

    def _take_intent(self, record: Record) -> Divergence | None:
        held = _Held(record["resource"], record["type"], frozenset(record["uses"]))
        if record["id"] != self._last_id + 1:
            return self._unsound(record, f"the ledger's next id is {self._last_id + 1}, not {record['id']}")
        self._last_id += 1
        if unknown := held.uses - self.held.keys():
            return self._unsound(record, f"entry {record['id']} uses {min(unknown)}, which is not held")
        self.held[record["id"]] = held
        return None

    def _take_acquired(self, record: Record) -> Divergence | None:
        held = self.held.get(record["id"])
        if held is None or held.acquired:
            what = "twice" if held else "without an intent"
            return self._unsound(record, f"entry {record['id']} was acquired {what}")
        held.acquired = True
        return self._same_thing(record, held)

    def _take_released(self, record: Record) -> Divergence | None:
        number = record["id"]
        held = self.held.pop(number, None)
        if held is None:
            when = "twice" if number <= self._last_id else "before its intent"
            return self._unsound(record, f"entry {number} was released {when}")
        if user := next((other for other in self.held.values() if number in other.uses), None):
            return self._unsound(record, f"entry {number} was released while the {user.resource} used it")
        return self._same_thing(record, held)

    def _same_thing(self, record: Record, held: _Held) -> Divergence | None:
        if (record["resource"], record["type"]) == (held.resource, held.kind):
            return None
        got = f"{record['resource']} ({record['type']})"
        message = f"entry {record['id']} is {held.resource} ({held.kind}) by its intent, here {got}"
        return self._unsound(record, message)

    # --- the end --------------------------------------------------------------------------------------------

    def _take_end(self, record: Record) -> Divergence | None:
        due, internal = self._due, record.get("internal", "")
        if not isinstance(due, Finish) and not internal and not self._reaped:
            return self._misplaced(record, _awaited(due))
        at = self.snapshot
        left = list(reversed(self.held))
        succeeded = isinstance(due, Finish) and due.success and not internal and not self._reaped
        expected = {
            "state": at.state,
            "success": succeeded and not left,
            "verdict": at.verdict,
            "also": list(at.also),
            "warnings": list(at.warnings),
            "left": left,
        }
        got = {
            "state": record["state"],
            "success": record["success"],
            "verdict": record.get("verdict", ""),
            "also": record.get("also", []),
            "warnings": record.get("warnings", []),
            "left": [item["id"] for item in record["left"]],
        }
        if got != expected:
            message = "the end is not what the records before it lead to"
            return self._parted(record, "end", message, _differences(got, expected))
        if isinstance(due, Finish) and not self._reaped:
            self._states.append(due.state)
        self._reaped = False
        self._ended = True
        self._due = None
        return None

    def _take_reap(self, record: Record) -> Divergence | None:
        """Another process took over. What was due, nobody did; an event without decision changed nothing."""
        if isinstance(self._due, Decision):
            self.snapshot = self._before
        self._due = None
        self._ended, self._reaped = False, True
        return None

    # --- time, with another lifecycle -----------------------------------------------------------------------

    def _time(self, record: Record) -> None:
        """Rule 8 of a replay: its deadlines are history's, so say where the lifecycle has others."""
        watch = self._watch
        if watch.entered is None:
            return
        self._silent(record)
        state, entered = self._table.lifecycle.states[self.snapshot.state], watch.entered
        recorded, new = entered["timeout"], _rounded(state.timeout)
        passed = record["t"] - entered["t"]
        where = f"record {record['seq']}: in `{state.name}` (entry {entered['entry']})"
        if record["type"] == "timeout" and recorded is not None and (new is None or new > recorded):
            wait = "no deadline" if new is None else f"one of {format_duration(new)}"
            self._warn(
                f"{where} history timed out after {format_duration(recorded)}, the lifecycle has {wait}"
            )
        elif record["type"] == "idle" and entered.get("idle") not in (None, _rounded(state.idle)):
            idle = "does not" if state.idle is None else f"does after {format_duration(state.idle)}"
            self._warn(
                f"{where} history heard nothing for {format_duration(entered['idle'])} and went on, the "
                f"lifecycle {idle}"
            )
        elif new is not None and new != recorded and passed > new and record["type"] != "timeout":
            self._warn(
                f"{where} `{record['type']}` came after {passed:.3f} s, but the lifecycle times out after "
                f"{format_duration(new)}"
            )

    def _silent(self, record: Record) -> None:
        entered = self._watch.entered
        if not self._other or entered is None:
            return
        state = self._table.lifecycle.states[self.snapshot.state]
        silence = record["t"] - self._watch.touched
        if state.idle is not None and entered.get("idle") != _rounded(state.idle) and silence > state.idle:
            self._warn(
                f"record {record['seq']}: in `{state.name}` (entry {entered['entry']}) nothing came for "
                f"{silence:.3f} s, but the lifecycle goes on after {format_duration(state.idle)}"
            )

    def _warn(self, message: str) -> None:
        """Once per entry: what comes later in a state that would have been left says nothing more."""
        self._warnings.append(message)
        self._watch = _Watch()

    # --- divergences ----------------------------------------------------------------------------------------

    def _decided_otherwise(self, record: Record, expected: Mapping[str, Any]) -> Divergence:
        ours = {"seq", "t", "wall", "kind", "prev"} | (set() if self._compares_lines else {"arm"})
        got = {name: value for name, value in record.items() if name not in ours}
        event, decision = self._event["type"], self._due
        assert isinstance(decision, Decision)
        history = self._arm(self._recorded, self._before.state, event, record.get("arm", 0), record["state"])
        arm = self._arm(self._lifecycle, self._before.state, event, decision.arm, decision.snapshot.state)
        message = (
            f"`{event}` in `{self._before.state}`: history {_course(record, record['state'])}, the lifecycle "
            f"{_course({'reason': decision.reason}, decision.snapshot.state)}"
        )
        return self._parted(record, "decision", message, _differences(got, expected), history, arm)

    @staticmethod
    def _arm(lifecycle: Lifecycle, state: str, event: str, line: int, target: str) -> Arm | None:
        found = lifecycle.states.get(state) if line else None
        arms = lifecycle.arms(found, event) if found else ()
        return next((arm for arm in arms if (arm.line, arm.target) == (line, target)), None)

    def _misplaced(self, record: Record, expected: str) -> Divergence:
        got = _called(record)
        message = f"history goes on with {got}, where {expected} comes next"
        return self._parted(record, "order", message, (Difference("record", got, expected),))

    def _unsound(self, record: Record, message: str) -> Divergence:
        return self._parted(record, "ledger", f"history does not add up: {message}")

    def _parted(
        self,
        record: Record,
        about: About,
        message: str,
        differences: tuple[Difference, ...] = (),
        history: Arm | None = None,
        lifecycle: Arm | None = None,
    ) -> Divergence:
        at = self._before if about in ("decision", "outcome") else self.snapshot
        event = str(self._event.get("type", "")) if about in ("decision", "outcome") else ""
        return Divergence(
            record["seq"], about, message, at.state, at.entry, event, differences, history, lifecycle
        )


@dataclass(slots=True)
class _Held:
    """An open entry of the ledger, as history tells it."""

    resource: str
    kind: str
    uses: frozenset[int]
    acquired: bool = False


@dataclass(slots=True)
class _Watch:
    """The `entered` record whose deadlines run, and when something last came through the channel."""

    entered: Record | None = None
    touched: float = field(default=0.0)


_REAPERS = frozenset({"reap", "released", "note", "end"})
"""Kinds of records that a reaper writes."""

_ENTERED = ("state", "entry", "activity", "timeout", "idle")
"""The fields of an `entered` record, in the order in which they are compared."""

_COMMON = 5
"""The fields that every record has."""


def recorded_lifecycle(recording: Recording) -> Lifecycle:
    """The lifecycle in the header of a journal. Raises Damaged when there is none that can be read."""
    return _recorded(recording).lifecycle


def _recorded(recording: Recording) -> Table:
    header = recording.header
    if header is None:
        raise Damaged(1, "there is no header: the launcher died before it was written")
    parts = {"lifecycle": header.get("lifecycle"), "lines": header.get("lines")}
    try:
        return _loaded(_Parts(marshal.dumps(parts, _PLAIN), parts))
    except InvalidFile as invalid:
        fault = invalid.faults[0]
        message = f"the lifecycle in the header cannot be read: {fault.path}: {fault.message}"
        raise Damaged(1, message) from None


_PLAIN = 2
"""The newest version of `marshal` that writes equal data as equal bytes."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """The part of a header that makes a lifecycle; the bytes tell 1 from true, which the data do not."""

    packed: bytes
    data: Mapping[str, Any] = field(compare=False)


@lru_cache(maxsize=64)
def _loaded(parts: _Parts) -> Table:
    """Many journals have the same lifecycle, and loading it takes longer than replaying a session."""
    return Table(lifecycle_from(parts.data, "the journal's header"), VOCABULARY)


def _as_run(lifecycle: Lifecycle, header: Record, vocabulary: Vocabulary) -> Lifecycle:
    """The lifecycle as it would have been run then: with the spec's own deadlines, on that host."""
    try:
        timeouts = header.get("spec", {}).get("timeouts", {})
        overrides = {state: parse_duration(text) for state, text in timeouts.items()}
        scale = float(header.get("deadline_scale", 1.0))
    except (AttributeError, TypeError, ValueError):
        scale = math.nan
    if not 0 < scale < math.inf:
        raise Damaged(1, "the deadlines in the header cannot be read")
    return with_deadlines(lifecycle, vocabulary, overrides, scale)


def _differences(got: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[Difference, ...]:
    names = dict.fromkeys([*expected, *got])
    return tuple(
        Difference(name, got.get(name), expected.get(name))
        for name in names
        if got.get(name) != expected.get(name)
    )


def _rounded(seconds: float | None) -> float | None:
    """To the millisecond, as a header holds times."""
    return None if seconds is None else round(seconds, 3)


def _awaited(due: Effect | Decision | None) -> str:
    match due:
        case Decision():
            return "the decision on the event before"
        case Enter():
            return f"entering `{due.state}` (entry {due.entry})"
        case Wait():
            return "the wait before the next attempt"
        case Finish():
            return f"the end in `{due.state}`"
        case _:
            return "an event"


def _course(record: Record, state: str) -> str:
    reason = record.get("reason", "")
    return f"ignores it ({reason})" if reason else f"leads to `{state}`"


def _called(record: Record) -> str:
    kind = record["kind"]
    names = {"event": "type", "entered": "state", "decision": "state"}
    name = record.get(names.get(kind, ""), "")
    return f"the record `{kind}`" + (f" ({name})" if name else "")


@cache
def _validator() -> Any:
    from jsonschema import Draft202012Validator

    source = resources.files("kenaz_specs") / "schemas" / "journal.schema.json"
    return Draft202012Validator(json.loads(source.read_bytes()))


MISSHAPEN = (AttributeError, KeyError, TypeError, ValueError)
"""What reading a record raises that lacks a field, or has one of another type."""


def check_shape(record: Record) -> None:
    """Raises Damaged when the schema does not allow the record. Slow: for when something failed."""
    from jsonschema.exceptions import best_match

    errors = list(_validator().iter_errors(dict(record)))
    # A part that does not fit leaves its fields unevaluated, which says nothing by itself.
    telling = [error for error in errors if error.validator != "unevaluatedProperties"]
    if error := best_match(telling or errors):
        raise Damaged(record["seq"] + 1, f"is no `{record['kind']}` record: {error.message}") from None


# --- for people ---------------------------------------------------------------------------------------------


def _told(result: ReplayResult, found: Divergence) -> Iterator[str]:
    yield f"{result.path}:{found.seq + 1}: history and lifecycle part at record {found.seq}: {found.message}"
    yield ""
    for record in result.around:
        yield f"  {'>' if record['seq'] == found.seq else ' '} {record_line(record)}"
    yield ""
    event = f", given `{found.event}`" if found.event else ""
    yield f"  in state `{found.state}` (entry {found.entry}){event}:"
    if found.differences:
        rows = [("", "history", "lifecycle")]
        rows += [(d.field, _shown(d.history), _shown(d.lifecycle)) for d in found.differences]
        first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
        yield from (f"    {a:<{first}}  {b:<{second}}  {c}".rstrip() for a, b, c in rows)
    history = f"{result.recorded_with}, recorded by kenaz-launcher {result.launcher}"
    yield f"  history:   {history}{_taken(found.history_arm)}"
    yield f"  lifecycle: {result.decided_with}{_taken(found.lifecycle_arm)}"


def _taken(arm: Arm | None) -> str:
    if arm is None:
        return ""
    tone = f', fail "{arm.fail}"' if arm.fail else f', warn "{arm.warn}"' if arm.warn else ""
    return f"; line {arm.line}: to `{arm.target}`{tone}"


def _line(arm: Arm | None) -> int | None:
    return arm.line if arm else None


def _shown(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


def record_line(record: Record, limit: int = 160) -> str:
    """A record on one line of ASCII: its number, its time, its kind, and its fields as JSON."""
    fields = {name: value for name, value in record.items() if name not in _HEAD}
    words = " ".join(f"{name}={_short(value)}" for name, value in fields.items())
    line = f"{record['seq']:>5} {record['t']:>10.3f}  {record['kind']:<8}  {words}".rstrip()
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


_HEAD = frozenset({"seq", "t", "wall", "kind", "prev"})


def _short(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
