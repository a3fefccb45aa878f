"""Replay: golden journals of real sessions, and what is told when history and lifecycle part."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from kenaz_engine.journal.reader import Recording, read_journal
from kenaz_engine.journal.records import GENESIS, Damaged, decode_all, encode
from kenaz_engine.lifecycle.loader import load_lifecycle
from kenaz_engine.lifecycle.machine import Decision, Event, Machine, Snapshot, Table
from kenaz_engine.lifecycle.model import Arm, Lifecycle
from kenaz_engine.lifecycle.recorded import decision_fields, event_fields, lifecycle_fields
from kenaz_engine.lifecycle.vocabulary import Vocabulary
from kenaz_engine.replay.replayer import Difference, Divergence, ReplayResult, replay

JOURNALS = Path(__file__).parents[1] / "journals"
GOLDEN = sorted(JOURNALS.glob("*.journal.jsonl"))
NOTHING = Vocabulary({}, {})

PATHS = {
    "process-guest-killed": "resolving allocating booting connecting releasing failed",
    "process-hello": "resolving allocating booting connecting running draining stopping releasing ended",
    "qemu-aborted": "resolving allocating booting connecting stopping killing releasing failed",
    "qemu-hello": "resolving allocating booting connecting running draining stopping releasing ended",
    "qemu-interrupted": "resolving allocating booting connecting stopping releasing failed",
    "qemu-launcher-killed": "resolving allocating booting connecting",
    "qemu-reaped": "resolving allocating booting connecting running",
    "qemu-unreachable": "resolving allocating booting connecting killing releasing failed",
    "qemu-vm-killed": "resolving allocating booting connecting killing releasing failed",
}
"""The order in which these sessions gave up is policy; this pins it."""


def golden(name: str = "qemu-hello") -> Recording:
    return read_journal(JOURNALS / f"{name}.journal.jsonl")


def changed(change: Callable[[list[dict[str, Any]]], Any], name: str = "qemu-hello") -> Recording:
    """A golden journal after `change`, numbered and chained anew: a forger's, not an accident's."""
    records = copy.deepcopy(golden(name).records)
    change(records)
    prev, data = GENESIS, b""
    for seq, record in enumerate(records):
        line, prev = encode({**record, "seq": seq}, prev)
        data += line
    return Recording(Path("changed.jsonl"), *decode_all(data))


def first(records: list[dict[str, Any]], kind: str, **fields: Any) -> dict[str, Any]:
    """The first record of a kind with these fields."""
    return next(r for r in records if r["kind"] == kind and fields.items() <= r.items())


def divergence(result: ReplayResult) -> Divergence:
    assert result.divergence is not None
    return result.divergence


class TestGoldenJournals:
    """Journals of real sessions, as they were written."""

    def test_they_are_the_ones_that_are_pinned(self) -> None:
        assert [path.name.removesuffix(".journal.jsonl") for path in GOLDEN] == list(PATHS)

    @pytest.mark.parametrize("name", PATHS)
    def test_they_replay_exactly(self, name: str) -> None:
        recording = golden(name)
        result = replay(recording)
        assert result.ok, str(result)
        assert result.records == len(recording.records)
        assert result.states == tuple(PATHS[name].split())
        assert result.warnings == ()
        assert bool(result.stopped) == (recording.end is None)

    @pytest.mark.parametrize("name", PATHS)
    def test_the_shipped_lifecycle_still_takes_the_same_way(self, name: str, standard: Lifecycle) -> None:
        result = replay(golden(name), standard)
        assert result.ok, str(result)
        assert result.states == tuple(PATHS[name].split())
        assert result.warnings == ()

    @pytest.mark.parametrize("name", PATHS)
    def test_wherever_one_stops_the_rest_replays(self, name: str) -> None:
        """As a crash would have left it: whole records, then nothing or half a line."""
        data = (JOURNALS / f"{name}.journal.jsonl").read_bytes()
        ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
        for number, end in enumerate(ends[:-1], 1):
            for cut in (end, end + 7):
                result = replay(Recording(Path("cut"), *decode_all(data[:cut])))
                assert result.ok, str(result)
                assert result.records == number
                assert f"stops at record {number - 1}" in result.stopped
                assert ("half-written" in result.stopped) == (cut > end)

    def test_the_end_is_not_missed_when_a_line_behind_it_is_torn(self) -> None:
        data = (JOURNALS / "qemu-hello.journal.jsonl").read_bytes() + b'{"seq"'
        result = replay(Recording(Path("torn"), *decode_all(data)))
        assert (result.ok, result.stopped) == (True, "the last line is half-written and was left out")

    def test_a_journal_without_lines_is_compared_without_them(self) -> None:
        assert replay(changed(lambda records: records[0].pop("lines"))).ok


class TestAnotherLifecycle:
    """What a changed lifecycle would have done with the same events."""

    @staticmethod
    def standard(standard: Lifecycle, state: str, **changes: Any) -> Lifecycle:
        states = {**standard.states, state: replace(standard.states[state], **changes)}
        return replace(standard, states=states, file="new.yaml")

    def moved(self, standard: Lifecycle) -> Lifecycle:
        on = {**standard.states["running"].on, "done": (Arm("stopping", warn="no drain", line=7),)}
        return self.standard(standard, "running", on=on)

    def test_the_first_divergence_names_both_sides(self, standard: Lifecycle) -> None:
        found = divergence(replay(golden(), self.moved(standard)))
        assert (found.seq, found.about, found.state, found.entry) == (40, "decision", "running", 5)
        assert found.event == "done"
        assert found.message == (
            "`done` in `running`: history leads to `draining`, the lifecycle leads to `stopping`"
        )
        assert found.differences == (
            Difference("state", "draining", "stopping"),
            Difference("warnings", None, ["no drain"]),
        )
        assert found.history_arm == Arm("draining", line=65)
        assert found.lifecycle_arm == Arm("stopping", warn="no drain", line=7)

    def test_it_reads_well(self, standard: Lifecycle) -> None:
        text = str(replay(golden(), self.moved(standard))).replace(str(JOURNALS), "here")
        head, _, *around = text.splitlines()
        assert head.startswith("here/qemu-hello.journal.jsonl:41: history and lifecycle part at record 40: ")
        assert [line[:9] for line in around[:9]] == [
            f"  {'>' if number == 40 else ' '} {number:>5}" for number in range(36, 45)
        ]
        assert around[10:] == [
            "  in state `running` (entry 5), given `done`:",
            "              history   lifecycle",
            "    state     draining  stopping",
            '    warnings  -         ["no drain"]',
            "  history:   lifecycle standard, recorded by kenaz-launcher 0.1.0; line 65: to `draining`",
            '  lifecycle: lifecycle standard of new.yaml; line 7: to `stopping`, warn "no drain"',
        ]

    def test_an_event_that_is_not_named_any_more(self, standard: Lifecycle) -> None:
        on = {k: v for k, v in standard.states["connecting"].on.items() if k != "end"}
        found = divergence(replay(golden("qemu-interrupted"), self.standard(standard, "connecting", on=on)))
        assert found.message.endswith("history leads to `stopping`, the lifecycle ignores it (unhandled)")
        assert found.lifecycle_arm is None
        ignoring = self.standard(standard, "connecting", on=on, ignore=frozenset({"end"}))
        again = divergence(replay(golden("qemu-interrupted"), ignoring))
        assert again.message.endswith("the lifecycle ignores it (declared)")

    def test_another_activity_stops_where_it_would_start(self, standard: Lifecycle) -> None:
        found = divergence(replay(golden(), self.standard(standard, "booting", invoke="vm.boot")))
        assert (found.about, found.state) == ("state", "booting")
        assert found.differences == (Difference("activity", "vm.start", "vm.boot"),)

    def test_an_outcome_of_another_activity_stops_it(self) -> None:
        """Rule 2: such an outcome says nothing about the state."""

        def change(records: list[dict[str, Any]]) -> None:
            first(records, "event", activity="vm.start")["activity"] = "vm.boot"

        found = divergence(replay(changed(change)))
        assert (found.about, found.state, found.event) == ("outcome", "booting", "done")
        assert found.message == "vm.boot ended in state `booting`, which invokes vm.start"

    def test_lines_may_move(self, standard: Lifecycle) -> None:
        """Other lines of another file are no other decision; in the journal's own lifecycle they are."""
        arms = {
            event: tuple(replace(arm, line=999) for arm in arms)
            for event, arms in standard.states["running"].on.items()
        }
        assert replay(golden(), self.standard(standard, "running", on=arms)).ok

        def change(records: list[dict[str, Any]]) -> None:
            first(records, "decision", state="draining")["arm"] = 66

        found = divergence(replay(changed(change)))
        assert found.differences == (Difference("arm", 66, 65),)

    @pytest.mark.parametrize(
        ("name", "state", "changes", "warning"),
        [
            (
                "qemu-hello",
                "connecting",
                {"timeout": 0.5},
                "`done` came after 3.128 s, but the lifecycle times",
            ),
            ("qemu-hello", "connecting", {"timeout": 1.0}, ""),
            ("qemu-hello", "running", {"idle": 0.01}, "nothing came for 0.030 s, but the lifecycle goes on"),
            ("qemu-hello", "running", {"idle": None}, ""),
        ],
    )
    def test_deadlines_that_would_have_come_first(
        self, standard: Lifecycle, name: str, state: str, changes: dict[str, Any], warning: str
    ) -> None:
        """Rule 8: a replay derives no timer, and says where one would have come. TCG stretches by five."""
        result = replay(golden(name), self.standard(standard, state, **changes))
        assert result.ok
        assert bool(result.warnings) == bool(warning)
        assert all(warning in found for found in result.warnings)

    @pytest.mark.parametrize("timeout", [None, 700.0])
    def test_a_timeout_that_would_have_come_later(self, standard: Lifecycle, timeout: float | None) -> None:
        """The recorded spec sets 500 ms for `connecting`, and is taken at its word for any lifecycle."""
        name = "qemu-unreachable"
        longer = self.standard(standard, "connecting", timeout=timeout, idle=60.0)
        assert replay(golden(name), longer).warnings == ()

        def change(records: list[dict[str, Any]]) -> None:
            records[0]["spec"]["timeouts"] = {}

        result = replay(changed(change, name), longer)
        wait = "one of 58m20s" if timeout else "no deadline"
        where = "record 23: in `connecting` (entry 4)"
        assert result.warnings == (f"{where} history timed out after 500ms, the lifecycle has {wait}",)
        assert f"  warning: {where}" in str(result)


