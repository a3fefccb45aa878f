"""Throughput and round trip through a real guest, for each transport that is named, or else that this host
has. Prints JSON, then the table for docs/performance.md. Needs QEMU and the demo image; a transport whose
parts are missing is left out, and named. Over TCP the guest is dialled; it is reached by its agent over
virtio-serial first. On a host without kernel vsock, bench_kernel_vsock.py runs this in a machine that has it.

The guest's agent starts a small program and is then ended; that program takes the channel and does what
single bytes tell it, so that what is measured is the transport, with Python at both ends, and no protocol.
Under emulation the guest's side dominates; hence ratios, and the same talk between two processes of the host.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from kenaz_drivers._common.process import spawn
from kenaz_drivers.contract import Disk, LaunchRequest, Machine
from kenaz_drivers.qemu.driver import QemuDriver
from kenaz_engine.channel.framing import MARK
from kenaz_engine.channel.policy import ToolPolicy
from kenaz_engine.channel.relay import Expected, handshake
from kenaz_engine.channel.transports.hybrid import guest_path
from kenaz_engine.channel.transports.tcp import reserve_port
from kenaz_engine.channel.transports.unix import listen_unix
from kenaz_engine.channel.transports.virtio_serial import listen_serial
from kenaz_engine.channel.transports.vsock import claim_cid, listen_vsock
from kenaz_engine.guest.recipe import AGENT
from kenaz_engine.images.catalog import default_cache, find_image
from kenaz_engine.images.config_disk import environment_file, write_config_disk
from kenaz_engine.images.disks import create_disk

TRIPS = int(os.environ.get("KENAZ_BENCH_TRIPS", "1000"))
BULK = int(os.environ.get("KENAZ_BENCH_BULK", str(16 << 20)))
PORT = 7881
PATIENCE = float(os.environ.get("KENAZ_BENCH_PATIENCE", "90"))
ADDRESSES = {
    "virtio-serial": "virtio-serial:dev.kenaz.channel",
    "vsock": f"vsock:2:{PORT}",
    "vhost-user-vsock": f"vsock:2:{PORT}",
    "tcp": f"listen:{PORT}",
}

PEER = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import agent
def connected(address):
    if not address.startswith("listen:"):
        return agent.open_channel(address)
    import socket
    with socket.create_server(("0.0.0.0", int(address[7:]))) as listening:
        return listening.accept()[0].detach()
while True:
    try:
        fd = connected(sys.argv[2])
        break
    except OSError:
        time.sleep(0.05)
os.write(fd, agent.MARK + b"!")
block = bytes(65536)
def read(size):
    while size:
        size -= len(os.read(fd, min(size, 65536)))
while command := os.read(fd, 1):
    if command == b"e":
        read(99)
        os.write(fd, block[:100])
        continue
    left = size = int.from_bytes(b"".join(os.read(fd, 1) for _ in range(8)), "big")
    if command == b"r":
        read(size)
        os.write(fd, b"!")
    while command == b"w" and left:
        left -= os.write(fd, block[:left])
"""
"""Says READY. `e` and 99 bytes: answers with 100; `r` or `w` and a size: takes, or gives, that much."""

TAKE_OVER = """
read -r _ _ _ agent _ </proc/$PPID/stat
read -r _ _ _ supervisor _ </proc/$agent/stat
busybox setsid python3.11 -c "$0" /usr/lib/kenaz "$1" &
busybox setsid sh -c "busybox sleep 2; kill -9 $supervisor $agent" &
busybox sleep 1  # until both are out of reach: the agent takes all that is near with it
echo
"""

READY = MARK + b"!"


async def read(stream: trio.abc.ReceiveStream, size: int) -> None:
    """That many bytes, thrown away."""
    while size:
        data = await stream.receive_some(min(size, 1 << 17))
        if not data:
            raise EOFError
        size -= len(data)


