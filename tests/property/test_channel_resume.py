"""Streams are cut at any byte, in both directions, on both hops: each message arrives once, in order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kenaz_engine.channel.framing import FramingError, LengthPrefixed
from kenaz_engine.channel.harness import ListeningHarness
from kenaz_engine.channel.policy import ToolPolicy
from kenaz_engine.channel.relay import Expected, GuestChannel, HandshakeError, Limits, Lost, handshake
from kenaz_engine.channel.resume import Inbox, NotKept, Outbox, ack, read_ack

LIMITS = Limits(frame=4000, queue=600, handshake=900, write=900, grace=900)
EXPECTED = Expected(
    session="s",
    token="t",
    tools=ToolPolicy(),
    limits=LIMITS,
    capabilities=frozenset({"resume"}),
)


# Without IO


@given(
    st.lists(st.binary(min_size=1, max_size=50), max_size=30),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), max_size=12),
)
def test_what_is_said_again_is_what_was_not_taken(payloads: list[bytes], rounds: list[Any]) -> None:
    outbox, heard = Outbox(10_000), list[bytes]()
    outbox.keep()
    waiting = list(payloads)
    for put, written, reached in [*rounds, (99, 99, 99)]:
        for _ in range(min(put, len(waiting))):
            outbox.put(waiting.pop(0))
        came = [outbox.drop() for _ in range(min(written, len(outbox)))]
        heard += came[:reached]  # the rest was lost with the stream
        outbox.rewind(len(heard))
        assert outbox.lowest == len(heard)
        assert outbox.kept_bytes == 0
    heard += [outbox.drop() for _ in range(len(outbox))]
    assert heard == payloads


def test_an_outbox_keeps_nothing_that_was_acknowledged() -> None:
    outbox = Outbox(100)
    outbox.put(b"before")
    outbox.keep()
    for payload in (b"1", b"22", b"333"):
        outbox.put(payload)
    assert [outbox.drop() for _ in range(3)] == [b"before", b"1", b"22"]
    assert (outbox.lowest, outbox.highest, outbox.kept_bytes, outbox.waiting_bytes) == (0, 3, 3, 3)
    outbox.acknowledge(1)
    assert (outbox.lowest, outbox.kept_bytes) == (1, 2)
    for wrong in (0, 3, 99):
        with pytest.raises(NotKept):
            outbox.acknowledge(wrong)
    with pytest.raises(NotKept):
        outbox.rewind(0)
    with pytest.raises(NotKept):
        outbox.rewind(4)


def test_a_trial_that_nobody_confirms_in_time_keeps_nothing() -> None:
    outbox = Outbox(100)
    outbox.keep(trial=True)
    for _ in range(3):
        outbox.put(bytes(60))
        outbox.drop()
    assert (outbox.keeping, outbox.kept_bytes, outbox.confirm()) == (False, 0, False)


@pytest.mark.parametrize(
    "payload",
    [b'{"kind":"x-a","a":"ack"}', b'{"kind":"ack"', b'{"kind":"ack","received":1' + b" " * 128 + b"}"],
)
def test_what_is_no_ack(payload: bytes) -> None:
    assert read_ack(payload) is None


def test_an_ack_is_read_as_it_was_written() -> None:
    assert read_ack(ack(12)) == 12
    with pytest.raises(FramingError):
        read_ack(b'{"kind":"ack","received":"1"}')


async def test_a_harness_that_was_sent_too_much_to_be_granted_may_acknowledge_all_the_same() -> None:
    """It cannot know: what it was sent before its `resume` came is more than the launcher keeps [Z7]."""
    near, far = trio.testing.memory_stream_pair()
    link = ListeningHarness(near, LIMITS, far.aclose)  # type: ignore[arg-type]  # it is not dialled again
    framing = LengthPrefixed()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        link.open("s", "", ())
        for _ in range(3):
            await link.send(bytes(LIMITS.queue - 1))
        await trio.testing.wait_all_tasks_blocked()
        said = (b'{"kind":"resume","received":0}', ack(3), b'{"kind":"x-a"}', ack(3), b'{"kind":"x-b"}')
        await far.send_all(b"".join(map(framing.encode, said)))
        assert [await link.receive() for _ in range(2)] == [b'{"kind":"x-a"}', b'{"kind":"x-b"}']
        assert not link.resumable
        nursery.cancel_scope.cancel()


# Over streams that are cut


class Cut(Exception):
    """The stream is gone."""


class Peer:
    """A guest or a harness that keeps what Z says, over one stream after the other. Its bytes are cut where
    `cuts` says: so many are written, so many read, then the stream is gone."""

    def __init__(self, cuts: Iterator[tuple[int, int]], chunk: int) -> None:
        self.heard: list[int] = []
        self.streams = 0
        self.resumed = 0
        self.conversation = 0
        self.outbox, self.inbox = Outbox(LIMITS.queue), Inbox(LIMITS.queue)
        self.outbox.keep()
        self._cuts, self._chunk = cuts, chunk
        self._changed = trio.lowlevel.ParkingLot()

    async def say(self, message: dict[str, Any]) -> None:
        while self.outbox.kept_bytes + self.outbox.waiting_bytes >= self.outbox.bound:
            await self._changed.park()
        self.outbox.put(json.dumps(message).encode())
        self._changed.unpark_all()

    async def converse(self, stream: trio.abc.Stream, *, guest: bool) -> None:
        """Over this stream, to its end."""
        self.streams += 1
        writes, reads = next(self._cuts, (1 << 30, 1 << 30))
        framing, urgent = LengthPrefixed(), list[bytes]()

        async def write(data: bytes) -> None:
            nonlocal writes
            await stream.send_all(data[:writes])
            writes -= len(data)
            if writes <= 0:
                raise Cut

        async def writer() -> None:
            while True:
                if urgent:
                    await write(framing.encode(urgent.pop(0)))
                elif self.outbox:
                    await write(framing.encode(self.outbox.drop()))
                else:
                    await self._changed.park()

        async def messages() -> Any:
            nonlocal reads
            while True:
                data = bytes(await stream.receive_some(min(self._chunk, reads)))
                # A guest lost before it had its first welcome is a new one [Z4]: what was said to it is lost.
                if self.conversation or not guest:
                    reads -= len(data)
                for payload in framing.feed(data):
                    yield payload
                if not data or reads <= 0:
                    raise Cut

        try:
            async with aclosing(messages()) as incoming, trio.open_nursery() as nursery:
                if guest:
                    await write(framing.encode(json.dumps(self._hello()).encode()))
                    self._welcomed(json.loads(await anext(incoming))["resume"])
                else:
                    opened = json.loads(await anext(incoming))["resume"]
                    await write(framing.encode(b'{"kind":"resume","received":%d}' % self.inbox.received))
                    if opened["connection"] > 1:
                        self.outbox.rewind(opened["received"])
                self._changed.unpark_all()  # what the other side has taken makes room, too
                nursery.start_soon(writer)
                async for payload in incoming:
                    if (number := read_ack(payload)) is not None:
                        if number:
                            self.outbox.acknowledge(number)
                    else:
                        if self.inbox.took(len(payload)):
                            urgent.append(ack(self.inbox.received))
                        self.heard += [n for n in [json.loads(payload).get("n")] if n is not None]
                    self._changed.unpark_all()
        except* (Cut, trio.BrokenResourceError):
            pass
        finally:
            await trio.aclose_forcefully(stream)

    def _hello(self) -> dict[str, Any]:
        resume = {"conversation": self.conversation, "received": self.inbox.received}
        who = {"kind": "hello", "protocol": 1, "session": "s", "token": "t", "agent": "", "build": ""}
        return who | {"capabilities": ["resume"]} | ({"resume": resume} if self.conversation else {})

    def _welcomed(self, resume: dict[str, Any]) -> None:
        if self.conversation:
            assert resume["conversation"] == self.conversation
            self.outbox.rewind(resume["received"])
            self.resumed += 1
        self.conversation = resume["conversation"]


async def relayed(guest: Peer, harness: Peer, count: int, sizes: list[int]) -> list[int]:
    """`count` messages of each side through the launcher's relay; how many bytes it held at most."""
    held: list[int] = []

    async def dial() -> trio.abc.Stream:
        near, far = trio.testing.memory_stream_pair()
        nursery.start_soon(lambda: harness.converse(far, guest=False))
        return near

    async def speak(peer: Peer) -> None:
        for number in range(count):
            await peer.say({"kind": "x-a", "n": number, "text": "x" * sizes[number % len(sizes)]})

    async def accept() -> None:
        channel: GuestChannel | None = None
        while True:
            near, far = trio.testing.memory_stream_pair()
            nursery.start_soon(lambda far=far: guest.converse(far, guest=True))
            try:
                channel = await handshake(near, EXPECTED, after=channel)
            except HandshakeError:
                continue
            async with trio.open_nursery() as serving:
                serving.start_soon(watch, channel)
                serving.start_soon(channel.serve, link)
                end = await channel.run()
                serving.cancel_scope.cancel()
            assert isinstance(end, Lost), end
            await channel.aclose()

    async def watch(channel: GuestChannel) -> None:
        while True:
            outbox = channel._connection.outbox
            held.append(
                outbox.kept_bytes
                + outbox.waiting_bytes
                + channel._inward.bytes_waiting
                + sum(queue.bytes_waiting for queue in channel._held.values())
            )
            await trio.testing.wait_all_tasks_blocked()
            await trio.sleep(0.05)

    async with trio.open_nursery() as nursery:
        link = ListeningHarness(await dial(), LIMITS, dial)
        nursery.start_soon(link.run)
        nursery.start_soon(accept)
        nursery.start_soon(speak, guest)
        nursery.start_soon(speak, harness)
        with trio.fail_after(1000):
            while len(guest.heard) < count or len(harness.heard) < count:
                await trio.sleep(0.05)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    return held