class TestHistory:
    """A journal whose records do not hold together, though its chain does."""

    @staticmethod
    def drop(kind: str, **fields: Any) -> Callable[[list[dict[str, Any]]], None]:
        return lambda records: records.remove(first(records, kind, **fields))

    @staticmethod
    def twice(kind: str, **fields: Any) -> Callable[[list[dict[str, Any]]], None]:
        def change(records: list[dict[str, Any]]) -> None:
            record = first(records, kind, **fields)
            records.insert(records.index(record), record)

        return change

    @staticmethod
    def put(of: str, at: dict[str, Any], **fields: Any) -> Callable[[list[dict[str, Any]]], None]:
        return lambda records: first(records, of, **at).update(fields)

    @pytest.mark.parametrize(
        ("change", "about", "message"),
        [
            (drop("entered", state="booting"), "order", "`event` (done), where entering `booting` (entry 3)"),
            (drop("decision", state="booting"), "order", "(booting), where the decision on the event before"),
            (
                drop("event", activity="vm.start"),
                "order",
                "`decision` (connecting), where an event comes next",
            ),
            (drop("event", activity="resources.release"), "order", "`decision` (ended), where an event"),
            (drop("decision", state="ended"), "order", "the record `end`, where the decision on the event"),
            (twice("entered", state="booting"), "order", "`entered` (booting), where an event comes next"),
            (twice("end"), "order", "the record `end`, where nothing comes next"),
            (twice("header"), "order", "the record `header`, where no second header comes next"),
            (
                put("entered", {"state": "booting"}, kind="backoff", attempt=1, seconds=1),
                "order",
                "`backoff`",
            ),
            (put("decision", {"state": "booting"}, kind="channel"), "order", "the record `channel`"),
            (put("entered", {"state": "booting"}, timeout=7.0), "state", "entering `booting`"),
            (put("entered", {"state": "running"}, idle=7.0), "state", "entering `running`"),
            (put("entered", {"state": "booting"}, entry=4), "state", "entering `booting`"),
            (twice("intent", id=3), "ledger", "the ledger's next id is 4, not 3"),
            (drop("intent", id=3), "ledger", "entry 3 was acquired without an intent"),
            (put("intent", {"id": 3}, uses=[9]), "ledger", "entry 3 uses 9, which is not held"),
            (twice("acquired", id=3), "ledger", "entry 3 was acquired twice"),
            (twice("released", id=3), "ledger", "entry 3 was released twice"),
            (put("released", {"id": 7}, id=99), "ledger", "entry 99 was released before its intent"),
            (put("released", {"id": 3}, resource="vm"), "ledger", "entry 3 is disk (file) by its intent"),
            (put("acquired", {"id": 3}, type="vm"), "ledger", "by its intent, here disk (vm)"),
            (drop("released", id=3), "end", "the end is not what"),
            (put("end", {}, success=False), "end", "the end is not what"),
            (put("end", {}, verdict="it failed"), "end", "the end is not what"),
            (put("end", {}, left=[{"id": 1}]), "end", "the end is not what"),
        ],
    )
    def test_what_does_not_hold_together_is_told(
        self, change: Callable[[list[dict[str, Any]]], None], about: str, message: str
    ) -> None:
        result = replay(changed(change))
        found = divergence(result)
        assert (found.about, message in found.message) == (about, True), found.message
        assert not result.stopped
        assert result.around
        assert str(result)
        json.dumps(result.as_data(), allow_nan=False)

    def test_nothing_is_released_before_what_uses_it(self) -> None:
        def change(records: list[dict[str, Any]]) -> None:
            released = first(records, "released", resource="vm")
            channel = first(records, "released", resource="channel")
            one, other = records.index(released), records.index(channel)
            records[one], records[other] = channel, released

        found = divergence(replay(changed(change)))
        assert found.message == ("history does not add up: entry 6 was released while the channel used it")

    def test_an_activity_that_ended_was_started(self) -> None:
        change = self.put("activity", {}, activity="vm.fly")
        found = divergence(replay(changed(change, "qemu-interrupted")))
        assert found.message == "an activity ended that entry 4 did not start"

    def test_a_defect_ends_a_session_anywhere(self) -> None:
        def change(records: list[dict[str, Any]]) -> None:
            end = records[-1]
            del records[22:]
            records.append({**end, "state": "connecting", "success": False, "internal": "it broke"})
            records[-1]["left"] = [{"id": number} for number in range(6, 0, -1)]

        result = replay(changed(change))
        assert (result.ok, result.stopped) == (True, "")

    def test_notes_may_follow_the_end(self) -> None:
        note = {"kind": "note", "about": "observer", "error": "closed", "t": 9.0, "wall": 9.0}
        assert replay(changed(lambda records: records.append(note))).ok

    def test_a_wait_is_as_long_as_it_may_be(self, lifecycle: Callable[[str], Lifecycle]) -> None:
        backoff = "{first: 2s, jitter: 0.5}"
        text = """
            initial: a
            states:
              a: {invoke: work, timeout: 10s, retry: {attempts: 2, backoff: %s}, on: {done: z, error: z}}
              z: {final: success}
            """
        built = lifecycle(text % backoff)
        for seconds, ok in ((1.0, True), (3.0, True), (0.99, False), (3.01, False)):
            records = by_hand(built, Event("error", {}, 1, "work"))
            records.append({"kind": "backoff", "entry": 1, "attempt": 2, "seconds": seconds})
            records += by_hand(built, Event("error", {}, 1, "work"), Event("retry.due", {}, 1))[-2:]
            result = replay(numbered(records), vocabulary=NOTHING)
            assert result.ok == ok, str(result)
            if not ok:
                assert divergence(result).differences == (Difference("seconds", seconds, 2.0),)
        quick = lifecycle(text % "{first: 1ms}")
        assert replay(numbered(records), quick, vocabulary=NOTHING).ok  # how long it waited is history

    def test_a_strict_lifecycle_ends_by_a_defect(self, lifecycle: Callable[[str], Lifecycle]) -> None:
        text = "strict: true\ninitial: a\nstates:\n  a: {invoke: work, timeout: 1s}\n  z: {final: success}\n"
        built = lifecycle(text)
        records = [*by_hand(built), {"kind": "event", "type": "zork"}]
        end = {"kind": "end", "state": "a", "success": False, "left": [], "seconds": 1.0, "internal": "x"}
        assert replay(numbered([*records, end]), vocabulary=NOTHING).ok
        decision = {"kind": "decision", "state": "a", "entry": 1, "attempt": 1, "reason": "unhandled"}
        found = divergence(replay(numbered([*records, decision]), vocabulary=NOTHING))
        assert "the lifecycle is strict, and state 'a' does not name the event 'zork'" in found.message

    def test_idle_of_another_lifecycle(self, lifecycle: Callable[[str], Lifecycle]) -> None:
        text = """
            initial: a
            states:
              a: {invoke: work, timeout: none, idle: %s, on: {done: z, idle: z}}
              z: {final: success}
            """
        records = by_hand(lifecycle(text % "10s"), Event("idle", {}, 1))
        assert replay(numbered(records), vocabulary=NOTHING).ok
        [warning] = replay(numbered(records), lifecycle(text % "20s"), vocabulary=NOTHING).warnings
        assert warning.endswith("nothing for 10s and went on, the lifecycle does after 20s")
        never = lifecycle((text % "20s").replace("timeout: none, idle: 20s", "timeout: 1m"))
        [warning] = replay(numbered(records), never, vocabulary=NOTHING).warnings
        assert warning.endswith("the lifecycle does not")


