"""Whether data fit a schema, without the reasons.

Most files are right, and a right file needs no messages: this answers before `jsonschema` is imported, which
takes longer than all else that is done with a file. It knows the keywords that our schemas use. Where there
is another one, or where the answer is no, jsonschema has the say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Schema = Mapping[str, Any] | bool
FormatCheck = Callable[[Mapping[str, Any], Any], bool]
"""Whether a value is of the `format` of that schema."""

_ANNOTATIONS = frozenset(
    {"$schema", "$id", "$defs", "title", "description", "examples", "default", "then", "else"}
)
_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
    "boolean": (bool,),
}


class _UnknownKeyword(Exception):
    """The schema says something that is not understood here."""


def surely_fits(data: Any, schema: Mapping[str, Any], is_format: FormatCheck) -> bool:
    """True when `schema` allows `data`; False when it does not, and when that cannot be told here."""
    try:
        return _Fitter(schema, is_format).fits(data, schema)
    except _UnknownKeyword:
        return False


class _Fitter:
    def __init__(self, root: Mapping[str, Any], is_format: FormatCheck) -> None:
        self._root = root
        self._is_format = is_format

    def fits(self, data: Any, schema: Schema) -> bool:
        if isinstance(schema, bool):
            return schema
        return all(self._keyword(key, wanted, data, schema) for key, wanted in schema.items())

    def _keyword(self, key: str, wanted: Any, data: Any, schema: Mapping[str, Any]) -> bool:
        if key in _ANNOTATIONS or key.startswith("x-kenaz-"):
            return True
        match key:
            case "type":
                return any(_is(data, kind) for kind in ([wanted] if isinstance(wanted, str) else wanted))
            case "enum":
                return any(_same(data, value) for value in wanted)
            case "const":
                return _same(data, wanted)
            case "if":
                branch = "then" if self.fits(data, wanted) else "else"
                return self.fits(data, schema.get(branch, True))
            case "$ref":
                return self.fits(data, self._definition(wanted))
            case "format":
                return self._is_format(schema, data)
        if isinstance(data, dict):
            return self._of_object(key, wanted, data, schema)
        if isinstance(data, list):
            return self._of_array(key, wanted, data)
        return _of_scalar(key, wanted, data)

    def _of_object(self, key: str, wanted: Any, data: dict[str, Any], schema: Mapping[str, Any]) -> bool:
        match key:
            case "properties":
                return all(self.fits(data[name], inner) for name, inner in wanted.items() if name in data)
            case "additionalProperties":
                known = schema.get("properties", {})
                return all(self.fits(value, wanted) for name, value in data.items() if name not in known)
            case "propertyNames":
                return all(self.fits(name, wanted) for name in data)
            case "required":
                return all(name in data for name in wanted)
            case "minProperties":
                return bool(len(data) >= wanted)
            case "maxProperties":
                return bool(len(data) <= wanted)
        return _of_another_type(key)

    def _of_array(self, key: str, wanted: Any, data: list[Any]) -> bool:
        match key:
            case "items":
                return all(self.fits(item, wanted) for item in data)
            case "minItems":
                return bool(len(data) >= wanted)
            case "maxItems":
                return bool(len(data) <= wanted)
        return _of_another_type(key)

    def _definition(self, reference: str) -> Schema:
        name = reference.removeprefix("#/$defs/")
        if name == reference or name not in self._root.get("$defs", {}):
            raise _UnknownKeyword(reference)
        definition: Schema = self._root["$defs"][name]
        return definition


def _of_scalar(key: str, wanted: Any, data: Any) -> bool:
    if isinstance(data, str):
        match key:
            case "pattern":
                return re.search(wanted, data) is not None
            case "minLength":
                return bool(len(data) >= wanted)
            case "maxLength":
                return bool(len(data) <= wanted)
    elif _is(data, "number"):
        match key:
            case "minimum":
                return bool(data >= wanted)
            case "maximum":
                return bool(data <= wanted)
    return _of_another_type(key)


_KEYWORDS = frozenset(
    {
        *(
            "properties",
            "additionalProperties",
            "propertyNames",
            "required",
            "minProperties",
            "maxProperties",
        ),
        *("items", "minItems", "maxItems", "pattern", "minLength", "maxLength", "minimum", "maximum"),
    }
)


def _of_another_type(key: str) -> bool:
    """A keyword for one type allows every value of another; one that is unknown might not."""
    if key not in _KEYWORDS:
        raise _UnknownKeyword(key)
    return True


def _is(data: Any, kind: str) -> bool:
    """JSON Schema's types: true is no number, and 2.0 is a whole one."""
    if kind in _TYPES:
        return isinstance(data, _TYPES[kind])
    if isinstance(data, bool) or not isinstance(data, int | float):
        return False
    return kind == "number" or float(data).is_integer()


def _same(data: Any, value: Any) -> bool:
    """JSON's equality of scalars: 1 is 1.0, and neither is true."""
    if isinstance(value, dict | list):
        raise _UnknownKeyword("enum")
    return bool(data == value) and isinstance(data, bool) == isinstance(value, bool)
