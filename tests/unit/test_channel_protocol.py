"""The conversation with a guest, message by message."""

import json
from dataclasses import replace
from typing import Any

import pytest

from kenaz_engine.channel.policy import ToolPolicy
from kenaz_engine.channel.protocol import (
    Action,
    Bye,
    Expected,
    GuestProtocol,
    HarnessEnded,
    Hello,
    Limits,
    Opened,
    Refused,
    Report,
    Side,
    State,
    ToGuest,
    ToHarness,
    Violation,
)
from kenaz_engine.channel.resume import Kept

HELLO = {
    "kind": "hello",
    "protocol": 1,
    "session": "s-1",
    "token": "secret",
    "agent": "test/1",
    "build": "2026.11",
    "capabilities": ["drain", "approval", "other"],
    "clock": {"init": 1.5, "agent": 2, "hello": 2.25},
}
EXPECTED = Expected(
    session="s-1",
    token="secret",
    tools=ToolPolicy(allow=["fs.*"], deny=["fs.delete"]),
    limits=Limits(frame=5000, invocations=3),
    capabilities=frozenset({"approval", "drain", "never-asked"}),
)
INVOKE = {"kind": "tool.invoke", "id": "t1", "tool": "fs.read", "arguments": {}}
PROMPT = {"kind": "prompt", "id": "p1", "text": "CANARY"}


def raw(message: Any) -> bytes:
    return json.dumps(message).encode()


def said(actions: list[Action], kind: type = ToGuest) -> list[Any]:
    """The messages for one side, without the free text of errors."""
    messages = [json.loads(a.payload) for a in actions if isinstance(a, kind)]
    return [{k: v for k, v in m.items() if k != "message"} for m in messages]


def one(actions: list[Action], kind: type) -> Any:
    (found,) = [a for a in actions if isinstance(a, kind)]
    return found


def outcomes(actions: list[Action]) -> list[str]:
    return [f"{a.direction} {a.kind} {a.outcome}" for a in actions if isinstance(a, Report)]


def opened(expected: Expected = EXPECTED) -> GuestProtocol:
    protocol = GuestProtocol(expected)
    protocol.from_guest(raw(HELLO))
    assert protocol.state is State.OPEN
    return protocol


# Handshake


def test_hello_is_answered_by_welcome() -> None:
    protocol = GuestProtocol(EXPECTED)
    actions = protocol.from_guest(raw(HELLO))
    assert said(actions) == [
        {
            "kind": "welcome",
            "protocol": 1,
            "session": "s-1",
            "capabilities": ["approval", "drain"],
            "limits": {"frame": 5000, "invocations": 3},
            "tools": {"allow": ["fs.*"], "deny": ["fs.delete"]},
        }
    ]
    clock = {"init": 1.5, "agent": 2.0, "hello": 2.25}
    assert one(actions, Opened).hello == Hello("test/1", "2026.11", ("approval", "drain"), clock)
    assert outcomes(actions) == ["from-guest hello taken", "to-guest welcome sent"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"protocol": 2}, "bad_protocol"),
        ({"protocol": 1.0}, "bad_protocol"),
        ({"protocol": True}, "bad_protocol"),
        ({"protocol": None}, "bad_protocol"),
        ({"session": "s-2"}, "bad_session"),
        ({"session": 1}, "bad_hello"),
        ({"token": "Secret"}, "bad_token"),
        ({"token": ""}, "bad_token"),
        ({"token": "\N{GREEK SMALL LETTER ALPHA}"}, "bad_token"),
        ({"token": None}, "bad_hello"),
        ({"agent": "a\n"}, "bad_hello"),
        ({"agent": "a" * 129}, "bad_hello"),
        ({"build": 7}, "bad_hello"),
        ({"capabilities": "drain"}, "bad_hello"),
        ({"capabilities": ["Drain"]}, "bad_hello"),
        ({"capabilities": ["a"] * 65}, "bad_hello"),
        ({"clock": []}, "bad_hello"),
        ({"clock": {"init": "1"}}, "bad_hello"),
        ({"clock": {"init": -1}}, "bad_hello"),
        ({"clock": {"init": True}}, "bad_hello"),
        ({"clock": {"init": 10**19}}, "bad_hello"),
        ({"kind": "ping"}, "bad_hello"),
        ({"kind": None}, "bad_hello"),
    ],
)
def test_a_hello_that_is_refused(change: dict[str, Any], code: str) -> None:
    protocol = GuestProtocol(EXPECTED)
    actions = protocol.from_guest(raw({**HELLO, **change}))
    assert said(actions) == [{"kind": "refused", "code": code}]
    assert one(actions, Refused).code == code
    assert protocol.state is State.CLOSED
    assert protocol.from_guest(raw(HELLO)) == []
    assert protocol.lost() == []


