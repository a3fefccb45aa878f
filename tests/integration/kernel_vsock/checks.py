"""Our AF_VSOCK code on a real kernel that is a host: run in the guest of test_kernel_vsock.py, as root.

Each check prints a line when it has passed. The peers are processes of this machine, by vsock_loopback, whose
CID is 1.
"""

import contextlib
import fcntl
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import trio
import trio.testing

from kenaz_engine.channel.policy import ToolPolicy
from kenaz_engine.channel.relay import Bye, Expected, handshake
from kenaz_engine.channel.transports import TransportError
from kenaz_engine.channel.transports.vsock import (
    LAST_CID,
    PORT_ANY,
    claim_cid,
    dial_vsock,
    listen_vsock,
)

LOOPBACK = 1
PORT = 7881
PATIENCE = 100.0

AGENT = ["/usr/bin/python3.11", "-I", "/lib/kenaz-host/agent.py", "--env", "/tmp/kenaz.env"]

HOLDER = f"""
import socket, sys
s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
s.bind((socket.VMADDR_CID_ANY, {PORT + 1}))
s.listen()
print("bound", flush=True)
sys.stdin.read()
"""


def check_that_this_kernel_is_a_host():
    with Path("/dev/vsock").open("rb") as device:
        (own,) = struct.unpack("I", fcntl.ioctl(device, 0x7B9, bytes(4)))
    assert own == 2, own


def check_that_a_claimed_cid_is_nobody_elses_until_it_is_closed():
    first = claim_cid()
    assert 3 <= first.cid <= LAST_CID
    second = claim_cid(first=first.cid)
    assert second.cid == first.cid + 1
    # QEMU's copy keeps the claim, ours may go.
    theirs = os.dup(first.file)
    os.close(first.file)
    third = claim_cid(first=first.cid)
    assert third.cid == first.cid + 2
    os.close(theirs)
    again = claim_cid(first=first.cid)
    assert again.cid == first.cid
    for claim in (second, third, again):
        os.close(claim.file)
    drawn = [claim_cid() for _ in range(8)]
    assert len({claim.cid for claim in drawn}) == 8
    for claim in drawn:
        os.close(claim.file)


async def check_that_the_stream_is_one_as_trio_means_it():
    listener = listen_vsock(PORT, cid=LOOPBACK)

    async def make():
        dialled = await dial_vsock(LOOPBACK, PORT)
        accepted = await listener.accept()
        assert accepted.peer == "cid 1"
        return dialled, accepted.stream

    await trio.testing.check_two_way_stream(make, None)
    await listener.aclose()


async def check_that_sessions_share_a_port_and_each_gets_its_own_guest():
    claim = claim_cid()
    ours = listen_vsock(PORT, cid=LOOPBACK)
    other = listen_vsock(PORT, cid=claim.cid)

    async def never():
        await other.accept()
        raise AssertionError("a guest of another session")

    async with trio.open_nursery() as nursery:
        # The other session has the socket: what comes for us is put aside.
        nursery.start_soon(never)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(3):
            async with await dial_vsock(LOOPBACK, PORT) as dialled:
                accepted = await ours.accept()
                await accepted.stream.send_all(b"yours")
                assert await dialled.receive_some() == b"yours"
                await accepted.stream.aclose()
        nursery.cancel_scope.cancel()
    await ours.aclose()
    # The port is still there for the other, whose guest this is not: closed without a word.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(never)
        stream = await dial_vsock(LOOPBACK, PORT)
        with contextlib.suppress(trio.BrokenResourceError):
            assert await stream.receive_some() == b""
        nursery.cancel_scope.cancel()
    await other.aclose()
    os.close(claim.file)
    await refused(LOOPBACK, PORT, "does not listen")


async def check_that_a_port_of_another_process_is_replaced():
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"bound\n"
        error = failure_of(listen_vsock, PORT + 1, cid=LOOPBACK)
        assert "spec.channel.port" in error.hint
        listener = listen_vsock(PORT + 1, cid=LOOPBACK, or_another=True)
        assert listener.port not in (PORT + 1, PORT_ANY)
        async with await dial_vsock(LOOPBACK, listener.port):
            await (await listener.accept()).stream.aclose()
        await listener.aclose()
        holder.stdin.close()


def failure_of(function, *arguments, **options):
    """What it raises; there is no pytest in here."""
    try:
        function(*arguments, **options)
    except TransportError as error:
        return error
    raise AssertionError("it worked")


async def refused(cid, port, why):
    failure = None
    try:
        await dial_vsock(cid, port)
    except TransportError as error:
        failure = str(error)
    assert failure is not None, "connected"
    assert why in failure, failure


async def check_that_the_three_ways_of_not_being_there_are_told_apart():
    claim = claim_cid()
    started = time.monotonic()
    await refused(claim.cid, PORT, "the guest is not up")
    assert 1.5 < time.monotonic() - started < 10
    os.close(claim.file)
    await refused(claim.cid, PORT, "no guest has that CID")
    await refused(LOOPBACK, PORT + 9, "does not listen")


async def check_that_the_agent_and_the_channel_talk():
    listener = listen_vsock(PORT, cid=LOOPBACK)
    Path("/tmp/kenaz.env").write_text(
        f'KENAZ_SESSION_ID="s"\nHARNESS_VM_TOKEN="t"\nKENAZ_CHANNEL="vsock:1:{PORT}"\n'
        'KENAZ_WORKBENCH_ARGS="[\\"idle\\"]"\n'
    )
    expected = Expected(session="s", token="t", tools=ToolPolicy(["*"]))
    with subprocess.Popen(AGENT) as agent:
        accepted = await listener.accept()
        channel = await handshake(accepted.stream, expected)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.run)
            assert await channel.drain(60) == Bye("drained")
            await channel.aclose()
        assert await trio.to_thread.run_sync(agent.wait) == 0
    await listener.aclose()


async def main():
    assert socket.AF_VSOCK
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            with trio.fail_after(PATIENCE):
                outcome = check()
                if outcome is not None:
                    await outcome
            print(f"passed: {name.removeprefix('check_that_')}", flush=True)


trio.run(main)
