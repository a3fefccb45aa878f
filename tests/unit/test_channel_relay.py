"""Guest, relay and harness over streams in memory, on virtual time."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trio.testing

from kenaz_engine.channel.connection import Connection
from kenaz_engine.channel.framing import LengthPrefixed
from kenaz_engine.channel.harness import DemoHarness, ListeningHarness
from kenaz_engine.channel.policy import ToolPolicy
from kenaz_engine.channel.relay import (
    Bye,
    Expected,
    GuestChannel,
    HandshakeError,
    Limits,
    Lost,
    ProtocolViolation,
    Report,
    ServeEnd,
    Violated,
    handshake,
    refuse,
)

HELLO = {
    "kind": "hello",
    "protocol": 1,
    "session": "s-1",
    "token": "secret",
    "agent": "test/1",
    "build": "b-1",
    "capabilities": ["drain"],
}
EXPECTED = Expected(
    session="s-1",
    token="secret",
    tools=ToolPolicy(allow=["fs.*"]),
    limits=Limits(frame=100_000, queue=1000, handshake=5.0, write=20.0),
    capabilities=frozenset({"drain"}),
)


def prompt(number: int, text: str = "") -> dict[str, Any]:
    return {"kind": "prompt", "id": f"p{number}", "text": text}


def answer(number: int, text: str = "") -> dict[str, Any]:
    return {"kind": "prompt.result", "id": f"p{number}", "text": text}


class Peer:
    """The far end of a stream, message by message: a guest, or a harness."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._framing = LengthPrefixed()
        self._got: list[bytes] = []

    async def send(self, *messages: dict[str, Any]) -> None:
        frames = (self._framing.encode(json.dumps(m).encode()) for m in messages)
        await self.stream.send_all(b"".join(frames))

    async def receive(self) -> Any:
        while not self._got:
            data = await self.stream.receive_some()
            if not data:
                return None
            self._got += self._framing.feed(bytes(data))
        return json.loads(self._got.pop(0))

    async def expect(self, **members: Any) -> Any:
        message = await self.receive()
        assert message is not None, f"the stream ended, {members} was expected"
        assert {k: message.get(k) for k in members} == members
        return message


@dataclass
class World:
    """One open channel; the ends in the test's hands."""

    nursery: trio.Nursery
    channel: GuestChannel
    guest: Peer
    link: ListeningHarness
    harness: Peer
    reports: list[Report] = field(default_factory=list)
    byes: list[Bye] = field(default_factory=list)
    ends: list[Any] = field(default_factory=list)
    touched: int = 0

    def start(self, call: Callable[[], Awaitable[Any]]) -> None:
        async def work() -> None:
            try:
                self.ends.append(await call())
            except ProtocolViolation as exc:
                self.ends.append(exc)

        self.nursery.start_soon(work)

    def serve(self) -> None:
        self.start(lambda: self.channel.serve(self.link))


StreamPair = Callable[[], tuple[trio.abc.Stream, trio.abc.Stream]]


@asynccontextmanager
async def opened(
    expected: Expected = EXPECTED, pair: StreamPair = trio.testing.memory_stream_pair
) -> AsyncIterator[World]:
    ours, theirs = pair()
    guest = Peer(theirs)
    near, far = pair()
    world: World

    def on_message(report: Report) -> None:
        reports.append(report)

    def touch() -> None:
        world.touched += 1

    reports: list[Report] = []
    byes: list[Bye] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_greet, guest)
        channel = await handshake(ours, expected, on_message=on_message, on_bye=byes.append, touch=touch)
        link = ListeningHarness(near, expected.limits)
        world = World(nursery, channel, guest, link, Peer(far), reports, byes)
        world.start(channel.run)
        nursery.start_soon(link.run)
        yield world
        nursery.cancel_scope.cancel()


async def _greet(guest: Peer) -> None:
    await guest.send(HELLO)
    await guest.expect(kind="welcome")