@pytest.mark.parametrize("payload", [b"\xff", b"[]", b'{"kind":"hello","kind":"hello"}'])
def test_what_is_no_message_is_refused(payload: bytes) -> None:
    actions = GuestProtocol(EXPECTED).from_guest(payload)
    assert one(actions, Refused).code == "bad_hello"


def test_a_hello_that_is_no_frame_is_refused() -> None:
    actions = GuestProtocol(EXPECTED).fault("frame_too_large", "too large")
    assert said(actions) == [{"kind": "refused", "code": "bad_hello"}]
    assert outcomes(actions) == ["from-guest  frame_too_large", "to-guest refused sent"]


def test_the_token_shows_nowhere() -> None:
    assert "secret" not in repr(EXPECTED)
    for token in ("secret", "secret2"):
        actions = GuestProtocol(EXPECTED).from_guest(raw({**HELLO, "token": token}))
        assert "secret" not in repr(actions)


# What passes


@pytest.mark.parametrize(
    "message",
    [
        INVOKE,
        {**INVOKE, "more": {"is": "ignored"}},
        PROMPT,
        {"kind": "x-note", "id": 7, "anything": [1]},
    ],
)
def test_what_passes_comes_out_byte_for_byte(message: dict[str, Any]) -> None:
    spaced = json.dumps(message, indent=3).encode()
    protocol = opened()
    actions = protocol.from_guest(spaced)
    assert one(actions, ToHarness).payload is spaced
    assert outcomes(actions) == [f"from-guest {message['kind']} relayed"]
    actions = protocol.from_harness(spaced)
    assert one(actions, ToGuest).payload is spaced


@pytest.mark.parametrize(
    ("request_", "answers"),
    [
        (INVOKE, [{"kind": "tool.result", "result": None}]),
        (INVOKE, [{"kind": "tool.error", "code": "io", "message": "no"}]),
        (PROMPT, [{"kind": "prompt.delta", "text": "a"}] * 3 + [{"kind": "prompt.result", "text": "aaa"}]),
        (PROMPT, [{"kind": "prompt.error", "code": "no", "message": ""}]),
    ],
)
def test_a_request_has_exactly_one_terminal_message(
    request_: dict[str, Any], answers: list[dict[str, Any]]
) -> None:
    protocol = opened()
    protocol.from_guest(raw(request_))
    assert protocol.open_requests == {"guest": 1, "harness": 0}
    for answer in answers:
        actions = protocol.from_harness(raw({**answer, "id": request_["id"]}))
        assert outcomes(actions) == [f"from-harness {answer['kind']} relayed"]
    assert protocol.open_requests == {"guest": 0, "harness": 0}
    again = protocol.from_harness(raw({**answers[-1], "id": request_["id"]}))
    assert one(again, Violation).code == "unknown_id"
    assert protocol.state is State.OPEN  # the guest has done nothing wrong


