"""What relaying costs against moving the same bytes. Prints JSON; run it as a script.

All of it runs in one thread that is never idle, so the processor time of that thread is what is compared: it
says the same on a machine that has other work.
"""

from __future__ import annotations

import json
import socket
import time

import trio

from kenaz_engine.channel.framing import LengthPrefixed
from kenaz_engine.channel.harness import UnixHarness
from kenaz_engine.channel.policy import ToolPolicy
from kenaz_engine.channel.relay import Expected, Limits, handshake

HELLO = b'{"kind":"hello","protocol":1,"session":"s","token":"t","agent":"","build":"","capabilities":[]}'
LIMITS = Limits()


def pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    left, right = socket.socketpair()
    streams = [trio.SocketStream(trio.socket.from_stdlib_socket(s)) for s in (left, right)]
    return streams[0], streams[1]


async def write(stream: trio.SocketStream, frame: bytes, count: int) -> None:
    for _ in range(count):
        await stream.send_all(frame)


async def read(stream: trio.SocketStream, size: int) -> None:
    while size > 0:
        size -= len(await stream.receive_some(128 * 1024))


async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
    while data := await source.receive_some(128 * 1024):
        await sink.send_all(data)


async def raw(frame: bytes, count: int) -> float:
    guest, near = pair()
    far, harness = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pump, near, far)
        began = time.thread_time()
        nursery.start_soon(write, guest, frame, count)
        await read(harness, len(frame) * count)
        seconds = time.thread_time() - began
        nursery.cancel_scope.cancel()
    return seconds


async def relayed(frame: bytes, count: int) -> float:
    guest, near = pair()
    far, harness = pair()
    await guest.send_all(LengthPrefixed().encode(HELLO))
    channel = await handshake(near, Expected(session="s", token="t", tools=ToolPolicy()))
    link = UnixHarness(far, LIMITS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.run)
        nursery.start_soon(link.run)
        nursery.start_soon(channel.serve, link)
        await harness.receive_some()
        began = time.thread_time()
        nursery.start_soon(write, guest, frame, count)
        await read(harness, len(frame) * count)
        seconds = time.thread_time() - began
        nursery.cancel_scope.cancel()
    return seconds


async def round_trips(near: trio.SocketStream, far: trio.SocketStream, frame: bytes, count: int) -> float:
    """Seconds that a small frame takes there and back."""

    async def echo() -> None:
        while data := await far.receive_some():
            await far.send_all(data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo)
        began = time.thread_time()
        for _ in range(count):
            await near.send_all(frame)
            await read(near, len(frame))
        seconds = time.thread_time() - began
        nursery.cancel_scope.cancel()
    return seconds / count


async def direct_latency(frame: bytes, count: int) -> float:
    return await round_trips(*pair(), frame, count)


async def relayed_latency(frame: bytes, count: int) -> float:
    guest, near = pair()
    far, harness = pair()
    await guest.send_all(LengthPrefixed().encode(HELLO))
    channel = await handshake(near, Expected(session="s", token="t", tools=ToolPolicy()))
    link = UnixHarness(far, LIMITS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.run)
        nursery.start_soon(link.run)
        nursery.start_soon(channel.serve, link)
        await guest.receive_some()
        await harness.receive_some()
        seconds = await round_trips(guest, harness, frame, count)
        nursery.cancel_scope.cancel()
    return seconds


def main() -> None:
    """Best of five, in turns, so that both see the same machine."""
    figures: dict[str, dict[str, float]] = {}
    for name, size, count in (("200 B", 200, 20_000), ("64 KiB", 64 * 1024, 2_000)):
        text = "x" * (size - 4 - len('{"kind":"x-data","text":""}'))
        frame = LengthPrefixed().encode(
            json.dumps({"kind": "x-data", "text": text}, separators=(",", ":")).encode()
        )
        assert len(frame) == size
        times = [(trio.run(raw, frame, count), trio.run(relayed, frame, count)) for _ in range(5)]
        pumped, passed = (min(column) for column in zip(*times, strict=True))
        figures[name] = {
            "raw_us": round(pumped / count * 1e6, 1),
            "relay_us": round(passed / count * 1e6, 1),
            "ratio": round(pumped / passed, 2),
        }
        if name == "200 B":
            direct = min(trio.run(direct_latency, frame, 1000) for _ in range(5))
            through = min(trio.run(relayed_latency, frame, 1000) for _ in range(5))
            figures["round trip"] = {
                "direct_us": round(direct * 1e6, 1),
                "added_us": round((through - direct) * 1e6, 1),
            }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