settled = trio.testing.wait_all_tasks_blocked


@pytest.fixture(params=["memory", "lockstep"])
def pair(request: pytest.FixtureRequest) -> StreamPair:
    kinds: dict[str, StreamPair] = {
        "memory": trio.testing.memory_stream_pair,
        "lockstep": trio.testing.lockstep_stream_pair,
    }
    return kinds[request.param]


# The handshake


async def test_the_guest_is_known_after_the_handshake(autojump_clock: trio.testing.MockClock) -> None:
    async with opened() as world:
        assert world.channel.hello.build == "b-1"
        assert world.channel.hello.capabilities == ("drain",)
        assert [(r.kind, r.outcome) for r in world.reports] == [("hello", "taken"), ("welcome", "sent")]


@pytest.mark.parametrize(
    ("data", "code", "answered"),
    [
        (LengthPrefixed().encode(json.dumps({**HELLO, "token": "x"}).encode()), "bad_token", "bad_token"),
        (
            LengthPrefixed().encode(json.dumps({**HELLO, "session": "x"}).encode()),
            "bad_session",
            "bad_session",
        ),
        (LengthPrefixed().encode(b"{}"), "bad_hello", "bad_hello"),
        (b"\x00\x00\x00\x00", "bad_hello", "bad_hello"),
        (b"GET / HTTP/1.1\r\n\r\n", "bad_hello", "bad_hello"),
        (b"\x00\x00", "timeout", None),
        (b"\x00\x00\x00\x09half", "timeout", None),
    ],
)
async def test_a_guest_that_does_not_prove_itself(
    autojump_clock: trio.testing.MockClock, data: bytes, code: str, answered: str | None
) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.send_all(data)
    with pytest.raises(HandshakeError) as caught:
        await handshake(ours, EXPECTED)
    assert caught.value.code == code
    message = await Peer(theirs).receive()
    assert (message and message["code"]) == answered
    assert trio.current_time() == (pytest.approx(5.0) if code == "timeout" else 0.0)


@pytest.mark.parametrize("data", [b"", b"\x00\x00\x00\x09half"])
async def test_a_guest_that_leaves_before_its_hello(data: bytes) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.send_all(data)
    await theirs.send_eof()
    with pytest.raises(HandshakeError) as caught:
        await handshake(ours, EXPECTED)
    assert caught.value.code == "lost"


async def test_the_time_for_the_hello_starts_with_its_first_byte(
    autojump_clock: trio.testing.MockClock,
) -> None:
    ours, theirs = trio.testing.memory_stream_pair()

    async def boot() -> None:
        await trio.sleep(1000)
        frame = LengthPrefixed().encode(json.dumps(HELLO).encode())
        await theirs.send_all(frame[:10])
        await trio.sleep(4.9)
        await theirs.send_all(frame[10:])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(boot)
        channel = await handshake(ours, EXPECTED)
    assert channel.hello.agent == "test/1"


async def test_a_guest_that_does_not_read_its_welcome_is_lost(
    autojump_clock: trio.testing.MockClock,
) -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Peer(theirs).send, HELLO)
        with pytest.raises(HandshakeError) as caught:
            await handshake(ours, EXPECTED)
    assert caught.value.code == "lost"


async def test_a_handshake_that_is_cancelled_closes_the_stream() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    with trio.CancelScope() as scope:
        scope.cancel()
        await handshake(ours, EXPECTED)
    assert await theirs.receive_some() == b""