def test_each_side_has_ids_of_its_own() -> None:
    protocol = opened()
    protocol.from_guest(raw(PROMPT))
    protocol.from_harness(raw(PROMPT))
    result = raw({"kind": "prompt.result", "id": "p1", "text": ""})
    assert one(protocol.from_guest(result), ToHarness).payload == result
    assert protocol.open_requests == {"guest": 1, "harness": 0}
    assert one(protocol.from_harness(result), ToGuest).payload == result


def test_cancel_passes_while_its_request_is_open_and_is_dropped_after() -> None:
    protocol = opened()
    cancel = raw({"kind": "tool.cancel", "id": "t1"})
    assert outcomes(protocol.from_guest(cancel)) == ["from-guest tool.cancel late"]
    protocol.from_guest(raw(INVOKE))
    assert one(protocol.from_guest(cancel), ToHarness).payload == cancel
    assert protocol.open_requests["guest"] == 1
    protocol.from_harness(raw({"kind": "tool.error", "id": "t1", "code": "cancelled", "message": ""}))
    assert said(protocol.from_guest(cancel), ToHarness) == []


# What the launcher answers itself


@pytest.mark.parametrize("tool", ["fs.delete", "web.search"])
def test_a_denied_tool_never_reaches_the_other_side(tool: str) -> None:
    protocol = opened()
    actions = protocol.from_guest(raw({**INVOKE, "tool": tool}))
    assert said(actions) == [{"kind": "tool.error", "id": "t1", "code": "denied"}]
    assert said(actions, ToHarness) == []
    assert outcomes(actions) == ["from-guest tool.invoke denied", "to-guest tool.error sent"]
    assert one(actions[:1], Report).name == tool
    assert protocol.open_requests["guest"] == 0
    actions = protocol.from_harness(raw({**INVOKE, "tool": tool}))
    assert said(actions, ToHarness) == [{"kind": "tool.error", "id": "t1", "code": "denied"}]
    assert said(actions) == []


def test_more_requests_than_the_limit_are_answered_busy() -> None:
    protocol = opened()
    for number in range(3):
        protocol.from_guest(raw({**PROMPT, "id": str(number)}))
    actions = protocol.from_guest(raw({**PROMPT, "id": "one-more"}))
    assert said(actions) == [{"kind": "prompt.error", "id": "one-more", "code": "busy"}]
    protocol.from_harness(raw({"kind": "prompt.result", "id": "0", "text": ""}))
    assert said(protocol.from_guest(raw({**PROMPT, "id": "0"})), ToHarness) == [
        {**PROMPT, "id": "0"},
    ]


def test_heartbeats_are_answered_and_never_relayed() -> None:
    protocol = opened()
    ping, pong = raw({"kind": "ping", "nonce": "n1"}), raw({"kind": "pong", "nonce": "n9"})
    assert said(protocol.from_guest(ping)) == [{"kind": "pong", "nonce": "n1"}]
    assert said(protocol.from_harness(ping), ToHarness) == [{"kind": "pong", "nonce": "n1"}]
    assert outcomes(protocol.from_guest(pong)) == ["from-guest pong taken"]
    assert said(protocol.from_guest(pong), ToHarness) == []


# The end


def test_drain_lets_open_requests_end_and_refuses_new_ones() -> None:
    protocol = opened()
    protocol.from_guest(raw(INVOKE))
    protocol.from_harness(raw(PROMPT))
    assert said(protocol.drain(2.5)) == [{"kind": "drain", "deadline": 2.5}]
    assert protocol.drain(2.5) == []
    assert protocol.state is State.DRAINING
    assert said(protocol.from_guest(raw({**INVOKE, "id": "t2"}))) == [
        {"kind": "tool.error", "id": "t2", "code": "draining"}
    ]
    assert said(protocol.from_harness(raw({**PROMPT, "id": "p2"})), ToHarness) == [
        {"kind": "prompt.error", "id": "p2", "code": "draining"}
    ]
    result = {"kind": "tool.result", "id": "t1", "result": 1}
    assert said(protocol.from_harness(raw(result))) == [result]
    answer = {"kind": "prompt.result", "id": "p1", "text": "done"}
    assert said(protocol.from_guest(raw(answer)), ToHarness) == [answer]
    assert one(protocol.from_guest(raw({"kind": "bye", "reason": "drained"})), Bye) == Bye("drained")
    assert protocol.state is State.CLOSED