def by_hand(lifecycle: Lifecycle, *events: Event) -> list[dict[str, Any]]:
    """The records of a session that is given these events; without its waits, and without an end."""
    machine = Machine(lifecycle, NOTHING)
    decision = machine.start()
    header = {"kind": "header", "format": 1, "session": "s", "launcher": "0", **lifecycle_fields(lifecycle)}
    records = [header]
    for event in (None, *events):
        if event is not None:
            decision = machine.decide(decision.snapshot, event)
            records.append({"kind": "event", **event_fields(event)})
            records.append({"kind": "decision", **decision_fields(decision)})
        state = lifecycle.states[decision.snapshot.state]
        if event is None:
            entered = {"state": state.name, "entry": 1, "activity": state.invoke, "timeout": state.timeout}
            idle = {} if state.idle is None else {"idle": state.idle}
            records.append({"kind": "entered", **entered, **idle})
    return records


def numbered(records: list[dict[str, Any]]) -> Recording:
    chained = [
        {"seq": seq, "t": float(seq), "wall": 0.0, "prev": "", **record} for seq, record in enumerate(records)
    ]
    return Recording(Path("by-hand.jsonl"), chained, torn=False)


class TestUntil:
    """A part of a journal is a journal that stops."""

    def test_nothing_after_it_is_looked_at(self, standard: Lifecycle) -> None:
        other = TestAnotherLifecycle().moved(standard)
        assert not replay(golden(), other, until=40).ok
        result = replay(golden(), other, until=39)
        assert (result.ok, result.records) == (True, 40)
        assert result.stopped == "looked at no further than record 39"
        assert "\n  note: looked at no further" in str(result)

    def test_beyond_the_end_is_all_of_it(self) -> None:
        assert replay(golden(), until=10_000).stopped == ""