CUTS = st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 3000)), max_size=3)


@settings(max_examples=25 if settings.default.max_examples < 100 else 200)
# The harness's stream breaks; before what came over it is taken, the guest's does, too.
@example(
    guest_cuts=[(1781, 797), (1700, 1801), (168, 301)],
    harness_cuts=[(36, 156)],
    chunk=100,
    count=16,
    sizes=[185],
)
@given(
    guest_cuts=CUTS,
    harness_cuts=CUTS,
    chunk=st.sampled_from([5, 100, 100_000]),
    count=st.integers(0, 25),
    sizes=st.lists(st.integers(0, 400), min_size=1, max_size=4),
)
def test_every_message_arrives_once_and_in_order(
    guest_cuts: list[tuple[int, int]],
    harness_cuts: list[tuple[int, int]],
    chunk: int,
    count: int,
    sizes: list[int],
) -> None:
    # A harness is negotiated with on its first connection: what cuts that one short ends the session.
    first = [(4000, 6000)] if harness_cuts else []
    guest, harness = Peer(iter(guest_cuts), chunk), Peer(iter([*first, *harness_cuts]), chunk)

    async def run() -> list[int]:
        return await relayed(guest, harness, count, sizes)

    held = trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))
    assert guest.heard == list(range(count))
    assert harness.heard == list(range(count))
    # A window, and one frame more, in each of four places.
    assert max(held, default=0) <= 4 * (LIMITS.queue + 1000)
