"""Documents against JSON Schema, with faults in our words and at the right place.

The shipped schemas say a few things in keywords of their own, which editors pass over: `x-kenaz-form` (what a
`pattern` asks for, in words), `x-kenaz-env` (`${env:NAME}` is replaced here, and the value is a secret),
`x-kenaz-minimum` and `x-kenaz-maximum` (bounds of a size or duration), `x-kenaz-code` (code of the fault).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from kenaz_engine.spec.faults import Fault
from kenaz_engine.spec.fits import surely_fits
from kenaz_engine.spec.units import parse_duration, parse_size
from kenaz_engine.spec.yamlfile import Document, Path, dotted, shorten

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator, ValidationError

API_VERSION = "kenaz.dev/v1"

JsonSchema = Mapping[str, Any]

_NAMES = {
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "object": "a mapping",
    "array": "a list",
    "null": "null",
}
_UNITS = {"kenaz-size": "MiB", "kenaz-duration": "s", "kenaz-duration-or-none": "s"}


@cache
def shipped(kind: str) -> JsonSchema:
    """The schema of a kind of file: `Session`, `Lifecycle`."""
    from importlib.resources import files

    name = f"{kind.lower()}.schema.json"
    schema: JsonSchema = json.loads(files("kenaz_specs").joinpath("schemas", name).read_text("utf-8"))
    return schema


def check_kind(document: Document, kind: str) -> list[Fault]:
    """What is wrong with `apiVersion` and `kind`. After a fault the schema would only add noise."""
    data = document.data
    if not isinstance(data, dict):
        return [Fault(document.place(), "", f"is no {kind} file: {_called(data)}, not a mapping")]
    faults = []
    for key, wanted in (("apiVersion", API_VERSION), ("kind", kind)):
        if key not in data:
            faults.append(Fault(document.place(), "", f"`{key}` is missing", f"add `{key}: {wanted}`"))
        elif data[key] != wanted:
            place = document.place((key,))
            faults.append(Fault(place, key, f"must be `{wanted}` here, not {_shown(data[key])}"))
    return faults


def check(document: Document, schema: JsonSchema, *, at: Path = (), code: str = "") -> list[Fault]:
    """Everything in the part of `document` at `at` that `schema` does not allow.

    `code` is that of faults for which the schema names none. The schema itself is taken to be right.
    """
    if surely_fits(document.get(at), schema, lambda inner, value: not _format_fault(inner, value)):
        return []
    validator = _validator(schema)
    return [
        fault
        for error in validator.iter_errors(document.get(at))
        for fault in _faults(document, (*at, *error.absolute_path), error, code)
    ]


def suggestion(word: str, known: Iterable[str]) -> str:
    """The hint for a word that is not among the known ones."""
    from difflib import get_close_matches

    known = sorted(known)
    if close := get_close_matches(word.lower(), known, n=1, cutoff=0.6):
        return f"did you mean `{close[0]}`?"
    if known and len(known) <= 12:
        return f"known: {', '.join(known)}"
    return ""


def _validator(schema: JsonSchema) -> Draft202012Validator:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    # Formats of our own with a say in the message; those of JSON Schema are mere annotations.
    kind: type[Draft202012Validator] = extend(Draft202012Validator, {"format": _format})  # type: ignore[no-untyped-call]  # the stubs lack its types
    return kind(schema)


def _format(validator: Any, form: str, instance: Any, schema: JsonSchema) -> Iterator[ValidationError]:
    from jsonschema import ValidationError

    if fault := _format_fault(schema, instance):
        yield ValidationError(fault)


def _format_fault(schema: JsonSchema, instance: Any) -> str:
    """What a text lacks to be of the schema's `format`, if that is one of ours; empty for nothing."""
    form = schema["format"]
    if form not in _UNITS or not isinstance(instance, str):
        return ""
    if form == "kenaz-duration-or-none" and instance == "none":
        return ""
    parse = parse_size if form == "kenaz-size" else parse_duration
    lowest, highest = schema.get("x-kenaz-minimum"), schema.get("x-kenaz-maximum")
    try:
        value = parse(instance)
    except ValueError as error:
        return str(error)
    if lowest is not None and value < parse(lowest):
        return f"must be at least {lowest}, not {instance}"
    if highest is not None and value > parse(highest):
        return f"must be at most {highest}, not {instance}"
    return ""


