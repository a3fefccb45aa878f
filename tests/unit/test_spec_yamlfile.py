from __future__ import annotations

from typing import Any

import pytest
import yaml

from kenaz_engine.spec import yamlfile
from kenaz_engine.spec.faults import Fault, InvalidFile, Place
from kenaz_engine.spec.yamlfile import MAX_BYTES, MAX_DEPTH, MAX_NODES, dotted, parse


@pytest.fixture(autouse=True, params=["the one PyYAML has", "SafeLoader"])
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file runs on both parsers."""
    if request.param == "SafeLoader":
        monkeypatch.setattr(yamlfile, "_LOADER", yaml.SafeLoader)


def faults(source: str | bytes) -> list[Fault]:
    with pytest.raises(InvalidFile) as caught:
        parse(source, "f")
    return caught.value.faults


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("on", "on"),
        ("Off", "Off"),
        ("true", True),
        ("False", False),
        ("tRue", "tRue"),
        ("~", None),
        ("null", None),
        ("'null'", "null"),
        ("1:30", "1:30"),
        ("2026-11-24", "2026-11-24"),
        ("2026.10", 2026.1),
        ("0o17", 15),
        ("0xFf", 255),
        ("017", 17),
        ("-0", 0),
        ("1_000", "1_000"),
        ("0b1", "0b1"),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("9223372036854775807", 2**63 - 1),
        ("-9223372036854775808", -(2**63)),
        ("=", "="),
        ("'<<'", "<<"),
        ("!!str 12", "12"),
        ("! 12", "12"),
        ("!!int 12", 12),
        ("!!float '1.5'", 1.5),
        ("!!seq [1]", [1]),
        ("!!map {a: 1}", {"a": 1}),
        ("|\n  a\n   b\n", "a\n b\n"),
    ],
)
def test_values_are_those_of_the_core_schema(text: str, value: Any) -> None:
    found = parse(f"a: {text}", "f").data["a"]
    assert found == value
    assert type(found) is type(value)


def test_keys_that_older_yaml_takes_for_booleans_are_texts() -> None:
    assert parse("on: 1\nno: 2\ny: 3\n'1': 4\n", "f").data == {"on": 1, "no": 2, "y": 3, "1": 4}


def test_places() -> None:
    document = parse("a:\n  - x\n  - b: 1\n    ü c: 'z'\n", "f")
    assert document.place() == Place("f", 1, 1)
    assert document.place(("a",)) == Place("f", 2, 3)
    assert document.place(("a", 0)) == Place("f", 2, 5)
    assert document.place(("a", 1, "ü c")) == Place("f", 4, 10)
    assert document.key_place(("a",)) == Place("f", 1, 1)
    assert document.key_place(("a", 1, "ü c")) == Place("f", 4, 5)
    assert document.key_place(("a", 0)) == Place("f", 2, 5)
    assert document.key_place(()) == document.place()


def test_what_is_not_there_is_placed_around() -> None:
    document = parse("a: {b: 1}", "f")
    assert document.place(("a", "x", "y")) == document.place(("a",))
    assert document.key_place(("a", "x")) == document.place(("a",))
    assert document.place(("a", 0)) == document.place(("a",))
    assert document.get(("a", "b")) == 1
    assert document.get(("a", "b", "c", "d")) is None
    assert document.written(("a", "x")) is None
    assert document.written(("a", "b")) == "1"


def test_aliases_are_copies_at_their_own_place() -> None:
    document = parse("a: &x {b: [1]}\nc: *x\nd: *x\n*k : 1\n".replace("*k ", "k"), "f")
    data = document.data
    assert data["c"] == data["d"] == {"b": [1]}
    assert data["c"] is not data["d"]
    assert data["c"]["b"] is not data["a"]["b"]
    assert document.place(("c",)) == Place("f", 2, 4)
    assert document.place(("c", "b")) == Place("f", 1, 11)


def test_an_alias_can_be_a_key() -> None:
    assert parse("a: &x name\n*x : 1\n", "f").data == {"a": "name", "name": 1}


def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    assert parse("\ufeffa: 1".encode(), "f").data == {"a": 1}


def test_a_directive_of_yaml_1_2_is_fine() -> None:
    assert parse("%YAML 1.2\n---\na: on\n", "f").data == {"a": "on"}


def test_older_versions_are_refused_as_booleans_differ() -> None:
    [fault] = faults("%YAML 1.1\n---\na: on\n")
    assert "YAML 1.1" in fault.message


@pytest.mark.parametrize(
    ("source", "line", "column", "words"),
    [
        ("a: 1\n\tb: 2\n", 2, 1, "a tab"),
        ("a:\n \t- 1\n", 2, 2, "a tab"),
        ("a: [\n\t1]\n", 2, 1, "a tab"),
        ("a: 1\nb: \x07\n", 2, 4, "U+0007"),
        ("a: \u2028", 1, 4, "U+2028"),
        ("a: \ufeff", 1, 4, "U+FEFF"),
        ("a: \ud800", 1, 4, "U+D800"),
        ("a: \0", 1, 4, "U+0000"),
        (b"a: 1\r\nb: \xff", 2, 4, "is not UTF-8 text"),
        ('a: "\\ud800"', 1, 0, ""),
        ('a: "\\UFFFFFFFF"', 1, 0, ""),
        ("a: 'x", 1, 0, ""),
        ("a: &x [*x]", 1, 8, "inside of what it stands for"),
        ("[a, b", 1, 0, ""),
        ("}", 1, 1, ""),
        ("a: 0" + "9" * 5000, 1, 4, "64 bits"),
        ("a: %x", 1, 4, "no value can start with `%`"),
        ("a: !<tag:x> 1", 1, 4, "the tag `tag:x` is unknown"),
        ("? {b: 1}\n: 2\n", 1, 3, "a key must be a text"),
    ],
)
def test_a_fault_has_its_place(source: str | bytes, line: int, column: int, words: str) -> None:
    fault = faults(source)[0]
    assert words in fault.message
    assert fault.place.line == line
    if column:
        assert fault.place.column == column


def test_faults_are_collected_past_the_first() -> None:
    told = faults("a: !x 1\nb: *y\na: 2\n1: 3\nc: [\n")
    assert [fault.place.line for fault in told[:4]] == [1, 2, 3, 4]
    assert told[4].place.line >= 5


def test_faults_that_leave_a_tree_can_be_collected() -> None:
    collected: list[Fault] = []
    assert parse("a: 1\na: 2\n", "f", collected).data == {"a": 1}
    assert [fault.path for fault in collected] == ["a"]


def test_a_binary_file_is_not_told_in_full() -> None:
    assert len(faults("\x01" * 5000)) == 10


def test_a_great_many_faults_are_counted() -> None:
    told = faults("\n".join("a: 1" for _ in range(500)))
    assert len(told) == 101
    assert told[-1].message == "399 more faults are not shown"


def test_length_is_bounded_in_bytes() -> None:
    comment = "#" * (MAX_BYTES - 5)
    assert parse(f"a: 1\n{comment}", "f").data == {"a": 1}
    for longer in (f"a: 1\n{comment}x", f"a: 1\n{comment}x".encode(), "ü" * (MAX_BYTES // 2 + 1)):
        [fault] = faults(longer)
        assert fault.message == "is longer than 1 MiB"


def test_depth_is_bounded() -> None:
    parse("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1), "f")
    [fault] = faults("[" * 100_000)
    assert fault.message == f"more than {MAX_DEPTH} levels deep"


def test_depth_counts_what_aliases_stand_for() -> None:
    lines = ["a0: &a0 [1]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 100))]
    [fault] = faults("\n".join(lines))
    assert fault.message == f"more than {MAX_DEPTH} levels deep"


def test_the_number_of_values_is_bounded() -> None:
    [fault] = faults("[" + "1," * MAX_NODES + "]")
    assert fault.message == f"more than {MAX_NODES} values"


def test_a_billion_laughs_cost_little() -> None:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    [fault] = faults("\n".join(lines))
    assert fault.message == f"more than {MAX_NODES} values"


def test_paths_read_well() -> None:
    assert dotted(()) == ""
    assert dotted(("spec", "tools", "allow", 0)) == "spec.tools.allow[0]"
    assert dotted(("on", "vm.exited", "x")) == 'on["vm.exited"].x'


def test_replacing_makes_the_mappings_on_the_way() -> None:
    document = parse("a: {b: 1}\nc: text\n", "f")
    place = Place("--set a.x.y")
    changed = document.replace(("a", "x", "y"), [1, {"z": 2}], place)
    assert changed is not None
    assert changed.data == {"a": {"b": 1, "x": {"y": [1, {"z": 2}]}}, "c": "text"}
    assert changed.place(("a", "x", "y", 1, "z")) == place
    assert changed.key_place(("a", "b")) == document.key_place(("a", "b"))
    assert document.data == {"a": {"b": 1}, "c": "text"}
    assert document.replace(("c", "x"), 1, place) is None
    assert document.replace(("c", "x", "y"), 1, place) is None