def test_what_the_harness_asked_is_answered_for_a_guest_that_is_gone() -> None:
    protocol = opened()
    protocol.from_harness(raw(PROMPT))
    protocol.from_harness(raw(INVOKE))
    assert said(protocol.lost(), ToHarness) == [
        {"kind": "prompt.error", "id": "p1", "code": "gone"},
        {"kind": "tool.error", "id": "t1", "code": "gone"},
        {"kind": "guest.lost"},
    ]
    assert said(protocol.from_harness(raw({**PROMPT, "id": "p2"})), ToHarness) == [
        {"kind": "prompt.error", "id": "p2", "code": "gone"}
    ]
    late = {"kind": "tool.result", "id": "t7", "result": 1}
    assert outcomes(protocol.from_harness(raw(late))) == ["from-harness tool.result late"]
    assert protocol.bye("closed") == []


def test_what_the_guest_asked_is_answered_for_a_harness_that_is_gone() -> None:
    protocol = opened()
    protocol.from_guest(raw(PROMPT))
    assert said(protocol.harness_gone()) == [{"kind": "prompt.error", "id": "p1", "code": "unavailable"}]
    assert protocol.harness_gone() == []
    assert said(protocol.from_guest(raw(INVOKE))) == [
        {"kind": "tool.error", "id": "t1", "code": "unavailable"}
    ]


def test_the_launcher_takes_leave_once() -> None:
    protocol = opened()
    assert said(protocol.bye("closed")) == [{"kind": "bye", "reason": "closed"}]
    assert protocol.bye("closed") == []
    assert protocol.from_guest(b"anything") == []


def test_the_harness_ends_the_session() -> None:
    assert HarnessEnded() in opened().from_harness(raw({"kind": "end"}))


HOSTILE = [
    (b"\xff\xfe", "bad_utf8"),
    (b"not json", "bad_json"),
    (b"[]", "not_object"),
    (b"{}", "bad_kind"),
    (b'{"kind":1}', "bad_kind"),
    (b'{"kind":""}', "bad_kind"),
    (b'{"kind":"Prompt"}', "bad_kind"),
    (b'{"kind":"' + b"x" * 65 + b'"}', "bad_kind"),
    (b'{"kind":"tool.frobnicate"}', "bad_kind"),
    (b'{"kind":"welcome"}', "bad_kind"),
    (b'{"kind":"session.open"}', "bad_kind"),
    (b'{"kind":"ping","kind":"pong","nonce":"a"}', "duplicate_key"),
    (b'{"kind":"ping","nonce":NaN}', "bad_number"),
    (b'{"kind":"ping","nonce":"\\ud800"}', "bad_unicode"),
    (b'{"kind":"x-deep","a":' + b"[" * 100 + b"]" * 100 + b"}", "too_deep"),
    (raw({"kind": "ping"}), "bad_member"),
    (raw({"kind": "ping", "nonce": "a b"}), "bad_member"),
    (raw({"kind": "pong", "nonce": ""}), "bad_member"),
    (raw({**INVOKE, "id": ""}), "bad_member"),
    (raw({**INVOKE, "id": "x" * 129}), "bad_member"),
    (raw({**INVOKE, "id": "a\n"}), "bad_member"),
    (raw({**INVOKE, "id": 7}), "bad_member"),
    (raw({"kind": "tool.result", "id": "t1"}), "bad_member"),
    (raw({"kind": "tool.error", "id": "t1", "code": "No Code", "message": ""}), "bad_member"),
    (raw({"kind": "tool.result", "id": "nobody-asked", "result": 1}), "unknown_id"),
    (raw({"kind": "prompt.delta", "id": "nobody-asked", "text": ""}), "unknown_id"),
    (raw({"kind": "prompt.result", "id": "harness-tool", "text": ""}), "unknown_id"),
    (raw({**PROMPT, "id": "taken"}), "duplicate_id"),
    (raw({**INVOKE, "id": "taken"}), "duplicate_id"),
]


