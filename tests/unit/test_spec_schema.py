"""The shipped schemas themselves, and what is said of values that break them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from kenaz_engine.spec import schema
from kenaz_engine.spec.faults import Place
from kenaz_engine.spec.yamlfile import from_data, parse

KINDS = ("Session", "Lifecycle", "Scenario", "Catalog")


def properties(shape: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every property that a schema declares."""
    if isinstance(shape, dict):
        for name, inner in shape.get("properties", {}).items():
            yield f"{path}.{name}", inner
        for key, inner in shape.items():
            yield from properties(inner, f"{path}.{key}")


def parts(shape: Any) -> Iterator[dict[str, Any]]:
    if isinstance(shape, dict):
        yield shape
        for inner in shape.values():
            yield from parts(inner)


@pytest.mark.parametrize("kind", KINDS)
def test_the_schema_is_a_schema(kind: str) -> None:
    Draft202012Validator.check_schema(schema.shipped(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_every_property_explains_itself(kind: str) -> None:
    shape = schema.shipped(kind)
    for path, inner in properties(shape):
        if "$ref" in inner and "title" not in inner:
            inner = shape["$defs"][inner["$ref"].rsplit("/", 1)[1]]
        assert {"title", "description", "examples"} <= inner.keys(), path
        assert inner["description"].endswith("."), path


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_and_examples_are_valid(kind: str) -> None:
    shape = schema.shipped(kind)
    for path, inner in properties(shape):
        values = inner.get("examples", []) + ([inner["default"]] if "default" in inner else [])
        for value in values:
            document = from_data(value, lambda _: Place("f"))
            assert schema.check(document, {**inner, "$defs": shape.get("$defs", {})}) == [], path


@pytest.mark.parametrize("kind", KINDS)
def test_mappings_are_closed_and_patterns_are_put_in_words(kind: str) -> None:
    for part in parts(schema.shipped(kind)):
        if part.get("type") == "object" and part != {"type": "object"}:
            assert "additionalProperties" in part or part.get("if"), part
        if isinstance(part.get("pattern"), str):
            assert "x-kenaz-form" in part, part


def test_every_default_of_a_session_is_in_the_schema() -> None:
    """All but the id, which is random, and the name, which must be stated."""
    for path, inner in properties(schema.shipped("Session")["properties"]["spec"]):
        assert "default" in inner, path


def said(text: str, shape: dict[str, Any]) -> list[str]:
    return [str(fault) for fault in schema.check(parse(text, "f"), shape)]


@pytest.mark.parametrize(
    ("text", "shape", "expected"),
    [
        ("1", {"const": "a"}, ["f:1:1: must be `a`, not `1`"]),
        ("abc", {"pattern": "^x$"}, ["f:1:1: `abc` is not of the form ^x$"]),
        ("abc", {"maxLength": 2}, ["f:1:1: must not be longer than 2 characters"]),
        ("[1, 2]", {"maxItems": 1}, ["f:1:1: must not have more than 1 entries"]),
        ("[1, 1]", {"uniqueItems": True}, ["f:1:1: [1, 1] has non-unique elements"]),
        ("{a: 1}", {"minProperties": 2}, ["f:1:1: {'a': 1} does not have enough properties"]),
        ("x", False, ["f:1:1: False schema does not allow 'x'"]),
        ("[]", {"enum": ["a"]}, ["f:1:1: must be one of a, not a list"]),
        ("true", {"enum": ["a"]}, ["f:1:1: must be one of a, not true"]),
        ("x", {"format": "email"}, []),
        ("5", {"format": "kenaz-size"}, []),
        ("5s", {"format": "kenaz-duration"}, []),
        ("none", {"format": "kenaz-duration-or-none"}, []),
        (
            "none",
            {"format": "kenaz-duration"},
            ["f:1:1: 'none' is not a duration; write it like 90s, 500ms, 1m30s or 2h"],
        ),
        (
            "{a: 1}",
            {"additionalProperties": {"type": "string"}},
            ['f:1:5: a: must be a text, not a number (quote it: "1")'],
        ),
        ("{'it''s': 1}", {"required": ["it's", "b"]}, ["f:1:1: `b` is missing"]),
    ],
)
def test_messages(text: str, shape: Any, expected: list[str]) -> None:
    assert said(text, shape) == expected


def test_a_part_of_a_document_can_be_checked() -> None:
    document = parse("a:\n  b: {c: 1}\n", "f")
    faults = schema.check(
        document, {"type": "object", "additionalProperties": False}, at=("a", "b"), code="X"
    )
    assert [str(fault) for fault in faults] == ["f:2:7: a.b.c: this key is unknown [X]"]


def test_suggestions() -> None:
    assert schema.suggestion("Cpu", ["cpus", "memory"]) == "did you mean `cpus`?"
    assert schema.suggestion("zzz", ["b", "a"]) == "known: a, b"
    assert schema.suggestion("zzz", [f"name{i}" for i in range(20)]) == ""
    assert schema.suggestion("zzz", []) == ""
