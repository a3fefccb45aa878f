"""What the wire takes for JSON, and what it refuses."""

import json

import pytest

from kenaz_engine.channel.strict_json import DEPTH, JsonRefused, dumps, loads


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b'{"a":"\xff"}', "bad_utf8"),
        (b'{"a":"\xed\xa0\x80"}', "bad_utf8"),
        (b"", "bad_json"),
        (b"{", "bad_json"),
        (b'{"a":1} x', "bad_json"),
        (b'{"a":1,}', "bad_json"),
        (b'\xef\xbb\xbf{"a":1}', "bad_json"),
        (b'{"a":"\x00"}', "bad_json"),
        (b'{"a":"' + b'\\"' * 1000, "bad_json"),
        (b'{"a":01}', "bad_json"),
        (b"[" * 40 + b"}" * 40, "bad_json"),
        (b"[]", "not_object"),
        (b'"text"', "not_object"),
        (b"null", "not_object"),
        (b'{"a":1,"a":1}', "duplicate_key"),
        (b'{"a":{"b":1,"\\u0062":2}}', "duplicate_key"),
        (b'{"a":NaN}', "bad_number"),
        (b'{"a":-Infinity}', "bad_number"),
        (b'{"a":1e999}', "bad_number"),
        (b'{"a":' + b"9" * 21 + b"}", "bad_number"),
        (b'{"a":' + b"9" * 100_000 + b"}", "bad_number"),
        (b'{"a":"\\ud800"}', "bad_unicode"),
        (b'{"a":"\\uDFFFx"}', "bad_unicode"),
        (b'{"\\ud800":1}', "bad_unicode"),
        (b'{"a":' * (DEPTH + 1) + b"1" + b"}" * (DEPTH + 1), "too_deep"),
        (b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}", "too_deep"),
        (b'{"a":' + b"[" * 2_000_000, "too_deep"),
        (b'{"a":"' + b'[\\"' * 200_000, "bad_json"),
    ],
)
def test_what_is_refused(payload: bytes, code: str) -> None:
    with pytest.raises(JsonRefused) as caught:
        loads(payload)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "payload",
    [
        b'{"a":"\\ud83d\\ude00"}',
        b'{"a":"\\\\ud800"}',
        b'{"a":"' + b"[{" * 5_000 + b'"}',
        b'{"a":"\\"' + b"[{" * 5_000 + b'\\""}',
        b'{"a":[' + b",".join([b"[]"] * 5_000) + b"]}",
        b'{"a":' * (DEPTH - 1) + b"[]" + b"}" * (DEPTH - 1),
        b'{"a":-9223372036854775808,"b":1e308,"c":0.5}',
        b' {"a" : 1}\n',
    ],
)
def test_what_is_allowed_means_what_it_says(payload: bytes) -> None:
    assert loads(payload) == json.loads(payload)


def test_what_is_written_can_be_read() -> None:
    value = {"kind": "x-test", "text": '\N{GRINNING FACE} \x00 "', "list": [1, 2.5, None, True]}
    assert loads(dumps(value)) == value
    assert dumps({"a": [1, 2]}) == b'{"a":[1,2]}'


@pytest.mark.parametrize("depth", [4, 64, 512])
def test_the_depth_is_the_callers_to_choose(depth: int) -> None:
    payload = b'{"a":' * depth + b"1" + b"}" * depth
    assert loads(payload, depth) == json.loads(payload)
    with pytest.raises(JsonRefused) as caught:
        loads(b'{"a":' + payload + b"}", depth)
    assert caught.value.code == "too_deep"


def test_brackets_without_a_partner_do_not_exhaust_the_stack() -> None:
    with pytest.raises(JsonRefused) as caught:
        loads(b'{"a":' + b"[" * (511 + 512) + b"]" * 512, 512)
    assert caught.value.code == "bad_json"
