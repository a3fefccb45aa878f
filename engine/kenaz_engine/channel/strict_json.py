"""JSON as the wire allows it: one meaning for every reader, and no cost beyond its size.

Python's decoder is lenient where readers differ: of two equal keys the last wins, NaN and Infinity are
numbers, half of a surrogate pair is a character. What two programs may read differently is refused here
(rules J1 to J7 of docs/reference/vsock-protocol.md).

Nearly all that comes is in order, so it is read first by `jiter`, at many times the speed. What that refuses
is read again by Python's decoder with hooks for what it is lenient in: that one decides, and says why.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from jiter import from_json

DEPTH = 64
"""Objects and arrays within each other, the outermost counted; unless the session's spec says otherwise."""

DIGITS = 20
"""Characters of an integer, its sign included: enough for 64 bits."""

_LEAST, _MOST = -(10 ** (DIGITS - 1)), 10**DIGITS


class JsonRefused(ValueError):
    """Not JSON, or not of the strict kind. `code` says which rule; the text never quotes the input."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def loads(payload: bytes, depth: int = DEPTH) -> dict[str, Any]:
    """The object that `payload` holds, nested at most `depth` deep (up to 512). Raises JsonRefused."""
    try:
        value = from_json(payload, allow_inf_nan=False, catch_duplicate_keys=True, cache_mode="keys")
    except ValueError:
        return _refused_or(payload, depth)
    if isinstance(value, dict) and _in_order(value, depth):
        return value
    return _refused_or(payload, depth)


def _in_order(value: dict[str, Any], depth: int) -> bool:
    """Whether the numbers and the nesting of what was read are as J4 and J5 have them."""
    level: list[Any] = [value]
    while level and depth > 0:
        depth -= 1
        inner: list[Any] = []
        for container in level:
            for item in container.values() if type(container) is dict else container:
                kind = type(item)
                if kind is dict or kind is list:
                    inner.append(item)
                elif kind is int:
                    if not _LEAST < item < _MOST:
                        return False
                elif kind is float and math.isinf(item):
                    return False
        level = inner
    return not level


def _refused_or(payload: bytes, depth: int) -> dict[str, Any]:
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise JsonRefused("bad_utf8", f"byte {exc.start} is not UTF-8") from None
    if _deeper_than(payload, depth):
        raise JsonRefused("too_deep", f"objects and arrays nested more than {depth} deep")
    try:
        value = _decode(text)
    except RecursionError:  # brackets without a partner may come on top of `depth`
        raise JsonRefused("bad_json", "not JSON: brackets without a partner") from None
    except json.JSONDecodeError as exc:
        raise JsonRefused("bad_json", f"not JSON: {exc.msg} at character {exc.pos}") from None
    if not isinstance(value, dict):
        raise JsonRefused("not_object", "not a JSON object")
    if b"\\" in payload and (b"\\ud" in payload or b"\\uD" in payload):
        _refuse_lone_surrogates(value)
    return value


def dumps(value: dict[str, Any]) -> bytes:
    """The object as compact ASCII."""
    return _encode(value).encode("ascii")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise JsonRefused("duplicate_key", "a key twice in one object")
    return value


def _int(text: str) -> int:
    if len(text) > DIGITS:
        raise JsonRefused("bad_number", f"an integer of more than {DIGITS} characters")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise JsonRefused("bad_number", "a number beyond the range of a double")
    return value


def _constant(_name: str) -> NoReturn:
    raise JsonRefused("bad_number", "NaN and Infinity are not JSON")


_decode = json.JSONDecoder(
    object_pairs_hook=_pairs, parse_int=_int, parse_float=_float, parse_constant=_constant
).decode
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode

# The closing quote is optional and nothing is given back, so that an open string costs one pass, not one for
# each of its quotes.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_BRACKETS = bytes.maketrans(b"[{]}", b"(())")
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[{]}")


def _deeper_than(payload: bytes, depth: int) -> bool:
    """Whether brackets nest deeper than that. Known before the decoder, which recurses, sees the text."""
    if not _more_than(depth // 2, b"[", payload) and not _more_than(depth // 2, b"{", payload):
        return False
    brackets = _STRING.sub(b"", payload).translate(_BRACKETS, _NOT_BRACKETS)
    for _ in range(depth):
        # One pass takes away exactly the innermost level, everywhere.
        brackets = brackets.replace(b"()", b"")
    # What is left is deeper still, or has no partner: the latter is for the decoder to refuse.
    return b"()" in brackets or brackets.count(b"(") > depth


def _more_than(number: int, byte: bytes, payload: bytes) -> bool:
    """Whether `byte` occurs more often. Finding is many times faster than counting where it is rare."""
    at = -1
    for _ in range(number + 1):
        at = payload.find(byte, at + 1)
        if at < 0:
            return False
    return True


def _refuse_lone_surrogates(value: dict[str, Any]) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise JsonRefused("bad_unicode", "half of a surrogate pair") from None
