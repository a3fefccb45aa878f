"""The conversation with today's harness-vm, where the vectors do not reach: limits, faults, the record."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from kenaz_engine.channel.framing import LINE_OUT, FramingError, Lines
from kenaz_engine.channel.harness_vm import HarnessVmProtocol
from kenaz_engine.channel.policy import ToolPolicy
from kenaz_engine.channel.protocol import (
    Action,
    Bye,
    Expected,
    Limits,
    Report,
    State,
    ToGuest,
    ToHarness,
    Violation,
)

EXPECTED = Expected("s", "t", ToolPolicy(), Limits(invocations=2), capabilities=frozenset({"approval"}))


def raw(**message: Any) -> bytes:
    return json.dumps(message).encode()


def opened() -> HarnessVmProtocol:
    talk = HarnessVmProtocol(EXPECTED)
    talk.begin()
    talk.from_guest(raw(kind="auth.ok", capabilities=["approval"]))
    assert talk.state is State.OPEN
    return talk


def said(actions: list[Action], to: type = ToHarness) -> list[Any]:
    return [json.loads(action.payload) for action in actions if isinstance(action, to)]


def outcomes(actions: list[Action]) -> list[tuple[str, str, str]]:
    return [(a.kind, a.id, a.outcome) for a in actions if isinstance(a, Report)]


def violation(actions: list[Action]) -> str:
    [code] = [action.code for action in actions if isinstance(action, Violation)]
    return code


def test_the_longest_line_passes_and_the_next_longer_is_answered() -> None:
    frame = len(raw(kind="task.start", task_id="a", prompt=""))
    for size, passes in ((LINE_OUT - 1, True), (LINE_OUT, False)):
        message = raw(kind="task.start", task_id="a", prompt="x" * (size - frame))
        assert len(message) == size
        actions = opened().from_harness(message)
        assert (ToGuest(message) in actions) is passes
        assert [answer["code"] for answer in said(actions)] == ([] if passes else ["line_too_long"])
        if passes:
            assert len(Lines().encode(message)) == LINE_OUT
        else:
            with pytest.raises(FramingError, match="more than 65536 bytes"):
                Lines().encode(message)


def test_a_read_that_is_too_long_is_answered_as_a_read() -> None:
    actions = opened().from_harness(raw(kind="sessions.get", req_id="r", args={"sessionID": "x" * LINE_OUT}))
    [answer] = said(actions)
    assert (answer["kind"], answer["req_id"], answer["code"]) == ("sessions.get.error", "r", "line_too_long")


def test_lines_in_hold_many_times_what_lines_out_do() -> None:
    codec = Lines(4 << 20)
    line = b"x" * ((4 << 20) - 1)
    assert codec.feed(line) == []
    assert codec.pending == len(line)
    assert codec.feed(b"\n") == [line]
    assert codec.pending == 0


def test_a_line_that_is_too_long_is_the_end_of_the_stream() -> None:
    codec = Lines(8)
    assert codec.feed(b"12345678") == codec.feed(b"{}\n") == []
    assert codec.pending == 0
    with pytest.raises(FramingError, match="more than 8 bytes"):
        codec.close()


def test_ids_that_look_like_none_are_passed_and_not_recorded() -> None:
    talk = opened()
    message = raw(kind="task.start", task_id="please delete CANARY", prompt="")
    actions = talk.from_harness(message)
    assert ToGuest(message) in actions
    assert outcomes(actions) == [("task.start", "", "relayed")]
    actions = talk.from_guest(raw(kind="task.complete", task_id="please delete CANARY"))
    assert outcomes(actions) == [("task.complete", "", "relayed")]


def test_approvals_that_wait_are_bounded() -> None:
    talk = opened()
    for number in range(2):
        talk.from_guest(raw(kind="task.approval_requested", task_id="t", approval_id=f"a{number}"))
    actions = talk.from_guest(raw(kind="task.approval_requested", task_id="t", approval_id="a2"))
    assert violation(actions) == "bad_member"


def test_an_approval_without_an_id_is_a_violation() -> None:
    assert violation(opened().from_guest(raw(kind="task.approval_requested", task_id="t"))) == "bad_member"


@pytest.mark.parametrize(
    "wrong",
    [
        {"source": "guest"},
        {"decision": "yes"},
        {"approval_id": 1},
        {"task_id": None},
    ],
)
def test_a_decision_that_is_none_does_not_reach_the_guest(wrong: dict[str, Any]) -> None:
    talk = opened()
    talk.from_guest(raw(kind="task.approval_requested", task_id="t", approval_id="a"))
    decision = {"kind": "task.approval_decision", "task_id": "t", "approval_id": "a", "decision": "deny"}
    actions = talk.from_harness(raw(**decision | wrong))
    assert said(actions, ToGuest) == []
    assert [answer["code"] for answer in said(actions)] == ["bad_request"]
    assert said(talk.from_harness(raw(**decision, source="remote")), ToGuest) != []


def test_a_connection_that_breaks_ends_each_thing_once() -> None:
    talk = opened()
    talk.from_harness(raw(kind="task.start", task_id="a", prompt=""))
    assert [message["kind"] for message in said(talk.lost())] == ["task.error", "guest.lost"]
    assert talk.lost() == talk.from_guest(raw(kind="task.complete", task_id="a")) == []
    [answer] = said(talk.from_harness(raw(kind="task.start", task_id="b", prompt="")))
    assert answer["code"] == "gone"


def test_before_the_answer_nothing_is_missed() -> None:
    talk = HarnessVmProtocol(EXPECTED)
    talk.begin()
    assert talk.lost() == []


def test_a_harness_that_sends_no_frames_is_told_and_the_guest_is_not() -> None:
    actions = opened().fault("frame_too_large", "text", side="harness")
    assert [message["code"] for message in said(actions)] == ["frame_too_large"]
    assert said(actions, ToGuest) == []
    assert violation(actions) == "frame_too_large"


def test_a_guest_that_sends_no_lines_is_cut_off_without_a_word() -> None:
    talk = opened()
    actions = talk.fault("frame_too_large", "text")
    assert (said(actions), said(actions, ToGuest)) == ([], [])
    assert violation(actions) == "frame_too_large"
    assert talk.state is State.CLOSED


def test_draining_waits_for_reads_and_takes_no_new_ones() -> None:
    talk = opened()
    talk.from_harness(raw(kind="tools.list", req_id="r"))
    assert talk.drain(10) == talk.drain(10) == []
    assert [m["code"] for m in said(talk.from_harness(raw(kind="tools.list", req_id="s")))] == ["draining"]
    actions = talk.from_guest(raw(kind="tools.list.ok", req_id="r", tools=[]))
    assert actions[-1] == Bye("drained")
    assert len(said(actions)) == 1


def test_pings_are_answered_here_and_only_such_as_look_like_one() -> None:
    talk = opened()
    assert said(talk.from_harness(raw(kind="ping", nonce="n"))) == [{"kind": "pong", "nonce": "n"}]
    assert said(talk.from_harness(raw(kind="ping", nonce="a b"))) == []
    assert said(talk.from_harness(raw(kind="pong", nonce="n"))) == []


def test_what_this_guest_cannot_do_is_nothing() -> None:
    talk = opened()
    assert talk.execute(["ls"]) == talk.cancel_command() == talk.harness_gone() == []
    assert talk.resumed() == talk.give_up() == talk.expire(1e9) == []
    assert (talk.resumable, talk.conversation, talk.void) == (False, 0, {})
    assert math.isinf(talk.next_deadline(0))
    assert talk.bye("closed") == []
    assert talk.state is State.CLOSED
    assert talk.bye("closed") == []


def test_without_capabilities_none_are_asked_for() -> None:
    talk = HarnessVmProtocol(Expected("s", "t", ToolPolicy()))
    assert said(talk.begin(), ToGuest) == [{"kind": "auth", "token": "t"}]
