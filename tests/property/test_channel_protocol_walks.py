"""Whatever both sides say: nothing is raised, and each request that was taken ends exactly once."""

import json
from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kenaz_engine.channel.policy import ToolPolicy
from kenaz_engine.channel.protocol import (
    Action,
    Expected,
    GuestProtocol,
    Limits,
    State,
    ToGuest,
    ToHarness,
    Violation,
)

HELLO = b'{"kind":"hello","protocol":1,"session":"s","token":"t","agent":"","build":"","capabilities":[]}'
KINDS = ["tool.invoke", "tool.cancel", "tool.result", "tool.error", "prompt", "prompt.delta", "prompt.result"]
ids = st.sampled_from(["1", "2", "3"])
messages = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(KINDS),
        "id": ids,
        "tool": st.sampled_from(["fs.read", "fs.delete"]),
        "arguments": st.just({}),
        "result": st.none(),
        "text": st.just(""),
        "code": st.just("io"),
        "message": st.just(""),
    }
)
steps = st.lists(
    st.tuples(st.sampled_from(["guest", "harness"]), messages)
    | st.sampled_from([("drain", None), ("harness gone", None)]),
    max_size=40,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


def opened() -> GuestProtocol:
    tools = ToolPolicy(allow=["fs.*"], deny=["fs.delete"])
    protocol = GuestProtocol(Expected(session="s", token="t", tools=tools, limits=Limits(invocations=2)))
    protocol.from_guest(HELLO)
    return protocol


class Book:
    """Who waits for what, from the outside: requests that were sent, and what came back to the asker."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[str, str]] = Counter()
        self.ended: Counter[tuple[str, str]] = Counter()

    def see(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, ToGuest | ToHarness):
                message = json.loads(action.payload)
                if message["kind"] in ("tool.result", "tool.error", "prompt.result", "prompt.error"):
                    self.ended["guest" if isinstance(action, ToGuest) else "harness", message["id"]] += 1


@given(steps)
def test_each_request_that_is_taken_ends_exactly_once(walk: list[tuple[str, Any]]) -> None:
    protocol = opened()
    book = Book()
    for step, message in walk:
        match step:
            case "drain":
                actions = protocol.drain(1)
            case "harness gone":
                actions = protocol.harness_gone()
            case side:
                receive = protocol.from_guest if side == "guest" else protocol.from_harness
                alive = protocol.state is not State.CLOSED or side == "harness"
                actions = receive(json.dumps(message).encode())
                broken = any(isinstance(action, Violation) for action in actions)
                if message["kind"] in ("tool.invoke", "prompt") and alive and not broken:
                    book.asked[side, message["id"]] += 1
        book.see(actions)
        assert all(count <= 2 for count in protocol.open_requests.values())
        assert not book.ended - book.asked
    was_closed = protocol.state is State.CLOSED
    book.see(protocol.harness_gone())
    book.see(protocol.lost())
    left = book.asked - book.ended
    # A guest that is gone gets no answers any more; everybody else has got each of theirs.
    assert not [key for key in left if key[0] == "harness" or not was_closed]


@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=30)), max_size=5))
def test_no_bytes_make_it_raise(payloads: list[tuple[bool, bytes]]) -> None:
    protocol = opened()
    for by_guest, payload in payloads:
        (protocol.from_guest if by_guest else protocol.from_harness)(payload)
    GuestProtocol(Expected(session="s", token="t", tools=ToolPolicy())).from_guest(
        payloads[0][1] if payloads else b""
    )


@given(
    st.sampled_from([*KINDS, "hello", "ping", "pong", "bye", "error", "end", "drain", "x-any"]),
    st.dictionaries(
        st.sampled_from(["id", "tool", "arguments", "text", "nonce", "reason", "code", "clock", "token"]),
        json_values,
    ),
)
def test_no_members_make_it_raise(kind: str, members: dict[str, Any]) -> None:
    payload = json.dumps({"kind": kind, **members}).encode()
    for protocol in (opened(), GuestProtocol(Expected(session="s", token="t", tools=ToolPolicy()))):
        protocol.from_guest(payload)
    opened().from_harness(payload)
    hello = {**json.loads(HELLO), **members}
    GuestProtocol(Expected(session="s", token="t", tools=ToolPolicy())).from_guest(json.dumps(hello).encode())