MALFORMED = [
    {**INVOKE, "tool": "CANARY CANARY"},
    {**INVOKE, "tool": ["fs.read"]},
    {**INVOKE, "arguments": ["CANARY"]},
    {"kind": "tool.invoke", "id": "t1", "tool": "fs.read"},
    {"kind": "tool.invoke", "id": "t1", "arguments": {}},
    {"kind": "prompt", "id": "p1"},
    {"kind": "prompt", "id": "p1", "text": 1},
]


@pytest.mark.parametrize("side", ["guest", "harness"])
@pytest.mark.parametrize("request_", MALFORMED)
def test_a_malformed_request_is_answered_and_harms_nothing(side: Side, request_: dict[str, Any]) -> None:
    protocol = opened()
    for _ in range(2):  # its id is free again at once
        hear = protocol.from_guest if side == "guest" else protocol.from_harness
        actions = hear(raw(request_))
        family = request_["kind"].partition(".")[0]
        (answer,) = said(actions) if side == "guest" else said(actions, ToHarness)
        assert answer == {"kind": f"{family}.error", "id": request_["id"], "code": "malformed"}
        reports = [a for a in actions if isinstance(a, Report)]
        assert reports[0].outcome == "malformed"
        assert "CANARY" not in repr(reports)
        assert protocol.state is State.OPEN
        assert protocol.open_requests == {"guest": 0, "harness": 0}


def busy_protocol() -> GuestProtocol:
    protocol = opened()
    protocol.from_guest(raw({**PROMPT, "id": "taken"}))
    protocol.from_harness(raw({**INVOKE, "id": "harness-tool"}))
    return protocol


@pytest.mark.parametrize(("payload", "code"), HOSTILE)
def test_a_guest_that_breaks_a_rule_is_cut_off(payload: bytes, code: str) -> None:
    protocol = busy_protocol()
    actions = protocol.from_guest(payload)
    violation = one(actions, Violation)
    assert (violation.side, violation.code) == ("guest", code)
    assert said(actions) == [{"kind": "error", "code": code}]
    assert said(actions, ToHarness) == [{"kind": "tool.error", "id": "harness-tool", "code": "gone"}]
    assert protocol.state is State.CLOSED
    assert one(actions[:1], Report).outcome == code


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (raw(HELLO), "second_hello"),
        (raw({"kind": "bye"}), "bad_member"),
        (raw({"kind": "bye", "reason": "a secret, perhaps"}), "bad_member"),
        (raw({"kind": "end"}), "bad_kind"),
    ],
)
def test_breaches_that_only_a_guest_can_commit(payload: bytes, code: str) -> None:
    assert one(opened().from_guest(payload), Violation).code == code


@pytest.mark.parametrize(
    ("payload", "code"),
    [*(case for case in HOSTILE if b"harness-tool" not in case[0]), (b"x" * 5001, "frame_too_large")],
)
def test_a_harness_that_breaks_a_rule_harms_no_guest(payload: bytes, code: str) -> None:
    protocol = opened()
    protocol.from_harness(raw({**PROMPT, "id": "taken"}))
    actions = protocol.from_harness(payload)
    violation = one(actions, Violation)
    assert (violation.side, violation.code) == ("harness", code)
    assert said(actions, ToHarness) == [{"kind": "error", "code": code}]
    assert said(actions) == []
    assert protocol.state is State.OPEN