async def test_a_second_guest_is_turned_away(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await refuse(ours)
    peer = Peer(theirs)
    await peer.expect(kind="refused", code="already_connected")
    assert await peer.receive() is None


# Serving


async def test_messages_pass_both_ways_in_order(
    autojump_clock: trio.testing.MockClock, pair: StreamPair
) -> None:
    async with opened(pair=pair) as world:
        world.serve()
        await world.harness.expect(
            kind="session.open", session="s-1", build="b-1", capabilities=["drain"], protocol=1
        )

        async def ask() -> None:
            for number in range(50):
                await world.guest.send(prompt(number, "x" * 100))

        async def reply() -> None:
            for number in range(50):
                await world.harness.expect(kind="prompt", id=f"p{number}")
                await world.harness.send({**answer(number), "kind": "prompt.delta"}, answer(number))

        world.nursery.start_soon(ask)
        world.nursery.start_soon(reply)
        for number in range(50):
            await world.guest.expect(kind="prompt.delta", id=f"p{number}")
            await world.guest.expect(kind="prompt.result", id=f"p{number}")
        assert world.touched == 150


async def test_a_denied_tool_is_answered_and_not_relayed(autojump_clock: trio.testing.MockClock) -> None:
    async with opened() as world:
        world.serve()
        await world.harness.expect(kind="session.open")
        await world.guest.send({"kind": "tool.invoke", "id": "t1", "tool": "web.search", "arguments": {}})
        await world.guest.expect(kind="tool.error", id="t1", code="denied")
        await world.guest.send({"kind": "ping", "nonce": "n1"}, prompt(1))
        await world.guest.expect(kind="pong", nonce="n1")
        await world.harness.expect(kind="prompt")
        assert world.touched == 2  # not by the heartbeat


@pytest.mark.parametrize("how", ["end", "eof", "cut"])
async def test_the_harness_ends_the_session(autojump_clock: trio.testing.MockClock, how: str) -> None:
    async with opened() as world:
        world.serve()
        await world.harness.expect(kind="session.open")
        if how == "end":
            await world.harness.send({"kind": "end"})
        else:
            await world.harness.stream.send_all(b"\x00" if how == "cut" else b"")
            await world.harness.stream.aclose()
        await settled()
        assert world.ends == [ServeEnd("harness")]
        assert world.channel.end is None


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"\x00\x00\x00\x00", "frame_empty"), (b"\x00\x00\x00\x02{}", "bad_kind")],
)
async def test_a_harness_that_breaks_the_protocol_is_told_and_ends_the_serving(
    autojump_clock: trio.testing.MockClock, data: bytes, code: str
) -> None:
    async with opened() as world:
        world.serve()
        await world.harness.expect(kind="session.open")
        await world.harness.stream.send_all(data)
        if code == "bad_kind":
            await world.harness.expect(kind="error", code=code)
        await settled()
        (end,) = world.ends
        assert isinstance(end, ProtocolViolation)
        assert (end.side, end.code) == ("harness", code)


async def test_bye_is_told_after_what_came_before_it(autojump_clock: trio.testing.MockClock) -> None:
    async with opened() as world:
        world.serve()
        await world.guest.send(*(prompt(n, "x" * 400) for n in range(10)), {"kind": "bye", "reason": "done"})
        await world.harness.expect(kind="session.open")
        for number in range(10):
            await world.harness.expect(kind="prompt", id=f"p{number}")
        await settled()
        assert world.byes == [Bye("done")]
        assert world.ends == [ServeEnd("guest")]
        assert world.channel.end == Bye("done")
        # A port of virtio-serial stays open; what still comes is not looked at.
        await world.guest.stream.send_all(b"\x00\x00\x00\x00 anything")
        await world.guest.stream.aclose()
        await settled()
        assert world.ends == [ServeEnd("guest"), Bye("done")]


@pytest.mark.parametrize("data", [b"", b"\x00\x00\x00\x20{"])
async def test_a_guest_that_is_gone_without_a_bye_is_lost(
    autojump_clock: trio.testing.MockClock, data: bytes
) -> None:
    async with opened() as world:
        world.serve()
        await world.harness.expect(kind="session.open")
        await world.harness.send(prompt(1))
        await world.guest.expect(kind="prompt")
        await world.guest.stream.send_all(data)
        await world.guest.stream.aclose()
        await world.harness.expect(kind="prompt.error", id="p1", code="gone")
        await settled()
        assert {type(end) for end in world.ends} == {Lost, ServeEnd}
        assert ServeEnd("guest") in world.ends
        assert isinstance(world.channel.end, Lost)
        assert world.byes == []