class TestDamage:
    """What cannot be read is no divergence."""

    def test_an_empty_journal_is_one_that_stopped_at_once(self) -> None:
        result = replay(Recording(Path("empty"), [], torn=True))
        assert (result.ok, result.records) == (True, 0)
        assert "the journal is empty" in str(result)

    @pytest.mark.parametrize(
        ("change", "line", "message"),
        [
            (lambda r: r[0].update(lifecycle=7), 1, "the lifecycle in the header cannot be read"),
            (lambda r: r[0]["lifecycle"].update(initial="x"), 1, "there is no state `x`"),
            (lambda r: r[0].pop("lifecycle"), 1, "the lifecycle in the header cannot be read"),
            (lambda r: first(r, "event").pop("type"), 7, "is no `event` record: 'type' is a required"),
            (lambda r: first(r, "entered").pop("state"), 4, "is no `entered` record: "),
            (lambda r: first(r, "intent").update(uses=7), 2, "is no `intent` record: 7 is not of type"),
        ],
    )
    def test_a_record_without_its_form(
        self, change: Callable[[list[dict[str, Any]]], Any], line: int, message: str
    ) -> None:
        with pytest.raises(Damaged, match=message) as caught:
            replay(changed(change))
        assert caught.value.line == line

    @pytest.mark.parametrize(
        "header",
        [
            {"spec": 7},
            {"spec": {"timeouts": {"a": "x"}}},
            {"deadline_scale": 0},
            {"deadline_scale": math.inf},
        ],
    )
    def test_deadlines_that_cannot_be_read(self, header: dict[str, Any], standard: Lifecycle) -> None:
        recording = golden()
        recording.records[0].update(header)
        with pytest.raises(Damaged, match="line 1: the deadlines in the header cannot be read"):
            replay(recording, standard)

    def test_a_defect_of_ours_is_not_blamed_on_the_journal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(self: Table, snapshot: Snapshot, event: Event) -> Decision:
            raise TypeError("a defect")

        monkeypatch.setattr(Table, "decide", broken)
        with pytest.raises(TypeError, match="a defect"):
            replay(golden())

    def test_lines_that_are_none_are_left_out(self) -> None:
        assert not replay(changed(lambda records: records[0].update(lines=7))).ok
        assert not replay(changed(lambda records: records[0].update(lines={"/a": "b"}))).ok


