from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from kenaz_engine.spec.fits import surely_fits


def _any_format(schema: Mapping[str, Any], data: Any) -> bool:
    return True


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"type": "object"}]},
        {"properties": {"a": {"uniqueItems": True}}},
        {"patternProperties": {".": True}},
        {"enum": [[1]]},
        {"$ref": "#/$defs/other"},
        {"$ref": "https://example.org/schema"},
    ],
)
def test_what_it_does_not_know_it_leaves_to_jsonschema(schema: dict[str, Any]) -> None:
    assert not surely_fits({"a": [1]}, schema, _any_format)


def test_a_format_is_asked_for() -> None:
    asked: list[Any] = []

    def is_format(schema: Mapping[str, Any], data: Any) -> bool:
        asked.append((schema["format"], data))
        return data == "90s"

    schema = {"items": {"format": "kenaz-duration"}}
    assert surely_fits(["90s"], schema, is_format)
    assert not surely_fits(["90s", "9"], schema, is_format)
    assert asked == [("kenaz-duration", "90s"), ("kenaz-duration", "90s"), ("kenaz-duration", "9")]


@pytest.mark.parametrize(
    ("data", "schema", "fits"),
    [
        (True, {"type": "integer"}, False),
        (2.0, {"type": "integer"}, True),
        (2.5, {"type": "integer"}, False),
        (2.5, {"type": ["integer", "number"]}, True),
        (1, {"const": True}, False),
        (1.0, {"const": 1}, True),
        (True, {"minimum": 5}, True),
        (1, {"if": {"type": "integer"}, "then": True, "else": False}, True),
        ("a", {"if": {"type": "integer"}, "then": True, "else": False}, False),
        ("a", {"if": {"type": "integer"}, "then": False}, True),
        ("abc", {"maxItems": 0, "maxProperties": 0, "maximum": 0}, True),
    ],
)
def test_types_are_those_of_json_schema(data: Any, schema: dict[str, Any], fits: bool) -> None:
    assert surely_fits(data, schema, _any_format) is fits