def test_the_depth_is_the_sessions() -> None:
    protocol = opened(replace(EXPECTED, limits=replace(EXPECTED.limits, depth=4)))
    assert outcomes(protocol.from_guest(raw({"kind": "x-a", "a": [[[]]]}))) == ["from-guest x-a relayed"]
    actions = protocol.from_guest(raw({"kind": "x-a", "a": [[[[]]]]}))
    assert one(actions, Violation).code == "too_deep"


def test_frames_that_are_none_are_a_violation() -> None:
    protocol = opened()
    actions = protocol.fault("frame_empty", "a frame of length 0")
    assert one(actions, Violation) == Violation("guest", "frame_empty", "a frame of length 0")


def test_a_violation_that_the_guest_reports_ends_the_channel() -> None:
    protocol = opened()
    actions = protocol.from_guest(raw({"kind": "error", "code": "bad_kind", "message": "CANARY"}))
    violation = one(actions, Violation)
    assert violation.code == "reported"
    assert "bad_kind" in violation.message
    assert "CANARY" not in violation.message
    assert protocol.state is State.CLOSED


# Deadlines


@pytest.mark.parametrize("asker", ["guest", "harness"])
def test_an_invocation_that_takes_too_long_is_ended_once(asker: Side) -> None:
    protocol = opened(replace(EXPECTED, limits=replace(EXPECTED.limits, tool=10.0, invocations=2)))
    sides = {"guest": (protocol.from_guest, ToGuest), "harness": (protocol.from_harness, ToHarness)}
    (ask, to_asker), (reply, to_asked) = sides.pop(asker), next(iter(sides.values()))
    ask(raw(INVOKE), 100.0)
    ask(raw(PROMPT), 100.0)  # a model may think for as long as it likes
    assert protocol.next_deadline(105.0) == 110.0
    assert protocol.expire(109.9) == []
    actions = protocol.expire(110.0)
    assert said(actions, to_asker) == [{"kind": "tool.error", "id": "t1", "code": "timeout"}]
    assert said(actions, to_asked) == [{"kind": "tool.cancel", "id": "t1"}]
    assert protocol.expire(999.0) == []
    assert protocol.next_deadline(999.0) == 1009.0
    # Until it is answered it takes its place, and its id.
    assert said(ask(raw({**INVOKE, "id": "t2"}), 111.0), to_asker)[0]["code"] == "busy"
    ask(raw({"kind": "tool.cancel", "id": "t1"}), 111.0)
    late = reply(raw({"kind": "tool.result", "id": "t1", "result": 1}), 112.0)
    assert [r.outcome for r in late if isinstance(r, Report)] == ["late"]
    assert said(ask(raw(INVOKE), 113.0), to_asked) == [INVOKE]
    assert protocol.open_requests[asker] == 2


def test_the_id_of_an_invocation_that_took_too_long_is_in_use_until_it_is_answered() -> None:
    protocol = opened(replace(EXPECTED, limits=replace(EXPECTED.limits, tool=10.0)))
    protocol.from_guest(raw(INVOKE), 0.0)
    protocol.expire(10.0)
    assert said(protocol.from_guest(raw(INVOKE), 11.0))[0]["code"] == "id_in_use"
    protocol.lost()
    assert protocol.void == {"t1": "tool"}


@pytest.mark.parametrize("side", ["guest", "harness"])
def test_the_policy_holds_for_both_sides(side: Side) -> None:
    protocol = opened()
    ask, to = (protocol.from_guest, ToGuest) if side == "guest" else (protocol.from_harness, ToHarness)
    for tool in ("fs.delete", "web.search", "fs", "FS.read"):
        actions = ask(raw({**INVOKE, "tool": tool}))
        assert said(actions, to) == [{"kind": "tool.error", "id": "t1", "code": "denied"}]
        assert len([a for a in actions if isinstance(a, ToGuest | ToHarness)]) == 1


