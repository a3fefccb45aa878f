"""Bytes that nobody meant: the codec and the protocol take them, or refuse them by a code; nothing else.

As a program it tries many more: `python tests/property/test_channel_fuzz.py SECONDS`, or `FRAMESf` for a
number of frames (`make fuzz`).
"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from kenaz_engine.channel import strict_json
from kenaz_engine.channel.framing import Framing, LengthPrefixed, Marked
from kenaz_engine.channel.policy import ToolPolicy
from kenaz_engine.channel.protocol import Expected, GuestProtocol, Limits, Report, Side, State, Violation

HELLO = (
    b'{"kind":"hello","protocol":1,"session":"s","token":"t","agent":"","build":"","capabilities":["resume"]}'
)
EXPECTED = Expected(
    session="s",
    token="t",
    tools=ToolPolicy(["fs.*"], ["fs.delete"]),
    limits=Limits(frame=2000, invocations=8, depth=16),
    capabilities=frozenset({"resume"}),
)
SEEDS = [
    HELLO,
    b'{"kind":"tool.invoke","id":"t1","tool":"fs.read","arguments":{"CANARY":[1,2.5e3,null,true,"\\u00e9"]}}',
    b'{"kind":"tool.invoke","id":"t2","tool":"fs.delete","arguments":{}}',
    b'{"kind":"tool.result","id":"t1","result":{"CANARY":"CANARY"}}',
    b'{"kind":"tool.error","id":"t1","code":"no","message":"CANARY"}',
    b'{"kind":"tool.cancel","id":"t1"}',
    b'{"kind":"prompt","id":"p1","text":"CANARY \xc3\xa9 \\ud83d\\ude00"}',
    b'{"kind":"prompt.delta","id":"p1","text":"CANARY"}',
    b'{"kind":"prompt.result","id":"p1","text":"CANARY"}',
    b'{"kind":"ping","nonce":"n1"}',
    b'{"kind":"bye","reason":"done"}',
    b'{"kind":"end"}',
    b'{"kind":"error","code":"no","message":"CANARY"}',
    b'{"kind":"x-a","a":[[[[{"b":-0,"c":99999999999999999999}]]]]}',
    b'{"kind":"ack","received":1}',
    b"",
]
SPLICES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"\\",
    b",",
    b":",
    b"NaN",
    b"1e999",
    b"\xff",
    b"\0",
    b"\\ud800",
    b'"id":"t1",',
]
MOST = 8 * 3
"""Actions that one frame may lead to: an answer for each open request, with its record, and its own."""


def mutated(chance: random.Random) -> bytes:
    """A message that was right, and perhaps is no longer."""
    payload = bytearray(chance.choice(SEEDS))
    for _ in range(chance.choice((0, 0, 1, 1, 2, 5))):
        at = chance.randrange(len(payload) + 1)
        match chance.randrange(5):
            case 0:
                payload[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                payload[at:at] = chance.choice(SPLICES)
            case 2:
                del payload[at : at + chance.randrange(1, 9)]
            case 3:
                payload += chance.choice(SEEDS)[at:]
            case 4:
                payload[at:at] = bytes(payload[:at])
    return bytes(payload)


def check_json(payload: bytes) -> None:
    """Both parsers say the same, by the same code."""
    found: list[object] = []
    for read in (strict_json.loads, strict_json._refused_or):
        try:
            found.append(read(payload, 16))
        except strict_json.JsonRefused as exc:
            found.append(exc.code)
    assert repr(found[0]) == repr(found[1]), payload


@dataclass
class Talk:
    """A conversation that begins anew when it has ended."""

    chance: random.Random
    payloads: list[bytes]
    protocol: GuestProtocol | None = None
    frames: int = 0

    def step(self) -> None:
        if self.protocol is None or self.protocol.state is State.CLOSED or self.chance.random() < 0.001:
            self.protocol = GuestProtocol(EXPECTED)
            if self.chance.random() < 0.95:
                self.protocol.from_guest(HELLO)
        protocol = self.protocol
        side: Side = "guest" if self.chance.random() < 0.5 else "harness"
        if protocol.state is State.HELLO:
            side = "guest"
        self.frames += 1
        payload = self.payloads[int(self.chance.random() * len(self.payloads))]
        self.hear(protocol, side, payload)
        if protocol.state is State.AWAY:
            protocol.give_up()
        elif self.frames % 64 == 0:
            protocol.expire(self.frames)

    def hear(self, protocol: GuestProtocol, side: Side, payload: bytes) -> None:
        if side == "guest":
            actions = protocol.from_guest(payload, self.frames)
        elif payload:
            actions = protocol.from_harness(payload, self.frames)
        else:
            return
        assert len(actions) <= MOST
        for action in actions:
            if isinstance(action, Report):
                # A member that is allowed may be any word; what is not allowed is not recorded.
                assert "CANARY" not in (action.kind, action.name, action.outcome)
            if isinstance(action, Violation):
                assert "CANARY" not in action.message
        for asked in protocol.open_requests.values():
            assert asked <= EXPECTED.limits.invocations


def feed(framing: Framing, chance: random.Random, stream: bytes) -> None:
    """A decoder holds no more than a frame, whatever comes and however it is cut."""
    at = 0
    while at < len(stream):
        step = chance.choice((1, 3, 100, 5000))
        for payload in framing.feed(stream[at : at + step]):
            assert len(payload) <= 2000
        assert framing.pending <= 2000 + 8
        at += step


def fuzz(seed: int, frames: int) -> None:
    chance = random.Random(seed)
    # To make one costs more than to hear it, and what it meets differs each time.
    payloads = [mutated(chance) for _ in range(frames // 10)]
    for payload in payloads:
        check_json(payload)
    talk = Talk(chance, payloads)
    for number in range(frames):
        talk.step()
        if number % 256 == 0:
            encoded = b"".join(
                (len(p) ^ chance.choice((0, 0, 0, 1 << chance.randrange(32)))).to_bytes(4, "big") + p
                for p in (mutated(chance) for _ in range(6))
            )
            feed(LengthPrefixed(2000), chance, encoded)
            feed(Marked(2000), chance, encoded + b"\xff" * chance.randrange(9) + encoded)


def test_frames_that_were_tampered_with() -> None:
    fuzz(seed=1, frames=20_000)


@given(st.binary(max_size=200))
def test_any_bytes(payload: bytes) -> None:
    check_json(payload)
    GuestProtocol(EXPECTED).from_guest(payload)


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=20)
)
def test_any_json(value: object) -> None:
    check_json(json.dumps({"a": value}).encode())
    check_json(json.dumps({"a": value}, ensure_ascii=False).encode("utf-8", "surrogatepass"))


if __name__ == "__main__":
    word = sys.argv[1] if len(sys.argv) > 1 else "600"
    began, done, seed = time.monotonic(), 0, time.time_ns()
    while done < int(word[:-1]) if word.endswith("f") else time.monotonic() - began < float(word):
        fuzz(seed, 10_000)
        done, seed = done + 10_000, seed + 1
    print(f"{done} frames in {time.monotonic() - began:.0f} s, the last seed {seed - 1}")
