"""AF_HYPERV: how a guest of Hyper-V reaches its host. Needs Windows and Python 3.12.

A Linux guest dials AF_VSOCK CID 2 on a port; on the host that is a service, whose id is made from the port.
It must be registered below GuestCommunicationServices in the registry, once, by an administrator. All
machines of the host share it: the peer's address says which one it is.

Facts: Microsoft, "Make your own integration services"; CPython 3.12 socket. Not yet run on Windows by this
project: that trio can wait for sockets of this family, in particular, is not known.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import trio

from kenaz_engine.channel.transports import Accepted, TransportError
from kenaz_engine.channel.transports.unix import BACKLOG, accept_socket

LAST_PORT = 0x7FFFFFFF
"""The last port that has a service id."""

REGISTRY = r"HKLM\SOFTWARE\Microsoft\Windows NT\CurrentVersion\Virtualization\GuestCommunicationServices"


def service_id(port: int) -> str:
    """The id of the service that a Linux guest reaches by dialling that vsock port. Raises ValueError."""
    if not 0 <= port <= LAST_PORT:
        raise ValueError(f"port {port} has no service on Hyper-V")
    return f"{port:08x}-facb-11e6-bd58-64006a7986d3"


class HypervListener:
    """Made by `listen_hyperv`."""

    def __init__(self, listening: trio.socket.SocketType, service: str, machine: str) -> None:
        self._service = service
        self._machine = machine
        self._socket = listening

    @property
    def address(self) -> str:
        """`hyperv:SERVICE`."""
        return f"hyperv:{self._service}"

    async def accept(self) -> Accepted:
        """The next connection of that machine; others are closed. Raises TransportError."""
        while True:
            connected = await accept_socket(self._socket)
            try:
                machine, _ = connected.getpeername()
            except OSError:  # gone again
                connected.close()
                continue
            if machine.strip("{}").lower() == self._machine:
                return Accepted(trio.SocketStream(connected), f"machine {self._machine}")
            connected.close()

    async def aclose(self) -> None:
        """Stops listening. Idempotent."""
        self._socket.close()
        await trio.lowlevel.checkpoint()


def _wrapped(stdlib: socket.socket) -> trio.socket.SocketType:
    return trio.socket.from_stdlib_socket(stdlib)


def listen_hyperv(
    port: int, *, machine: str, wrap: Callable[[Any], trio.socket.SocketType] = _wrapped
) -> HypervListener:
    """Listens for the machine of that id (`(Get-VM NAME).Id`) on that vsock port. Raises TransportError.

    The socket is bound to the machine itself, so that several sessions can listen on one port. `wrap` makes
    trio's socket.
    """
    service = service_id(port)
    machine = machine.strip("{}").lower()
    family = getattr(socket, "AF_HYPERV", None)
    if family is None:
        raise TransportError(
            "this system has no AF_HYPERV", hint="it takes Windows, and Python 3.12 or later"
        )
    listening: Any = None
    try:
        listening = socket.socket(family, socket.SOCK_STREAM, getattr(socket, "HV_PROTOCOL_RAW", 1))
        listening.bind((machine, service))
        listening.listen(BACKLOG)
    except OSError as exc:
        if listening is not None:
            listening.close()
        raise TransportError(
            f"Hyper-V service {service}: cannot listen: {exc.strerror or exc}",
            hint=f"as an administrator, once: a key {service} with a text ElementName below {REGISTRY}",
        ) from None
    return HypervListener(wrap(listening), service, machine)