# A guest that is away


def resumable() -> GuestProtocol:
    expected = replace(EXPECTED, capabilities=frozenset({"resume"}))
    protocol = GuestProtocol(expected)
    actions = protocol.from_guest(raw({**HELLO, "capabilities": ["resume"]}))
    assert said(actions)[0]["resume"] == {"conversation": 1, "received": 0, "window": 1 << 20}
    return protocol


def test_requests_stay_open_while_a_guest_is_away() -> None:
    protocol = resumable()
    protocol.from_guest(raw(INVOKE))
    protocol.from_harness(raw(PROMPT))
    assert protocol.lost() == []
    assert protocol.state is State.AWAY
    assert protocol.from_guest(raw(PROMPT)) == []
    assert said(protocol.from_harness(raw({"kind": "tool.result", "id": "t1", "result": 1})))
    protocol.resumed()
    assert said(protocol.from_guest(raw({"kind": "prompt.result", "id": "p1", "text": ""})), ToHarness)
    assert protocol.open_requests == {"guest": 0, "harness": 0}


def test_a_guest_that_does_not_come_back_is_missed_then() -> None:
    protocol = resumable()
    protocol.from_harness(raw(PROMPT))
    protocol.lost()
    assert said(protocol.give_up(), ToHarness) == [
        {"kind": "prompt.error", "id": "p1", "code": "gone"},
        {"kind": "guest.lost"},
    ]
    assert protocol.give_up() == []


@pytest.mark.parametrize(
    ("claim", "resumed"),
    [((3, 5), 5), ((3, 4), 4), ((3, 9), 9), ((3, 3), None), ((3, 10), None), ((2, 5), None), (None, None)],
)
def test_a_claim_that_is_not_true_begins_anew(claim: tuple[int, int] | None, resumed: int | None) -> None:
    expected = replace(EXPECTED, capabilities=frozenset({"resume"}))
    protocol = GuestProtocol(expected, kept=Kept(3, 7, 4, 9))
    hello = {**HELLO, "capabilities": ["resume"]}
    if claim is not None:
        hello["resume"] = {"conversation": claim[0], "received": claim[1]}
    actions = protocol.from_guest(raw(hello))
    assert one(actions, Opened).resumed == resumed
    welcome = said(actions)[0]["resume"]
    assert (welcome["conversation"], welcome["received"]) == ((4, 0) if resumed is None else (3, 7))


# What may be recorded


def test_reports_hold_no_content() -> None:
    canary = "CANARY"
    protocol = opened()
    exchange = [
        ("guest", {**INVOKE, "arguments": {canary: canary}, canary: canary}),
        ("harness", {"kind": "tool.result", "id": "t1", "result": canary}),
        ("guest", {**INVOKE, "id": "t2"}),
        ("harness", {"kind": "tool.error", "id": "t2", "code": "io", "message": canary}),
        ("guest", {**PROMPT, "text": canary}),
        ("harness", {"kind": "prompt.delta", "id": "p1", "text": canary}),
        ("harness", {"kind": "prompt.result", "id": "p1", "text": canary}),
        ("guest", {"kind": "x-any", "id": canary, "text": canary}),
        ("guest", {"kind": canary, "id": canary, "text": canary}),
    ]
    reports = []
    for side, message in exchange:
        receive = protocol.from_guest if side == "guest" else protocol.from_harness
        actions = receive(raw(message))
        reports += [a._asdict() for a in actions if isinstance(a, Report)]
        assert canary not in repr([a for a in actions if isinstance(a, Violation)])
    assert len(reports) >= len(exchange)
    assert canary not in json.dumps(reports)
    assert reports[0] == {
        "direction": "from-guest",
        "kind": "tool.invoke",
        "id": "t1",
        "name": "fs.read",
        "size": len(raw(exchange[0][1])),
        "outcome": "relayed",
    }