async def begins(stream: trio.abc.ReceiveStream, wanted: bytes) -> bool:
    """Whether the stream begins so; what it begins with is taken."""
    heard = b""
    while len(heard) < len(wanted):
        data = await stream.receive_some(len(wanted) - len(heard))
        if not data:
            return False
        heard += data
    return heard == wanted


async def measure(stream: trio.abc.Stream) -> dict[str, float]:
    """Microseconds of a round trip of 100 bytes, and MB/s each way."""
    trips = []
    for _ in range(TRIPS):
        began = time.perf_counter()
        await stream.send_all(b"e" + bytes(99))
        await read(stream, 100)
        trips.append((time.perf_counter() - began) * 1e6)
    began = time.perf_counter()
    await stream.send_all(b"r" + BULK.to_bytes(8, "big"))
    block = bytes(1 << 16)
    for _ in range(BULK // len(block)):
        await stream.send_all(block)
    await read(stream, 1)
    inward = BULK / (time.perf_counter() - began) / 1e6
    began = time.perf_counter()
    await stream.send_all(b"w" + BULK.to_bytes(8, "big"))
    await read(stream, BULK)
    outward = BULK / (time.perf_counter() - began) / 1e6
    trips.sort()
    return {
        "round_trip_p50_us": round(statistics.median(trips), 1),
        "round_trip_p95_us": round(trips[len(trips) * 95 // 100], 1),
        "to_guest_mb_s": round(inward, 1),
        "to_host_mb_s": round(outward, 1),
    }


@asynccontextmanager
async def machine_over(
    transport: str, base: Path, image_named: str, qemu: str
) -> AsyncIterator[tuple[Any, Any] | None]:
    """Where the agent of a machine that runs is accepted, and where its successor is; None where the host
    lacks what the transport needs."""
    driver = QemuDriver()
    image = find_image(image_named, "x86_64", default_cache())
    capabilities = await driver.probe("x86_64", {"binary": qemu} if qemu else {})
    if transport not in capabilities.transports:
        yield None
        return
    tcp = transport == "tcp"
    first = "virtio-serial" if tcp else transport
    variables = {"KENAZ_SESSION_ID": "s", "HARNESS_VM_TOKEN": "t", "KENAZ_CHANNEL": ADDRESSES[first]}
    write_config_disk(base / "config", {"kenaz.env": environment_file(variables)})
    await create_disk(base / "root", "qcow2", base=image.root, base_format=image.root_format, size=1 << 30)
    serial, kernel = first == "virtio-serial", first == "vsock"
    path = str(base / "c") if serial else "" if kernel else guest_path(base / "v", PORT)
    claim = claim_cid() if kernel else None
    request = LaunchRequest(
        session="bench",
        directory=str(base),
        runtime=str(base),
        cpus=1,
        memory=256 << 20,
        transport=first,
        channel=path,
        port=PORT,
        capabilities=capabilities,
        kernel=str(image.kernel),
        initrd=str(image.initrd),
        cmdline=image.cmdline,
        cid=claim.cid if claim else None,
        network="nat" if tcp else "none",
        disks=(
            Disk("root", str(base / "root"), "qcow2"),
            Disk("config", str(base / "config"), "raw", readonly=True),
        ),
    )
    plan = driver.plan(request)
    async with AsyncExitStack() as stack:
        forwarded = reserve_port()
        stack.push_async_callback(forwarded.aclose)
        forward = f"user,id=nat,hostfwd=tcp:127.0.0.1:{forwarded.port}-:{PORT}"  # as for that transport
        plan = replace(plan, argv=tuple(forward if word == "user,id=nat" else word for word in plan.argv))
        listener: Any
        if claim:
            listener = listen_vsock(PORT, cid=claim.cid)
        else:
            listener = listen_serial(path) if serial else listen_unix(path)
        stack.push_async_callback(listener.aclose)
        for helper in plan.helpers:
            child = spawn(helper.argv, env=helper.environment)
            stack.push_async_callback(child.end)
            while not all(Path(socket).exists() for socket in helper.sockets):
                await trio.sleep(0.01)
        given = {"vhost-vsock": claim.file} if claim else {}
        machine = await stack.enter_async_context(driver.launch(plan, given))
        nursery = await stack.enter_async_context(trio.open_nursery())
        nursery.start_soon(drain, machine)
        await machine.ready()
        yield listener, forwarded if tcp else listener
        nursery.cancel_scope.cancel()


async def drain(machine: Machine) -> None:
    """The console is read always, and shown nowhere."""
    async for _ in machine.console():
        pass


async def through(transport: str, image: str, qemu: str) -> dict[str, float] | None:
    """The figures of one transport."""
    expected = Expected(
        session="s",
        token="t",
        tools=ToolPolicy([]),
        capabilities=frozenset({"exec"}),
        one_stream=transport in ("virtio-serial", "tcp"),
    )
    with tempfile.TemporaryDirectory(prefix="kenaz-") as folder, trio.fail_after(PATIENCE):
        async with machine_over(transport, Path(folder), image, qemu) as accepting:
            if accepting is None:
                return None
            listener, successor = accepting
            channel = await handshake((await listener.accept()).stream, expected)
            words = ["sh", "-c", TAKE_OVER, PEER, ADDRESSES[transport]]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(channel.run)
                await channel.execute(words, lambda stream, text: None)
                nursery.cancel_scope.cancel()
            await channel.aclose()
            # The agent may come once more before it is ended, and QEMU accepts before the guest listens.
            stream = (await successor.accept()).stream
            while not await begins(stream, READY):
                await trio.aclose_forcefully(stream)
                await trio.sleep(0.1)
                stream = (await successor.accept()).stream
            return await measure(stream)


async def locally() -> dict[str, float]:
    """The same talk with the same program, as a process of this host."""
    with tempfile.TemporaryDirectory(prefix="kenaz-") as folder:
        listener = listen_unix(Path(folder, "c"))
        command = [sys.executable, "-c", PEER, str(AGENT.parent), f"unix:{folder}/c"]
        with subprocess.Popen(command) as peer:
            stream = (await listener.accept()).stream
            assert await begins(stream, READY)
            found = await measure(stream)
            await stream.aclose()
            await listener.aclose()
            peer.kill()
        return found


def main() -> int:
    """Measures and prints. There is no bound: what it takes is the hypervisor's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("transports", metavar="TRANSPORT", nargs="*", default=list(ADDRESSES))
    parser.add_argument("--image", default="demo")
    parser.add_argument("--qemu", default="", help="the program, unless it is the one of the search path")
    wanted = parser.parse_args()
    found: dict[str, Any] = {"unix, no guest": trio.run(locally)}
    missing = []
    for transport in wanted.transports:
        figures = trio.run(through, transport, wanted.image, wanted.qemu)
        if figures is None:
            missing.append(transport)
        else:
            found[transport] = figures
    serial = found.get("virtio-serial", {})
    ratios = {
        f"{transport}/virtio-serial {name}": round(found[transport][name] / value, 2)
        for transport in found
        if transport in ADDRESSES and transport != "virtio-serial"
        for name, value in serial.items()
    }
    print(json.dumps({**found, **ratios, "missing": missing, "trips": TRIPS, "bulk": BULK}, indent=2))
    print(table(found))
    return 0


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """The rows for docs/performance.md."""
    rows = [
        "| transport | round trip of 100 bytes: half, 95 % | to the guest | to the host |",
        "| --- | --- | --- | --- |",
    ]
    for name, of in found.items():
        half, most = (of[f"round_trip_{part}_us"] for part in ("p50", "p95"))
        to_guest, to_host = of["to_guest_mb_s"], of["to_host_mb_s"]
        rows.append(f"| {name} | {half:.0f} µs, {most:.0f} µs | {to_guest:.1f} MB/s | {to_host:.1f} MB/s |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