async def test_effects_are_carried_out_before_the_next_event_is_taken(
    session: Callable[..., Any], autojump_clock: trio.testing.MockClock
) -> None:
    """Three events at once: each is decided, and the state that it leads to entered, before the next."""

    async def long(work: Any) -> None:
        await trio.sleep(5)

    one = session(work=long, clean=long)
    await one.run((1, lambda: [one.put(kind) for kind in ("end", "abort", "thing.alarm")]))
    kinds = [
        (r["kind"], r.get("type") or r.get("state")) for r in one.journal.of("event", "decision", "entered")
    ]
    assert kinds == [
        *(("entered", "working"), ("event", "abort"), ("decision", "cleaning"), ("entered", "cleaning")),
        *(("event", "end"), ("decision", "cleaning"), ("event", "thing.alarm"), ("decision", "cleaning")),
        *(("event", "done"), ("decision", "failed")),
    ]


async def test_every_runner_s_journal_replays_on_its_lifecycle_alone(
    session: Callable[..., Any], small: str, autojump_clock: trio.testing.MockClock
) -> None:
    """The fixture replays what every test of the runner wrote; here it must also be able to fail."""
    one = session()
    await one.run()
    header = {"kind": "header", "seq": 0, **lifecycle_fields(one.lifecycle)}
    recording = Recording(Path("x"), [header, *one.journal.records], torn=False)
    head = "apiVersion: kenaz.dev/v1\nkind: Lifecycle\nmetadata: {name: other}\n"
    other = load_lifecycle(head + _flat(small.replace("done: cleaning", "done: failed")), "other.yaml")
    assert replay(recording, vocabulary=NOTHING).ok
    assert divergence(replay(recording, other, vocabulary=NOTHING)).event == "done"


