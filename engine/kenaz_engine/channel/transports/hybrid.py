"""vsock for the guest, UNIX sockets for the host: Firecracker, Cloud Hypervisor, vhost-device-vsock.

The guest's device belongs to one socket path of the host, `uds`. Who dials CID 2 on a port is connected to
`<uds>_PORT`; the host reaches a port of the guest through `uds` itself, where it asks for it by a line. So
the path alone says which guest it is.

Facts: Firecracker's own description; vhost-device-vsock 0.3.0, which was run. That one has traps: nothing is
refused where nobody listens (the guest's connect times out after 2 s), so the launcher listens before the
machine starts; what the guest half closes stays open; what follows the line `CONNECT` before its answer is
lost, and the line has to come in one piece; and a host that dials while the guest's kernel takes up the
device may stop it for good, so the host dials only a guest that has been heard of.
"""

from __future__ import annotations

import os

import trio

from kenaz_engine.channel.transports import TransportError
from kenaz_engine.channel.transports.unix import UnixListener, dial_unix, listen_unix

ANSWER = 32
"""Most bytes of the line that answers: `OK`, a 32-bit number, and room for more."""

DIAL = 5.0
"""Seconds for that line to come. The kernel of a guest answers within 2, if it does."""


def guest_path(uds: str | os.PathLike[str], port: int) -> str:
    """The path of the socket that a guest is connected to when it dials `port`."""
    return f"{os.fspath(uds)}_{port}"


def listen_hybrid(uds: str | os.PathLike[str], port: int) -> UnixListener:
    """Listens for the guest of that device on that port. Raises TransportError, as `listen_unix` does."""
    return listen_unix(guest_path(uds, port))


async def dial_hybrid(uds: str | os.PathLike[str], port: int, *, deadline: float = DIAL) -> trio.SocketStream:
    """Connects to a port of the guest, within `deadline` seconds. Raises TransportError, also where the guest
    does not listen there, or not yet."""
    with trio.move_on_after(deadline):
        stream = await dial_unix(uds)
        try:
            await _ask(stream, port)
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream
    raise TransportError(f"{uds}: no answer about port {port} within {deadline:g} s", hint="is the guest up?")


async def _ask(stream: trio.SocketStream, port: int) -> None:
    answer = b""
    try:
        await stream.send_all(b"CONNECT %d\n" % port)
        # One byte at a time: what follows the line is the guest's already.
        while not answer.endswith(b"\n") and len(answer) < ANSWER:
            byte = await stream.receive_some(1)
            if not byte:
                break
            answer += byte
    except trio.BrokenResourceError:
        answer = b""
    if not answer:
        raise TransportError(f"the guest does not listen on port {port}", hint="wait until it does")
    words = answer.split()
    if not answer.endswith(b"\n") or len(words) != 2 or words[0] != b"OK" or not words[1].isdigit():
        raise TransportError(f"this is no vsock device: it answered {answer!r}")
