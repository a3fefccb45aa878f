"""Sessions whose guest is dialled, on virtual time: until it answers, and what comes of what it answers."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MemoryReceiveStream, memory_stream_pair

from kenaz_drivers.contract import LaunchPlan, LaunchRequest
from kenaz_drivers.simulated.driver import SimulatedDriver
from kenaz_engine.channel.harness import DemoHarness
from kenaz_engine.channel.transports import Accepted, TransportError
from kenaz_engine.channel.transports.tcp import ForwardedPort
from kenaz_engine.session import endpoint
from kenaz_engine.session.conversation import PATIENCE, REDIAL

Stream = trio.StapledStream[Any, MemoryReceiveStream]
Guest = Callable[[Stream], Awaitable[None]]
DIALLED = {"transport": "tcp", "framing": "ndjson", "dial": "host", "approvals": "harness"}
WAY_UP = ["resolving", "allocating", "booting", "connecting"]


class Driver(SimulatedDriver):
    """A machine whose guest does nothing by itself."""

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        assert (request.transport, request.channel, request.forward) == ("tcp", "", 4711)
        data = {"session": "s1", "channel": "", "environment": "", "script": {"dial": None}}
        return LaunchPlan(self.name, (), data=data)


class Port(ForwardedPort):
    """Behind it, one guest after the other; the last one stays."""

    def __init__(self, nursery: trio.Nursery, *guests: Guest | None) -> None:
        self.port = 4711
        self.dialled = 0
        self._nursery = nursery
        self._guests = guests

    async def accept(self) -> Accepted:
        guest = self._guests[min(self.dialled, len(self._guests) - 1)]
        self.dialled += 1
        await trio.lowlevel.checkpoint()
        if guest is None:
            raise TransportError("refused")
        ours, theirs = memory_stream_pair()
        self._nursery.start_soon(guest, theirs)
        return Accepted(ours, "test")  # type: ignore[arg-type]

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def silent(stream: Stream) -> None:
    async with stream:
        await trio.sleep(1000)


async def closing(stream: Stream) -> None:
    await stream.receive_some()
    await stream.aclose()


def answering(*lines: bytes) -> Guest:
    async def guest(stream: Stream) -> None:
        auth = json.loads(await stream.receive_some())
        assert (auth["kind"], auth["capabilities"]) == ("auth", ["approval"])
        await stream.send_all(b"".join(line + b"\n" for line in lines))
        async for _ in stream:
            pass

    return guest


async def session(whole: Any, monkeypatch: pytest.MonkeyPatch, *guests: Guest | None) -> tuple[Any, Port]:
    async with trio.open_nursery() as nursery:
        port = Port(nursery, *guests)
        monkeypatch.setattr(endpoint, "reserve_port", lambda: port)
        prepared = await whole.prepare(driver=Driver(), can={"transports": ("tcp",)})
        channel = replace(prepared.resolved.channel, **DIALLED)
        result = await whole.run(replace(prepared, resolved=replace(prepared.resolved, channel=channel)))
        nursery.cancel_scope.cancel()
    return result, port


async def test_it_is_dialled_until_it_answers(
    autojump_clock: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = trio.current_time()
    ok = answering(b'{"kind":"auth.ok"}')
    result, port = await session(whole, monkeypatch, None, closing, silent, silent, ok)
    assert result.outcome.success, result.outcome
    assert port.dialled == 5
    assert whole.path() == [*WAY_UP, "running", "draining", "stopping", "releasing"]
    dial = [record for record in whole.records() if record.get("about") == "dial"]
    assert [(note.get("message"), note.get("attempts")) for note in dial] == [("refused", None), (None, 5)]
    # Two were silent: one for the third patience, one for the fourth.
    assert trio.current_time() - began >= PATIENCE * (1.2**2 + 1.2**3) + 4 * REDIAL
    requested = [r["handle"] for r in whole.records() if r["kind"] == "acquired" and r["type"] == "port"]
    assert requested == [{"address": "127.0.0.1", "port": 4711}]


async def test_a_guest_that_never_answers_has_the_time_of_the_state(
    autojump_clock: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, port = await session(whole, monkeypatch, silent)
    assert result.outcome.verdict == "guest did not dial in time"
    assert 10 < port.dialled < 100
    assert whole.path() == [*WAY_UP, "killing", "releasing"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"kind":"auth.error","message_truncated":"CANARY"}', "does not take the session's token"),
        (b'{"kind":"hello"}', "by something else"),
        (b"SSH-2.0", "not JSON"),
        (b"x" * 5_000_000, "a line of more than 4194304 bytes"),
    ],
)
async def test_a_guest_that_says_no_is_not_asked_again(
    autojump_clock: Any, whole: Any, monkeypatch: pytest.MonkeyPatch, line: bytes, says: str
) -> None:
    result, port = await session(whole, monkeypatch, answering(line))
    assert result.outcome.verdict.startswith("handshake failed: ")
    assert says in result.outcome.verdict
    assert "CANARY" not in json.dumps(whole.records())
    assert port.dialled == 1


async def test_the_demo_harness_decides_against(autojump_clock: Any) -> None:
    said: list[str] = []
    demo = DemoHarness(said.append)
    await demo.send(b'{"kind":"task.approval_requested","task_id":"t","approval_id":"a","summary":"CANARY"}')
    answer = json.loads(await demo.receive() or b"")
    assert answer == {
        "kind": "task.approval_decision",
        "task_id": "t",
        "approval_id": "a",
        "decision": "deny",
    }
    assert said == ["guest asks for an approval: denied"]
