"""The conformance vectors hold for the launcher's side. The Go client reads the same files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from kenaz_engine.channel import strict_json
from kenaz_engine.channel.dialect import HARNESS_VM, KENAZ, Talk
from kenaz_engine.channel.framing import Framing, FramingError, LengthPrefixed, Lines
from kenaz_engine.channel.policy import ToolPolicy
from kenaz_engine.channel.protocol import (
    Action,
    Bye,
    Expected,
    HarnessEnded,
    Limits,
    Refused,
    ToGuest,
    ToHarness,
    Violation,
)

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "specs/kenaz_specs/protocol/vectors").glob("*.json"))
REFERENCE = (ROOT / "docs/reference/vsock-protocol.md").read_text()
CONTENT = {path.stem: json.loads(path.read_text()) for path in FILES}


def cases(kind: str, member: str) -> list[Any]:
    return [
        pytest.param(content, case, id=f"{stem}: {case['name']}")
        for stem, content in CONTENT.items()
        if content["kind"] == kind
        for case in content[member]
    ]


def framing(content: Any, limit: int) -> Framing:
    return LengthPrefixed(limit) if content["framing"] == "length-prefixed" else Lines(limit, limit)


def fault_of(act: Callable[[], object]) -> str | None:
    try:
        act()
    except FramingError as exc:
        return exc.code
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_files_are_of_their_schema(path: Path) -> None:
    schema = json.loads((ROOT / "specs/kenaz_specs/protocol/vectors.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(CONTENT[path.stem])


def test_both_framings_both_dialects_and_every_rule_of_the_reference() -> None:
    assert CONTENT.keys() == {"harness-vm", "json", "kenaz", "length-prefixed", "ndjson"}
    members = ("decode", "encode", "payloads", "conversations")
    shown = [case for content in CONTENT.values() for member in members for case in content.get(member, ())]
    for rule in {case["rule"] for case in shown}:
        assert f"- **{rule}** " in REFERENCE, rule
    for content in CONTENT.values():
        for member in members:
            names = [case["name"] for case in content.get(member, ())]
            assert len(names) == len(set(names))


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(("content", "case"), cases("framing", "decode"))
def test_decoding(content: Any, case: Any, size: int) -> None:
    codec = framing(content, case["limit"])
    data = bytes.fromhex(case["bytes"])
    payloads = [p for at in range(0, len(data), size) for p in codec.feed(data[at : at + size])]
    assert [payload.hex() for payload in payloads] == case["payloads"]
    assert (codec.error.code if codec.error else None) == case["error"]
    if case["error"] is None:
        assert fault_of(codec.close) == case["end"]


@pytest.mark.parametrize(("content", "case"), cases("framing", "encode"))
def test_encoding(content: Any, case: Any) -> None:
    codec = framing(content, case["limit"])
    payload = bytes.fromhex(case["payload"])
    assert fault_of(lambda: codec.encode(payload)) == case["error"]
    if case["bytes"] is not None:
        assert codec.encode(payload).hex() == case["bytes"]


@pytest.mark.parametrize(("content", "case"), cases("json", "payloads"))
def test_what_is_a_message(content: Any, case: Any) -> None:
    hello = {"kind": "hello", "protocol": 1, "session": "s", "token": "t", "agent": "", "build": ""}
    expected = Expected("s", "t", ToolPolicy(), Limits(depth=case["depth"]))
    talk = KENAZ.talk(expected, {}, None)
    talk.from_guest(strict_json.dumps({**hello, "capabilities": []}))
    actions = talk.from_guest(bytes.fromhex(case["payload"]))
    found = next((action.code for action in actions if isinstance(action, Violation)), None)
    # `ping` lacks its nonce here, which another rule is about.
    assert (None if found == "bad_member" else found) == case["error"]


Said = tuple[str, Any]


def said(actions: list[Action]) -> Iterator[Said]:
    for action in actions:
        match action:
            case ToGuest(payload):
                yield "guest", payload
            case ToHarness(payload):
                yield "harness", payload
            case Refused(code, _) | Violation("guest", code, _):
                yield "end", ("refused" if isinstance(action, Refused) else "violation", code)
            case Bye(reason):
                yield "end", ("bye", reason)
            case HarnessEnded():
                yield "end", ("harness", None)


def plain(payload: bytes) -> Any:
    message = json.loads(payload)
    return {name: value for name, value in message.items() if name not in ("message", "message_truncated")}


def happens(talk: Talk, step: Any) -> list[Action]:
    match step:
        case {"from": "guest", "payload": payload}:
            return talk.from_guest(payload.encode())
        case {"from": "harness", "payload": payload}:
            return talk.from_harness(payload.encode())
        case {"drain": seconds}:
            return talk.drain(seconds)
        case {"lost": True}:
            return talk.lost()
        case {"harnessGone": True}:
            return talk.harness_gone()
    raise AssertionError(step)


@pytest.mark.parametrize(("content", "case"), cases("conversations", "conversations"))
def test_conversations(content: Any, case: Any) -> None:
    dialect = {"kenaz": KENAZ, "harness-vm": HARNESS_VM}[content["dialect"]]
    limits = Limits(frame=content["limits"]["frame"], invocations=content["limits"]["invocations"])
    tools = ToolPolicy(content["tools"]["allow"], content["tools"]["deny"])
    capabilities = frozenset(content["capabilities"])
    talk = dialect.talk(Expected(content["session"], content["token"], tools, limits, capabilities), {}, None)
    heard = list(said(talk.begin()))
    for step in case["steps"]:
        match step:
            case {"to": side, "payload": payload}:
                assert heard.pop(0) == (side, payload.encode())
            case {"to": side, "made": made}:
                assert heard
                to, payload = heard.pop(0)
                assert (to, plain(payload)) == (side, made)
            case {"end": how}:
                assert heard.pop(0) == ("end", (how, step.get("code")))
            case _:
                assert heard == []
                heard = list(said(happens(talk, step)))
    assert heard == []
