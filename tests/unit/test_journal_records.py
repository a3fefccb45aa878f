"""The journal's codec: what it refuses, where, and how it says so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import pytest

from kenaz_engine.journal.records import FORMAT, GENESIS, KINDS, Damaged, Decoder, decode_all, encode


def written(*fields: Mapping[str, Any]) -> list[bytes]:
    """Lines of a sound journal: a header, then these."""
    prev, lines = GENESIS, []
    for seq, each in enumerate(({"kind": "header", "format": FORMAT}, *fields)):
        line, prev = encode({"seq": seq, "t": 0.0, "wall": 0.0, **each}, prev)
        lines.append(line)
    return lines


NOTES = ({"kind": "note", "about": "a"}, {"kind": "note", "about": "b"}, {"kind": "end"})


def test_records_come_back_in_order() -> None:
    records, torn = decode_all(b"".join(written(*NOTES)))
    assert [r["kind"] for r in records] == ["header", "note", "note", "end"]
    assert [r["seq"] for r in records] == [0, 1, 2, 3]
    assert not torn


def test_each_line_names_the_hash_of_the_line_before() -> None:
    lines = written(*NOTES)
    assert json.loads(lines[0])["prev"] == GENESIS == hashlib.sha256(b"").hexdigest()
    assert json.loads(lines[2])["prev"] == hashlib.sha256(lines[1].rstrip(b"\n")).hexdigest()


def test_an_empty_journal_has_no_records() -> None:
    assert decode_all(b"") == ([], False)


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_torn_last_line_is_dropped(cut: int) -> None:
    """A line without its newline is what a crash in the middle of a write leaves."""
    records, torn = decode_all(b"".join(written(*NOTES))[:-cut])
    assert len(records) == 3
    assert torn


def test_one_line_holds_whatever_text() -> None:
    text = 'line\nbreak\r\u2028 "quoted" \x00 \ud800 é'
    lines = written({"kind": "note", "about": text})
    assert lines[1].count(b"\n") == 1
    assert lines[1].isascii()
    assert decode_all(b"".join(lines))[0][1]["about"] == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"bytes", {1, 2}])
def test_what_is_not_plain_json_is_refused(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        encode({"kind": "note", "about": value}, GENESIS)


def damaged(lines: list[bytes]) -> Damaged:
    with pytest.raises(Damaged) as caught:
        decode_all(b"".join(lines))
    return caught.value


class TestDamage:
    """Anything but a torn last line is reported, with its line."""

    def test_a_changed_line(self) -> None:
        lines = written(*NOTES)
        lines[1] = lines[1].replace(b'"a"', b'"A"')
        fault = damaged(lines)
        assert fault.line == 3
        assert str(fault) == "line 3: does not follow from the line before it: one of the two was changed"

    def test_a_missing_line(self) -> None:
        lines = written(*NOTES)
        del lines[1]
        assert (damaged(lines).line, "record 1 is expected here, found 2" in damaged(lines).message) == (
            2,
            True,
        )

    def test_two_lines_swapped(self) -> None:
        lines = written(*NOTES)
        lines[1:3] = lines[2], lines[1]
        assert damaged(lines).line == 2

    def test_a_line_twice(self) -> None:
        lines = written(*NOTES)
        lines.insert(2, lines[1])
        assert damaged(lines).line == 3

    def test_a_missing_header(self) -> None:
        fault = damaged(written(*NOTES)[1:])
        assert fault.line == 1
        assert fault.message == "is no header: its kind is 'note'"

    def test_another_format(self) -> None:
        line, _ = encode({"seq": 0, "kind": "header", "format": 2}, GENESIS)
        assert damaged([line]).message == "is of format 2; this version reads 1"

    @pytest.mark.parametrize(
        "line",
        [
            b"\n",
            b"not json\n",
            b"\xff\n",
            b'{"a":\n',
            b"[" * 100_000 + b"\n",
            b'{"a":' + b"9" * 5000 + b"}\n",
        ],
    )
    def test_no_json(self, line: bytes) -> None:
        fault = damaged([*written(), line])
        assert (fault.line, fault.message) == (2, "is not JSON")

    @pytest.mark.parametrize("line", [b"[]\n", b"7\n", b'"text"\n', b"null\n"])
    def test_no_record(self, line: bytes) -> None:
        assert damaged([*written(), line]).message == "is not a record"

    @pytest.mark.parametrize("kind", ["zork", None, 7, [], {}])
    def test_an_unknown_kind(self, kind: Any) -> None:
        fault = damaged(written({"kind": kind}))
        assert fault.message == f"has the unknown kind {kind!r}"


def test_kinds_and_schema_agree(record_schema: Any) -> None:
    assert set(record_schema.schema["properties"]["kind"]["enum"]) == KINDS


def test_a_decoder_goes_on_where_it_stood() -> None:
    decoder = Decoder()
    lines = [line.rstrip(b"\n") for line in written(*NOTES)]
    assert [decoder.decode(line)["seq"] for line in lines] == [0, 1, 2, 3]
