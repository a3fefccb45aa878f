"""What relaying costs against moving the same bytes, and what resuming costs on top. Prints JSON, and exits
with 1 while a bound is missed; run it as a script.

All of it runs in one thread that is never idle, so the processor time of that thread is what is compared: it
says the same on a machine that has other work. The pump does what the relay has to: the same writes reach it
over the same kind of socket, and it writes them to the same reader. It is the loop that anybody writes with
trio, whose streams read 64 KiB at once unless told otherwise; the bounds are against that one. What of the
relay's speed is owed to larger reads shows beside a pump that reads as much as the relay does.
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from kenaz_engine.channel.connection import READ
from kenaz_engine.channel.framing import LengthPrefixed
from kenaz_engine.channel.harness import ListeningHarness
from kenaz_engine.channel.policy import ToolPolicy
from kenaz_engine.channel.protocol import RESUME
from kenaz_engine.channel.relay import Expected, Limits, handshake
from kenaz_engine.channel.resume import ack

LIMITS = Limits()
SIZES = {"200 B": (200, 20_000, 0.5), "64 KiB": (64 * 1024, 2_000, 0.8)}
"""Bytes of a frame, how many are sent, and the least that the relay may have of the pump's speed."""

ROUNDS = 7

Stream = trio.SocketStream


def pair() -> tuple[Stream, Stream]:
    left, right = socket.socketpair()
    streams = [trio.SocketStream(trio.socket.from_stdlib_socket(s)) for s in (left, right)]
    return streams[0], streams[1]


async def write(stream: Stream, frame: bytes, count: int) -> None:
    for _ in range(count):
        await stream.send_all(frame)


async def read(stream: Stream, size: int) -> None:
    while size > 0:
        size -= len(await stream.receive_some(READ))


async def read_acknowledging(stream: Stream, size: int, frame: int) -> None:
    """As `read`, of frames that all have `frame` bytes: each quarter of a window is acknowledged."""
    got, acknowledged = 0, 0
    while got < size:
        got += len(await stream.receive_some(READ))
        if got - acknowledged >= LIMITS.queue // 4:
            acknowledged = got
            await stream.send_all(LengthPrefixed().encode(ack(got // frame)))


async def skip(stream: Stream) -> None:
    """The guest of a conversation that resumes reads what acknowledges it."""
    while await stream.receive_some(READ):
        pass


async def pump(source: Stream, sink: Stream, at_once: int | None) -> None:
    while data := await source.receive_some(at_once):
        await sink.send_all(data)


@asynccontextmanager
async def pumped(at_once: int | None = None) -> AsyncIterator[tuple[Stream, Stream]]:
    """Guest's and harness's ends of two sockets with a pump between them."""
    guest, near = pair()
    far, harness = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pump, near, far, at_once)
        yield guest, harness
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def relayed(*, resumes: bool = False) -> AsyncIterator[tuple[Stream, Stream]]:
    """The same with the relay between them; both sides have been introduced."""
    guest, near = pair()
    far, harness = pair()
    granted = frozenset({RESUME} if resumes else ())
    hello = {"kind": "hello", "protocol": 1, "session": "s", "token": "t", "agent": "", "build": ""}
    await say(guest, {**hello, "capabilities": sorted(granted)})
    expected = Expected(session="s", token="t", tools=ToolPolicy(), capabilities=granted)
    channel = await handshake(near, expected)

    async def dial() -> trio.abc.Stream:
        raise ConnectionRefusedError

    link = ListeningHarness(far, LIMITS, dial if resumes else None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.run)
        nursery.start_soon(link.run)
        nursery.start_soon(channel.serve, link)
        await guest.receive_some()
        await harness.receive_some()
        if resumes:
            await say(harness, {"kind": "resume", "received": 0})
            await harness.receive_some()
        yield guest, harness
        nursery.cancel_scope.cancel()


async def say(stream: Stream, message: dict[str, object]) -> None:
    await stream.send_all(LengthPrefixed().encode(json.dumps(message).encode()))


async def throughput(way: str, frame: bytes, count: int) -> float:
    """Microseconds of processor time for each frame from the guest to the harness."""
    resumes = way == "resumed"
    pumps = {"pumped": None, "pumped_at_most": READ}
    between = pumped(pumps[way]) if way in pumps else relayed(resumes=resumes)
    async with between as (guest, harness), trio.open_nursery() as nursery:
        if resumes:
            nursery.start_soon(skip, guest)
        began = time.thread_time()
        nursery.start_soon(write, guest, frame, count)
        if resumes:
            await read_acknowledging(harness, len(frame) * count, len(frame))
        else:
            await read(harness, len(frame) * count)
        seconds = time.thread_time() - began
        nursery.cancel_scope.cancel()
    return seconds / count * 1e6


async def round_trip(way: str, frame: bytes, count: int) -> float:
    """Microseconds of processor time that a frame takes there and back."""

    async def echo(far: Stream) -> None:
        while data := await far.receive_some():
            await far.send_all(data)

    @asynccontextmanager
    async def direct() -> AsyncIterator[tuple[Stream, Stream]]:
        yield pair()

    async with direct() if way == "direct" else relayed() as (near, far), trio.open_nursery() as nursery:
        nursery.start_soon(echo, far)
        began = time.thread_time()
        for _ in range(count):
            await near.send_all(frame)
            await read(near, len(frame))
        seconds = time.thread_time() - began
        nursery.cancel_scope.cancel()
    return seconds / count * 1e6


def frame_of(size: int) -> bytes:
    text = "x" * (size - 4 - len('{"kind":"x-data","text":""}'))
    message = json.dumps({"kind": "x-data", "text": text}, separators=(",", ":"))
    frame = LengthPrefixed().encode(message.encode())
    assert len(frame) == size
    return frame


def main() -> int:
    """In turns, so that all see the same machine: the least of each, and the medians of the ratios."""
    figures: dict[str, dict[str, float]] = {}
    missed = 0
    for name, (size, count, bound) in SIZES.items():
        frame = frame_of(size)
        times: dict[str, list[float]] = {
            "pumped": [],
            "pumped_at_most": [],
            "relayed": [],
            "resumed": [],
        }
        for _ in range(ROUNDS):
            for way, found in times.items():
                found.append(trio.run(throughput, way, frame, count))
        ratio, resumed, at_most = (
            statistics.median(a / b for a, b in zip(times[pump], times[way], strict=True))
            for pump, way in (
                ("pumped", "relayed"),
                ("pumped", "resumed"),
                ("pumped_at_most", "relayed"),
            )
        )
        figures[name] = {
            **{f"{way}_us": round(min(found), 1) for way, found in times.items()},
            "ratio": round(ratio, 2),
            "ratio_resumed": round(resumed, 2),
            "ratio_at_most": round(at_most, 2),
            "bound": bound,
        }
        missed |= ratio < bound
    frame = frame_of(200)
    direct, through = (
        min(trio.run(round_trip, way, frame, 1000) for _ in range(ROUNDS)) for way in ("direct", "relay")
    )
    figures["round trip"] = {"direct_us": round(direct, 1), "added_us": round(through - direct, 1)}
    print(json.dumps(figures))
    return missed


if __name__ == "__main__":
    sys.exit(main())
