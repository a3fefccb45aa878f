"""Agents that begin anew on a stream that outlives them, guests that come back, and commands."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kenaz_engine.channel.framing import MARK, FramingError, LengthPrefixed, Marked
from kenaz_engine.channel.policy import ToolPolicy
from kenaz_engine.channel.protocol import (
    Action,
    Executed,
    Expected,
    GuestProtocol,
    NotExecuted,
    Output,
    Report,
    Restarted,
    State,
    ToGuest,
    ToHarness,
    Violation,
)

HELLO = {
    "kind": "hello",
    "protocol": 1,
    "session": "s-1",
    "token": "secret",
    "agent": "test/1",
    "build": "",
    "capabilities": ["exec"],
}
EXPECTED = Expected(
    session="s-1",
    token="secret",
    tools=ToolPolicy(allow=["fs.*"], deny=[]),
    capabilities=frozenset({"exec"}),
    one_stream=True,
)
INVOKE = {"kind": "tool.invoke", "id": "t1", "tool": "fs.read", "arguments": {}}
PROMPT = {"kind": "prompt", "id": "p1", "text": "CANARY"}


def raw(message: Any) -> bytes:
    return json.dumps(message).encode()


def said(actions: list[Action], kind: type = ToGuest) -> list[Any]:
    payloads = [a.payload for a in actions if isinstance(a, kind)]
    return [json.loads(payload) if payload else "mark" for payload in payloads]


def kinds(actions: list[Action], kind: type = ToGuest) -> list[str]:
    return [m if m == "mark" else f"{m['kind']} {m.get('code', '')}".strip() for m in said(actions, kind)]


def opened(expected: Expected = EXPECTED, **more: Any) -> GuestProtocol:
    protocol = GuestProtocol(expected, **more)
    protocol.from_guest(raw(HELLO))
    assert protocol.state is State.OPEN
    return protocol


# Marks [F6]

json_text = st.dictionaries(st.text(max_size=3), st.text(max_size=20), max_size=3).map(
    lambda value: json.dumps(value, ensure_ascii=False).encode(errors="replace")
)


@given(st.data())
def test_a_mark_is_found_whatever_it_cuts_and_however_it_comes(data: st.DataObject) -> None:
    """What each writer wrote whole comes whole, and nothing that two of them wrote together."""
    stream, expected = b"", []
    for payloads in data.draw(st.lists(st.lists(json_text, max_size=4), min_size=1, max_size=4)):
        whole = [LengthPrefixed().encode(payload) for payload in payloads]
        bytes_of = b"".join(whole)
        cut = data.draw(st.integers(0, len(bytes_of)))
        if not stream.endswith(MARK):  # else the marks of both are one
            expected.append(b"")
        stream += MARK + bytes_of[:cut]
        for frame, payload in zip(whole, payloads, strict=True):
            cut -= len(frame)
            if cut < 0:
                break
            expected.append(payload)
    framing, found = Marked(), []
    expected += [b"{}"] if stream.endswith(MARK) else [b"", b"{}"]
    while stream:
        size = data.draw(st.integers(1, 9))
        found += framing.feed(stream[:size])
        stream = stream[size:]
    found += framing.feed(MARK + Marked().encode(b"{}"))
    assert found == expected
    assert framing.pending == 0
    framing.close()


@pytest.mark.parametrize("length", [1, 255, 65535, 0xFFFFFF])
def test_no_length_is_taken_for_a_mark(length: int) -> None:
    framing = Marked(0x1000000)
    frame = framing.encode(b"x" * length)
    for at in range(4):
        assert framing.feed(frame[at : at + 1]) == []
    assert framing.feed(frame[4:]) == [frame[4:]]


def test_what_is_no_frame_is_an_error_until_a_mark() -> None:
    framing = Marked(100)
    assert framing.feed(b"\0\0\0\0") == []
    assert framing.error is not None
    with pytest.raises(FramingError):
        framing.close()
    assert framing.feed(b"more" + MARK + framing.encode(b"{}")) == [b"", b"{}"]
    assert framing.error is None


def test_a_length_that_may_still_be_a_mark_is_no_error_yet() -> None:
    framing = Marked(100)
    assert framing.feed(b"\0\xff\xff\xff") == []
    assert framing.error is None
    assert framing.feed(b"\xff{") == [b""]


def test_marks_without_end_cost_no_memory() -> None:
    framing = Marked()
    for _ in range(100):
        assert framing.feed(MARK * 1000) == []
    assert framing.pending == len(MARK)


# Agents that begin anew [H8]


@pytest.mark.parametrize("payload", [b"", raw(HELLO)])
def test_an_agent_that_begins_anew_is_a_lost_guest(payload: bytes) -> None:
    protocol = opened()
    protocol.from_harness(raw(PROMPT))
    actions = protocol.from_guest(payload)
    assert actions[-1] == Restarted(payload)
    assert kinds(actions, ToHarness) == ["prompt.error gone", "guest.lost"]
    assert protocol.state is State.CLOSED
    assert next(a.outcome for a in actions if isinstance(a, Report)) == "restarted"


def test_a_mark_is_answered_by_a_mark() -> None:
    protocol = GuestProtocol(EXPECTED)
    assert protocol.from_guest(b"") == []
    assert kinds(protocol.from_guest(raw(HELLO))) == ["mark", "welcome"]


def test_a_refusal_of_an_agent_that_marked_is_marked_too() -> None:
    protocol = GuestProtocol(EXPECTED)
    protocol.from_guest(b"")
    assert kinds(protocol.from_guest(raw({**HELLO, "token": "x"}))) == ["mark", "refused bad_token"]


def test_elsewhere_a_second_hello_is_a_violation() -> None:
    actions = opened(replace(EXPECTED, one_stream=False)).from_guest(raw(HELLO))
    assert [a.code for a in actions if isinstance(a, Violation)] == ["second_hello"]


# Guests that come back [S4, S5]


def test_late_answers_to_a_guest_that_was_lost_are_dropped() -> None:
    before = opened()
    before.from_guest(raw(INVOKE))
    before.from_guest(raw(PROMPT))
    before.lost()
    protocol = opened(void=before.void)
    assert kinds(protocol.from_guest(raw(INVOKE))) == ["tool.error id_in_use"]
    delta = {"kind": "prompt.delta", "id": "p1", "text": ""}
    answers = [delta, {"kind": "tool.result", "id": "t1", "result": 1}]
    for answer in answers:
        (report,) = protocol.from_harness(raw(answer))
        assert isinstance(report, Report)
        assert report.outcome == "late"
    assert said(protocol.from_guest(raw(INVOKE)), ToHarness) == [INVOKE], (
        "the harness has answered the old one"
    )
    assert kinds(protocol.from_guest(raw(PROMPT))) == ["prompt.error id_in_use"], "a delta ends nothing"


def test_what_was_answered_is_not_void() -> None:
    before = opened()
    before.from_guest(raw(PROMPT))
    before.from_harness(raw({"kind": "prompt.result", "id": "p1", "text": ""}))
    before.lost()
    assert before.void == {}


def test_void_requests_go_on_to_the_third_guest() -> None:
    first = opened()
    first.from_guest(raw(INVOKE))
    first.lost()
    second = opened(void=first.void)
    second.lost()
    assert second.void == {"t1": "tool"}


# Commands [X]


def test_a_command_from_its_start_to_its_end() -> None:
    protocol = opened()
    assert said(protocol.execute(["ls", "-l"])) == [{"kind": "exec", "id": "x1", "argv": ["ls", "-l"]}]
    output = {"kind": "exec.output", "id": "x1", "stream": "stderr", "text": "CANARY"}
    assert protocol.from_guest(raw(output))[-1] == Output("stderr", "CANARY")
    assert protocol.from_guest(raw({"kind": "exec.result", "id": "x1", "code": 3}))[-1] == Executed(3)
    assert protocol.cancel_command() == []
    assert said(protocol.execute(["ls"]))[0]["id"] == "x2"
    assert kinds(protocol.cancel_command()) == ["exec.cancel"]
    failed = {"kind": "exec.error", "id": "x2", "code": "cancelled", "message": "m"}
    assert protocol.from_guest(raw(failed))[-1] == NotExecuted("cancelled", "m")


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({"kind": "exec.result", "id": "x9", "code": 0}, "unknown_id"),
        ({"kind": "exec.result", "id": "x1", "code": 256}, "bad_member"),
        ({"kind": "exec.result", "id": "x1", "code": True}, "bad_member"),
        ({"kind": "exec.output", "id": "x1", "stream": "stdin", "text": ""}, "bad_member"),
        ({"kind": "exec", "id": "x1", "argv": ["ls"]}, "bad_kind"),
    ],
)
def test_what_a_guest_may_not_say_of_a_command(message: dict[str, Any], code: str) -> None:
    protocol = opened()
    protocol.execute(["ls"])
    actions = protocol.from_guest(raw(message))
    assert [a.code for a in actions if isinstance(a, Violation)] == [code]


def test_a_harness_has_no_commands() -> None:
    actions = opened().from_harness(raw({"kind": "exec", "id": "x1", "argv": ["ls"]}))
    assert [a.code for a in actions if isinstance(a, Violation)] == ["bad_kind"]


def test_no_command_on_a_channel_that_ends() -> None:
    protocol = opened()
    protocol.drain(1)
    assert protocol.execute(["ls"]) == []
    protocol.lost()
    assert protocol.cancel_command() == []