# --- messages -----------------------------------------------------------------------------------------------


def _faults(document: Document, path: Path, error: ValidationError, code: str) -> Iterator[Fault]:
    schema = error.schema if isinstance(error.schema, Mapping) else {}
    code = schema.get("x-kenaz-code", code)
    instance: Any = error.instance
    wanted: Any = error.validator_value
    match error.validator:
        case "additionalProperties" if wanted is False:
            known = schema.get("properties", {})
            for key in instance:
                if key not in known:
                    place = document.key_place((*path, key))
                    hint = suggestion(key, known)
                    yield Fault(place, dotted((*path, key)), "this key is unknown", hint, code)
        case "required":
            # jsonschema reports each missing key on its own, and names it only in its message.
            missing = next(key for key in wanted if error.message.startswith(repr(key)))
            yield Fault(document.key_place(path), dotted(path), f"`{missing}` is missing", "", code)
        case "pattern" | "maxLength" if "propertyNames" in error.absolute_schema_path:
            place = document.key_place((*path, instance))
            yield Fault(place, dotted((*path, instance)), f"is not {_form(schema)}", "", code)
        case _:
            message, hint = _value_fault(error, schema, document.written(path))
            yield Fault(document.place(path), dotted(path), message, hint, code)


def _value_fault(error: ValidationError, schema: JsonSchema, written: str | None) -> tuple[str, str]:
    """Message and hint for a value that breaks a keyword."""
    instance: Any = error.instance
    wanted: Any = error.validator_value
    match error.validator:
        case "type":
            return _wrong_type(instance, wanted, schema, written)
        case "enum":
            known = [str(value) for value in wanted]
            return f"must be one of {', '.join(known)}, not {_shown(instance)}", _did_you_mean(
                instance, known
            )
        case "const":
            return f"must be {_shown(wanted)}, not {_shown(instance)}", ""
        case "pattern":
            return f"{_shown(instance)} is not {_form(schema)}", ""
        case "minimum":
            return f"must be at least {wanted}, not {instance}", ""
        case "maximum":
            return f"must be at most {wanted}, not {instance}", ""
        case "minLength" | "minItems" | "minProperties" if wanted == 1:
            return "must not be empty", ""
        case "maxProperties" if wanted == 1:
            return f"must have one key, not {len(instance)}", ""
        case "maxLength":
            return f"must not be longer than {wanted} characters", ""
        case "maxItems" | "maxProperties":
            return f"must not have more than {wanted} entries", ""
        case "format":
            return error.message, ""
        case _:  # a keyword that only drivers' schemas use
            return shorten(error.message, 200), ""


def _wrong_type(
    instance: Any, wanted: str | list[str], schema: JsonSchema, written: str | None
) -> tuple[str, str]:
    kinds = [wanted] if isinstance(wanted, str) else wanted
    message = f"must be {' or '.join(_NAMES[kind] for kind in kinds)}, not {_called(instance)}"
    if "string" not in kinds or written is None or instance is None or isinstance(instance, dict | list):
        return message, ""
    if schema.get("x-kenaz-env"):
        return message, "put it in quotes"
    if unit := _UNITS.get(schema.get("format", "")):
        return message, f"state the unit, like `{shorten(written)}{unit}`"
    return message, f'quote it: "{shorten(written)}"'


def _form(schema: JsonSchema) -> str:
    return str(schema.get("x-kenaz-form", f"of the form {schema.get('pattern', '')}"))


def _did_you_mean(value: Any, known: list[str]) -> str:
    hint = suggestion(value, known) if isinstance(value, str) else ""
    return hint if hint.startswith("did") else ""


def _called(value: Any) -> str:
    match value:
        case None:
            return "empty"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case dict():
            return "a mapping"
        case _:
            return "a list"


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return _called(value)
    return f"`{shorten(str(value))}`"