def _flat(text: str) -> str:
    return "\n".join(line[4:] for line in text.splitlines())


# --- what a reaper wrote ------------------------------------------------------------------------------------


def reap_of(records: list[dict[str, Any]]) -> int:
    return next(n for n, record in enumerate(records) if record["kind"] == "reap")


@pytest.mark.parametrize(
    ("change", "about"),
    [
        (lambda records: records[-1].update(success=True), "end"),
        (lambda records: records[-1].update(state="ended"), "end"),
        (lambda records: records.pop(-2), "end"),
        (lambda records: records.insert(reap_of(records) + 1, records[3]), "order"),
        (lambda records: records.insert(reap_of(records) + 2, records[reap_of(records) + 1]), "ledger"),
        (lambda records: records.append(records[-1]), "order"),
    ],
)
def test_a_reaper_does_what_reapers_do(change: Callable[[list[dict[str, Any]]], Any], about: str) -> None:
    found = replay(changed(change, "qemu-reaped")).divergence
    assert found is not None
    assert found.about == about


def test_an_event_whose_decision_was_not_written_has_changed_nothing() -> None:
    def cut(records: list[dict[str, Any]]) -> None:
        """Dies between the event that leads from `connecting` to `running` and its decision."""
        last = max(n for n, r in enumerate(records) if r["kind"] == "decision" and r["state"] == "running")
        tail = records[reap_of(records) :]
        held = {r["id"] for r in records[:last] if r["kind"] == "intent"}
        records[last:] = [r for r in tail if r["kind"] != "released" or r["id"] in held]
        records[-1]["state"] = "connecting"

    assert replay(changed(cut, "qemu-reaped")).ok


def test_what_an_ended_session_left_may_be_reaped_later() -> None:
    def left_over(records: list[dict[str, Any]]) -> None:
        end = records.pop()
        keep = next(
            n for n, r in enumerate(records) if r["kind"] == "released" and r["resource"] == "control"
        )
        control = records.pop(keep)
        left = {"id": control["id"], "resource": "control", "type": "socket", "error": "no"}
        reaper = golden("qemu-reaped").records[reap_of(golden("qemu-reaped").records)]
        records += [
            {**end, "success": False, "left": [left]},
            reaper,
            control,
            {**end, "success": False, "reaped": True},
        ]

    assert replay(changed(left_over, "qemu-hello")).ok
