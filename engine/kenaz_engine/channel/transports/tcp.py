"""A TCP port of 127.0.0.1 that the hypervisor forwards to a port of the guest, for guests that listen there.

Any process of this host can reach such a port, so the guest's token is all that keeps others out; hence it is
used only where the spec asks for it. The launcher holds the port from before the machine is planned: bound,
so that the system gives it to nobody else, and not listening, so that the hypervisor can. Where another
process listens on it first, the hypervisor cannot bind it and says so. The launcher dials after the
hypervisor has bound it, so the token goes to no one else.

Facts: ip(7), socket(7) (SO_REUSEADDR: on Linux, sockets that do not listen share a port); QEMU's libslirp
sets it, and accepts before it knows whether anybody listens in the guest.
"""

from __future__ import annotations

import socket
import sys

import trio

from kenaz_drivers.host import LOOPBACK
from kenaz_engine.channel.transports import Accepted, TransportError


class ForwardedPort:
    """Made by `reserve_port`. Its `accept` dials: the guest is the one who listens."""

    def __init__(self, held: socket.socket) -> None:
        self._held = held
        self.port: int = held.getsockname()[1]

    @property
    def address(self) -> str:
        """`tcp:ADDRESS:PORT`, where the launcher dials."""
        return f"tcp:{LOOPBACK}:{self.port}"

    async def accept(self) -> Accepted:
        """A connection to the hypervisor, which proves nothing about the guest. Raises TransportError."""
        dialling = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            await dialling.connect((LOOPBACK, self.port))
        except BaseException as exc:
            dialling.close()
            if isinstance(exc, OSError):
                raise TransportError(f"{self.address}: {exc.strerror or exc}") from None
            raise
        return Accepted(trio.SocketStream(dialling), self.address)

    async def aclose(self) -> None:
        """Gives the port back. Idempotent."""
        self._held.close()
        await trio.lowlevel.checkpoint()


def reserve_port() -> ForwardedPort:
    """Takes a free port of 127.0.0.1. Raises TransportError."""
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((LOOPBACK, 0))
        reserved = ForwardedPort(held)
    except OSError as exc:
        held.close()
        raise TransportError(f"no port of {LOOPBACK} can be had: {exc.strerror or exc}") from None
    if sys.platform != "linux":  # elsewhere a port that is bound cannot be shared: a moment's race stays
        held.close()
    return reserved
