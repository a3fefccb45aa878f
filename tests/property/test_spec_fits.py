"""The quick look at a document says the same as jsonschema, for the keywords that it knows."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from kenaz_engine.spec.fits import surely_fits

NAMES = st.sampled_from(["a", "b", "cd", "e1"])
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([0.0, 1.0, 1.5, -2.5]), NAMES, st.just("")
)
DATA = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
TYPES = st.sampled_from(["string", "integer", "number", "boolean", "object", "array", "null"])
SMALL = st.integers(0, 3)


def _schemas(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    keywords: dict[str, st.SearchStrategy[Any]] = {
        "title": st.just("t"),
        "type": TYPES | st.lists(TYPES, min_size=1, max_size=2, unique=True),
        "enum": st.lists(SCALARS, min_size=1, max_size=3),
        "const": SCALARS,
        "if": inner,
        "then": inner,
        "else": inner,
        "properties": st.dictionaries(NAMES, inner, max_size=3),
        "additionalProperties": inner,
        "propertyNames": inner,
        "required": st.lists(NAMES, max_size=2, unique=True),
        "minProperties": SMALL,
        "maxProperties": SMALL,
        "items": inner,
        "minItems": SMALL,
        "maxItems": SMALL,
        "pattern": st.sampled_from(["a", "^[a-c]", "[0-9]$"]),
        "minLength": SMALL,
        "maxLength": SMALL,
        "minimum": st.integers(-2, 2),
        "maximum": st.integers(-2, 2),
        "$ref": st.just("#/$defs/one"),
        "x-kenaz-form": st.just("words"),
    }
    # A few at a time: of many keywords, one always says no.
    few = st.lists(st.sampled_from(sorted(keywords)), max_size=3, unique=True)
    branches = st.fixed_dictionaries({key: keywords[key] for key in ("if", "then", "else")})
    return branches | few.flatmap(lambda keys: st.fixed_dictionaries({key: keywords[key] for key in keys}))


LEAVES = st.booleans() | st.fixed_dictionaries({}, optional={"type": TYPES, "const": SCALARS})
SCHEMAS = _schemas(st.recursive(LEAVES, _schemas, max_leaves=4))


@given(schema=SCHEMAS, definition=LEAVES, data=DATA)
def test_it_says_what_jsonschema_says(schema: dict[str, Any], definition: Any, data: Any) -> None:
    schema = {**schema, "$defs": {"one": definition}}
    assert surely_fits(data, schema, lambda *_: True) == Draft202012Validator(schema).is_valid(data)


def test_it_knows_every_keyword_of_the_shipped_schemas() -> None:
    def no_unknown(schema: Any) -> None:
        """Data of each type meet every keyword; a schema of which one is unknown fits nothing at all."""
        for data in ({}, [], "", 0, None):
            verdict = Draft202012Validator({**schema, "$defs": root.get("$defs", {})}).is_valid(data)
            assert surely_fits(data, {**schema, "$defs": root.get("$defs", {})}, lambda *_: True) == verdict
        for inner in schema.get("properties", {}).values():
            no_unknown(inner)

    for name in ("session", "lifecycle"):
        text = resources.files("kenaz_specs").joinpath("schemas", f"{name}.schema.json").read_text("utf-8")
        root = json.loads(text)
        no_unknown(root)
