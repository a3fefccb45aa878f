"""The journal's codec on whatever hypothesis thinks of."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kenaz_engine.journal.records import FORMAT, GENESIS, Damaged, decode_all, encode

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.dictionaries(st.text().filter(lambda key: key not in ("seq", "kind", "prev")), VALUES, max_size=4)
JOURNALS = st.lists(FIELDS, max_size=6)


def written(bodies: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bytes]:
    records = [{"format": FORMAT, "seq": 0, "kind": "header"}]
    records += [{**body, "seq": seq, "kind": "note"} for seq, body in enumerate(bodies, 1)]
    prev, data = GENESIS, b""
    for record in records:
        line, following = encode(record, prev)
        record["prev"], prev = prev, following
        data += line
    return records, data


@given(JOURNALS)
def test_what_is_encoded_is_decoded(bodies: list[dict[str, Any]]) -> None:
    records, data = written(bodies)
    assert decode_all(data) == (records, False)


@given(JOURNALS, st.data())
def test_a_torn_journal_is_a_shorter_one(bodies: list[dict[str, Any]], draw: st.DataObject) -> None:
    """Wherever a crash cut it off, what was whole is read, and nothing else."""
    records, data = written(bodies)
    cut = draw.draw(st.integers(0, len(data)))
    found, torn = decode_all(data[:cut])
    assert found == records[: data[:cut].count(b"\n")]
    assert torn == (not data[:cut].endswith(b"\n") and cut > 0)


@given(JOURNALS, st.data())
def test_every_other_change_is_found(bodies: list[dict[str, Any]], draw: st.DataObject) -> None:
    """Of any byte in a line that another one follows."""
    _, data = written([*bodies, {}])
    last = data.rstrip(b"\n").rindex(b"\n")
    place = draw.draw(st.integers(0, last))
    byte = draw.draw(st.integers(0, 255).filter(lambda byte: byte != data[place]))
    changed = data[:place] + bytes([byte]) + data[place + 1 :]
    with pytest.raises(Damaged) as caught:
        decode_all(changed)
    assert 1 <= caught.value.line <= len(bodies) + 2


@given(st.binary())
def test_no_bytes_give_a_traceback(data: bytes) -> None:
    try:
        decode_all(data)
    except Damaged:
        return


@given(st.lists(VALUES, max_size=4))
def test_no_json_gives_a_traceback(values: list[Any]) -> None:
    _, data = written([])
    try:
        decode_all(data + b"".join(json.dumps(value).encode() + b"\n" for value in values))
    except Damaged:
        assert values
