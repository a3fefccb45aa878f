"""Replay of forged journals, chained soundly and telling anything: a result, or Damaged; no traceback."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kenaz_engine.journal.reader import Recording, read_journal
from kenaz_engine.journal.records import Damaged
from kenaz_engine.replay.replayer import replay
from kenaz_engine.session.lifecycles import shipped_lifecycle

JOURNALS = sorted((Path(__file__).parents[1] / "journals").glob("*.journal.jsonl"))

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@cache
def records(path: Path) -> list[dict[str, Any]]:
    return read_journal(path).records


@st.composite
def forged(draw: st.DrawFn) -> Recording:
    """A real journal in which records were dropped, repeated, moved, or told something else."""
    path = draw(st.sampled_from(JOURNALS))
    found = copy.copy(records(path))
    for _ in range(draw(st.integers(1, 4))):
        number = draw(st.integers(0, len(found) - 1))
        record = copy.deepcopy(found[number])
        match draw(st.sampled_from(["drop", "repeat", "move", "change", "remove", "inner"])):
            case "drop" if number:
                del found[number]
            case "repeat":
                found.insert(draw(st.integers(1, len(found))), record)
            case "move" if number:
                found.insert(draw(st.integers(1, len(found) - 1)), found.pop(number))
            case "change" | "remove" as what:
                fields = sorted(record.keys() - {"seq", "kind", "prev", "t", "wall", "format"})
                if fields:
                    name = draw(st.sampled_from(fields))
                    record.pop(name) if what == "remove" else record.update({name: draw(VALUES)})
                    found[number] = record
            case "inner":
                record.update({name: draw(VALUES) for name in draw(st.sets(st.sampled_from(INNER)))})
                found[number] = record
    return Recording(path, [{**record, "seq": seq} for seq, record in enumerate(found)], torn=False)


INNER = (
    "data",
    "id",
    "entry",
    "arm",
    "uses",
    "left",
    "lines",
    "spec",
    "deadline_scale",
    "idle",
    "timeout",
    "type",
)


@given(forged(), st.booleans())
def test_whatever_a_journal_tells_the_answer_is_readable(recording: Recording, another: bool) -> None:
    try:
        result = replay(recording, shipped_lifecycle("standard-reconnect") if another else None)
    except Damaged:
        return
    assert str(result)
    json.dumps(result.as_data())
    if result.divergence is not None:
        assert 0 <= result.divergence.seq < len(recording.records)


@given(forged())
def test_a_replay_is_the_same_each_time(recording: Recording) -> None:
    answers = []
    for _ in range(2):
        try:
            answers.append(str(replay(recording)))
        except Damaged as damage:
            answers.append(str(damage))
    assert answers[0] == answers[1]