async def test_a_guest_that_breaks_the_protocol_is_told_and_cut_off(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with opened() as world:
        world.serve()
        await world.guest.stream.send_all(b"\x00\x00\x00\x00")
        await world.guest.expect(kind="error", code="frame_empty")
        assert await world.guest.receive() is None
        await settled()
        assert world.channel.end == Violated("frame_empty", "a frame of length 0")
        assert world.channel.end in world.ends
        (violation,) = (e for e in world.ends if isinstance(e, ProtocolViolation))
        assert (violation.side, violation.code) == ("guest", "frame_empty")


async def test_a_guest_that_never_reads_is_lost_in_bounded_time_and_memory(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Its stream takes nothing: a lockstep stream waits for the reader."""
    async with opened(pair=trio.testing.lockstep_stream_pair) as world:
        sent = 0

        async def ping() -> None:
            nonlocal sent
            with trio.CancelScope(), pytest.raises(trio.BrokenResourceError):
                while True:
                    await world.guest.send({"kind": "ping", "nonce": "x" * 100})
                    sent += 1

        world.nursery.start_soon(ping)
        with trio.fail_after(100):
            while not world.ends:
                await trio.sleep(1)
        assert world.ends == [Lost("the peer took nothing for 20 s")]
        assert sent * 120 < 10 * EXPECTED.limits.queue


async def test_a_harness_that_never_reads_makes_the_guest_wait_and_is_gone_in_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with opened(pair=trio.testing.lockstep_stream_pair) as world:
        world.serve()
        sent = 0

        async def ask() -> None:
            nonlocal sent
            for number in range(60):
                await world.guest.send({"kind": "x-note", "n": number, "text": "x" * 500})
                sent += 1

        world.nursery.start_soon(ask)
        await trio.sleep(10)
        assert 0 < sent < 20
        await trio.sleep(20)
        assert world.ends == [ServeEnd("harness")]


async def test_a_guest_that_does_not_read_makes_the_harness_wait(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with opened(pair=trio.testing.lockstep_stream_pair) as world:
        world.serve()
        await world.harness.expect(kind="session.open")
        sent = 0

        async def tell() -> None:
            nonlocal sent
            for number in range(60):
                await world.harness.send({"kind": "x-note", "n": number, "text": "x" * 500})
                sent += 1

        world.nursery.start_soon(tell)
        await trio.sleep(10)
        assert 0 < sent < 20
        for number in range(60):
            await world.guest.expect(kind="x-note", n=number)
        assert sent == 60


async def test_without_anyone_serving_the_guest_waits(autojump_clock: trio.testing.MockClock) -> None:
    async with opened(pair=trio.testing.lockstep_stream_pair) as world:
        sent = 0

        async def ask() -> None:
            nonlocal sent
            for number in range(30):
                await world.guest.send(prompt(number, "x" * 200))
                sent += 1

        world.nursery.start_soon(ask)
        await trio.sleep(60)
        assert sent < 10
        world.serve()
        await world.harness.expect(kind="session.open")
        for number in range(30):
            await world.harness.expect(kind="prompt", id=f"p{number}")


async def test_one_activity_at_a_time(autojump_clock: trio.testing.MockClock) -> None:
    async with opened() as world:
        world.serve()
        await settled()
        with pytest.raises(trio.BusyResourceError):
            await world.channel.drain(1)


# Draining


async def test_drain_lets_both_sides_finish(autojump_clock: trio.testing.MockClock) -> None:
    async with opened() as world:
        world.serve()
        await world.harness.expect(kind="session.open")
        await world.guest.send(prompt(1))
        await world.harness.expect(kind="prompt", id="p1")
        await world.harness.send(prompt(2), {"kind": "end"})
        await world.guest.expect(kind="prompt", id="p2")
        await settled()
        assert world.ends == [ServeEnd("harness")]
        world.start(lambda: world.channel.drain(7.5))
        # The harness said it would send no more, so its answer cannot be waited for.
        await world.guest.expect(kind="prompt.error", id="p1", code="unavailable")
        await world.guest.expect(kind="drain", deadline=7.5)
        await world.guest.send(answer(2), {"kind": "bye", "reason": "drained"})
        await world.harness.expect(kind="prompt.result", id="p2")
        await settled()
        assert world.ends == [ServeEnd("harness"), Bye("drained")]


async def test_drain_relays_the_harness_while_it_still_answers(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with opened() as world:
        scope = trio.CancelScope()
        world.nursery.start_soon(_serve_in, scope, world)
        await world.harness.expect(kind="session.open")
        await world.guest.send(prompt(1))
        await world.harness.expect(kind="prompt", id="p1")
        scope.cancel()
        await settled()
        world.start(lambda: world.channel.drain(5))
        await world.guest.expect(kind="drain", deadline=5)
        await world.harness.send(answer(1))
        await world.guest.expect(kind="prompt.result", id="p1")
        await world.harness.stream.aclose()
        await world.guest.send({"kind": "bye", "reason": "drained"})
        await settled()
        assert Bye("drained") in world.ends


async def _serve_in(scope: trio.CancelScope, world: World) -> None:
    with scope:
        await world.channel.serve(world.link)


async def test_drain_without_a_harness_answers_what_was_asked(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with opened() as world:
        await world.guest.send(prompt(1))
        await settled()
        world.start(lambda: world.channel.drain(5))
        await world.guest.expect(kind="drain")
        await world.guest.expect(kind="prompt.error", id="p1", code="unavailable")
        await world.guest.send(prompt(2))
        await world.guest.expect(kind="prompt.error", id="p2", code="draining")
        await world.guest.stream.aclose()
        await settled()
        assert [type(end) for end in world.ends] == [Lost, Lost]


async def test_drain_raises_for_a_guest_that_breaks_the_protocol(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with opened() as world:
        world.start(lambda: world.channel.drain(5))
        await world.guest.send({"kind": "hello"})
        await settled()
        assert any(isinstance(e, ProtocolViolation) and e.code == "second_hello" for e in world.ends)


async def test_run_that_is_cancelled_releases_who_serves(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await Peer(theirs).send(HELLO)
    channel = await handshake(ours, EXPECTED)
    with trio.CancelScope() as scope:
        scope.cancel()
        await channel.run()
    assert channel.end == Lost("the launcher closed the channel")
    assert await channel.serve(DemoHarness(lambda text: None)) == ServeEnd("guest")


async def test_closing_takes_leave(autojump_clock: trio.testing.MockClock) -> None:
    async with opened() as world:
        await world.channel.aclose()
        await world.guest.expect(kind="bye", reason="closed")
        assert await world.guest.receive() is None
        await settled()
        assert [type(end) for end in world.ends] == [Lost]
        await world.channel.aclose()
        await world.link.aclose("success")
        await world.harness.expect(kind="session.close", outcome="success")
        assert await world.harness.receive() is None


async def test_closing_ends_a_run_that_waits_for_someone_to_serve(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with opened() as world:
        await world.guest.send(*(prompt(number, "x" * 500) for number in range(5)))
        await settled()
        assert len(world.reports) == 2 + 2  # the rest waits
        await world.channel.aclose()
        await settled()
        assert world.ends == [Lost("the launcher closed the channel")]


async def test_closing_is_bounded_when_nobody_reads(autojump_clock: trio.testing.MockClock) -> None:
    async with opened(pair=trio.testing.lockstep_stream_pair) as world:
        began = trio.current_time()
        with trio.CancelScope() as scope:
            scope.cancel()
            await world.channel.aclose()
        await world.link.aclose("success")
        assert trio.current_time() - began <= 2.1


# Cancelled at any await


class Interrupting:
    """A harness in memory whose calls pass a gate at which the test may cancel."""

    def __init__(self, answers: list[bytes]) -> None:
        self.got: list[bytes] = []
        self.cancel_at = -1
        self.awaits = 0
        self.scope = trio.CancelScope()
        self._answers = answers

    async def _gate(self) -> None:
        self.awaits += 1
        if self.awaits == self.cancel_at:
            self.scope.cancel()
        await trio.lowlevel.checkpoint()

    has_room = False  # so that all goes by `send`, which waits
    resumable = False

    async def run(self) -> None: ...

    def open(self, session: str, build: str, capabilities: Any) -> None:
        self.got.append(b"open")

    def put(self, payload: bytes) -> None:
        raise AssertionError

    def push(self) -> None: ...

    def took(self, size: int) -> None: ...

    async def send(self, payload: bytes) -> None:
        await self._gate()
        self.got.append(payload)

    async def receive(self) -> bytes | None:
        await self._gate()
        if self._answers:
            return self._answers.pop(0)
        await trio.sleep_forever()
        raise AssertionError

    async def aclose(self, outcome: str) -> None: ...


async def interrupted(cancel_at: int) -> tuple[list[str], list[str], int]:
    """Serves, is cancelled at that await, serves again, drains. What harness and guest got; awaits passed."""
    ours, theirs = trio.testing.memory_stream_pair()
    guest = Peer(theirs)
    await guest.send(HELLO)
    channel = await handshake(ours, EXPECTED)
    harness = Interrupting([json.dumps({"kind": "x-answer", "n": n}).encode() for n in range(4)])
    harness.cancel_at = cancel_at
    result: list[Any] = []

    async def drain() -> None:
        result.append(await channel.drain(5))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.run)
        await guest.send(*({"kind": "x-ask", "n": n, "text": "x" * 300} for n in range(6)))

        async def serve() -> None:
            with harness.scope:
                await channel.serve(harness)

        nursery.start_soon(serve)
        await settled()
        harness.scope.cancel()
        await settled()
        harness.scope = trio.CancelScope()
        nursery.start_soon(serve)
        await settled()
        harness.scope.cancel()
        await settled()
        nursery.start_soon(drain)
        await guest.send({"kind": "x-ask", "n": 6}, {"kind": "bye", "reason": "drained"})
        await settled()
        nursery.cancel_scope.cancel()
    assert result == [Bye("drained")]
    await channel.aclose()
    asked = [str(json.loads(p)["n"]) for p in harness.got[1:]]
    got = []
    while (message := await guest.receive()) is not None:
        got.append(str(message.get("n", message["kind"])))
    return asked, got, harness.awaits


async def test_a_cancel_at_any_await_loses_and_doubles_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    _, _, awaits = await interrupted(-1)
    assert awaits > 10
    for cancel_at in range(awaits + 1):
        asked, got, _ = await interrupted(cancel_at)
        assert asked == list("0123456"), cancel_at
        assert got == ["welcome", *"0123", "drain"], cancel_at


# Connections


async def test_two_connections_hand_on_frames_of_any_size(
    autojump_clock: trio.testing.MockClock, pair: StreamPair
) -> None:
    left_stream, right_stream = pair()
    left = Connection(left_stream, LengthPrefixed(300_000), queue=1000, write=10)
    right = Connection(right_stream, LengthPrefixed(300_000), queue=1000, write=10)
    sent = [bytes([n % 251]) * (1 + n * n * 40) for n in range(80)]

    async def send() -> None:
        for payload in sent:
            await left.send(payload)
        await left.flush()
        await left.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.run)
        nursery.start_soon(send)
        got = []
        while (payload := await right.receive()) is not None:
            got.append(payload)
    assert got == sent
    await right.aclose()
    assert await right.receive() is None


async def test_a_write_that_breaks_ends_the_writer_and_not_the_reader() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    connection = Connection(ours, LengthPrefixed(), queue=1000, write=10)
    await Peer(theirs).send({"kind": "last"})
    assert isinstance(theirs, trio.StapledStream)
    await theirs.receive_stream.aclose()
    connection.put(b"x")
    await connection.run()
    assert connection.failure.startswith("the connection broke")
    connection.put(b"dropped")
    await connection.send(b"dropped")
    await connection.flush()
    assert await connection.receive() == b'{"kind": "last"}'


async def test_flush_waits_for_the_writer_in_its_middle() -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()
    connection = Connection(ours, LengthPrefixed(), queue=1000, write=10)
    connection.put(b"x")
    flushed = []

    async def flush() -> None:
        await connection.flush()
        flushed.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        await settled()
        nursery.start_soon(flush)
        await settled()
        assert flushed == []
        await theirs.receive_some()
        await settled()
        assert len(flushed) == 1
        nursery.cancel_scope.cancel()


async def test_a_write_that_is_cancelled_ends_the_stream() -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()
    connection = Connection(ours, LengthPrefixed(), queue=1000, write=10)
    connection.put(b"x")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.flush)
        await settled()
        nursery.cancel_scope.cancel()
    assert connection.failure == "a write was cut"
    await connection.room()
    await theirs.aclose()


# The demo harness


async def test_the_demo_harness_plays_its_part(autojump_clock: trio.testing.MockClock) -> None:
    lines: list[str] = []
    async with opened() as world:
        demo = DemoHarness(lines.append)
        world.start(demo.run)
        world.start(lambda: world.channel.serve(demo))
        await world.guest.send(prompt(1, "hello \x1b[31mred"))
        await world.guest.expect(kind="prompt.result", id="p1")
        for number, tool in enumerate(["fs.read", "fs.delete"]):
            await world.guest.send({"kind": "tool.invoke", "id": f"t{number}", "tool": tool, "arguments": {}})
            await world.guest.expect(kind="tool.result", id=f"t{number}")
        await world.guest.send({"kind": "x-note"})
        await settled()
        assert ServeEnd("harness") not in world.ends
        await world.guest.send(prompt(2, "that is all"))
        await world.guest.expect(kind="prompt.result", id="p2")
        await settled()
        assert ServeEnd("harness") in world.ends
        assert trio.current_time() == 0
        await demo.aclose("success")
    assert lines == [
        "guest connected: build b-1, capable of drain",
        "guest says: hello \N{REPLACEMENT CHARACTER}[31mred",
        "guest invokes fs.read",
        "guest invokes fs.delete",
        "guest sends x-note",
        "guest says: that is all",
    ]


@pytest.mark.parametrize("scale", [1.0, 5.0])
async def test_the_demo_harness_ends_after_a_quiet_second_or_what_is_one_to_a_slow_guest(
    autojump_clock: trio.testing.MockClock, scale: float
) -> None:
    lines: list[str] = []
    demo = DemoHarness(lines.append, scale)
    demo.open("s-1", "", [])
    payload = json.dumps({"kind": "tool.invoke", "id": "t1", "tool": "web.search", "arguments": {}}).encode()
    await demo.send(payload)
    assert json.loads(await demo.receive() or b"")["result"]["hits"]
    await demo.send(payload.replace(b"web.search", b"clock.now"))
    assert json.loads(await demo.receive() or b"")["result"] == {"ok": True}
    assert await demo.receive() is None
    assert trio.current_time() == pytest.approx(scale)
    assert lines == [
        "guest connected: build unnamed",
        "guest invokes web.search",
        "guest invokes clock.now",
        "nothing more to do",
    ]
