"""AF_VSOCK: the guest dials CID 2, the host's kernel says from which CID.

Sources: vsock(7), linux/vhost.h; facts of behaviour seen with Linux 6.1. `claim_cid` has not yet run against
a real /dev/vhost-vsock in this project's tests; the listener has, without a guest behind it.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

import trio

from kenaz_engine.channel.transports import Accepted, TransportError
from kenaz_engine.channel.transports.unix import BACKLOG, accept_socket

DEVICE = "/dev/vhost-vsock"

SET_GUEST_CID = 0x4008AF60
"""VHOST_VSOCK_SET_GUEST_CID: _IOW(0xAF, 0x60, __u64)."""

FIRST_CID = 3
LAST_CID = 0xFFFFFFFE
"""0 to 2 mean the hypervisor, this machine and the host; 0xffffffff means any."""

PORT_ANY = 0xFFFFFFFF
CID_ANY = 0xFFFFFFFF

ATTEMPTS = 4096
"""CIDs to try: far more than the guests of one host."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A CID that is ours while `file` is open. Whoever starts the machine hands it that descriptor, and
    closes its own copy after: the CID is free when the last copy is closed."""

    cid: int
    file: int


class VsockListener:
    """Made by `listen_vsock`."""

    def __init__(self, listening: trio.socket.SocketType, port: int, cid: int) -> None:
        self.port = port
        self._cid = cid
        self._socket = listening

    @property
    def address(self) -> str:
        """`vsock:PORT`."""
        return f"vsock:{self.port}"

    async def accept(self) -> Accepted:
        """The next connection of the expected guest; others are closed: ports are shared by all guests of a
        host, and with vsock_loopback by its processes. Raises TransportError."""
        while True:
            connected = await accept_socket(self._socket)
            try:
                cid, port = connected.getpeername()
            except OSError:  # gone again
                connected.close()
                continue
            if cid == self._cid:
                return Accepted(trio.SocketStream(connected), f"cid {cid} port {port}")
            connected.close()

    async def aclose(self) -> None:
        """Stops listening. Idempotent."""
        self._socket.close()
        await trio.lowlevel.checkpoint()


def listen_vsock(port: int, *, cid: int) -> VsockListener:
    """Listens on `port` (PORT_ANY: a free one) for the guest of that CID. Raises TransportError.

    That this succeeds proves nothing about guests: the kernel lets anyone listen.
    """
    family = getattr(socket, "AF_VSOCK", None)
    if family is None:
        raise TransportError(
            "this system has no AF_VSOCK", hint="set spec.channel.transport to virtio-serial or auto"
        )
    try:
        listening = socket.socket(family, socket.SOCK_STREAM)
    except OSError as exc:
        raise TransportError(
            f"AF_VSOCK cannot be used: {exc.strerror or exc}", hint="load the kernel module vsock"
        ) from None
    try:
        listening.bind((CID_ANY, port))
        listening.listen(BACKLOG)
        bound = listening.getsockname()[1]
    except OSError as exc:
        listening.close()
        hint = {
            errno.EADDRINUSE: "another session listens there: choose another spec.channel.port",
            errno.EACCES: "ports below 1024 need CAP_NET_BIND_SERVICE: choose a higher spec.channel.port",
        }.get(exc.errno or 0, "")
        raise TransportError(f"vsock port {port}: cannot listen: {exc.strerror or exc}", hint=hint) from None
    return VsockListener(trio.socket.from_stdlib_socket(listening), bound, cid)


def claim_cid(
    *,
    device: str = DEVICE,
    ioctl: Callable[[int, int, bytes], object] | None = None,
    first: int | None = None,
) -> Claim:
    """Takes a free CID: the kernel grants it to the open device, so that check and use are one.

    Starts at `first`, else at a random one: a CID that was just freed may still be in somebody's tables.
    `ioctl` is fcntl's unless given. Raises TransportError.
    """
    if ioctl is None:
        import fcntl  # not on every platform

        ioctl = fcntl.ioctl
    if first is None:
        first = FIRST_CID + secrets.randbelow(LAST_CID - FIRST_CID + 1)
    try:
        file = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        hint = {
            errno.ENOENT: "load the kernel module vhost_vsock",
            errno.ENODEV: "the kernel has no vhost_vsock: use spec.channel.transport virtio-serial",
            errno.EACCES: "add yourself to the group of the device, commonly kvm",
            errno.EPERM: "the container you are in does not grant the device",
        }.get(exc.errno or 0, "")
        raise TransportError(f"{device}: {exc.strerror or exc}", hint=hint) from None
    try:
        cid = _scan(file, ioctl, first)
    except BaseException:
        os.close(file)
        raise
    return Claim(cid, file)


def _scan(file: int, ioctl: Callable[[int, int, bytes], object], first: int) -> int:
    for step in range(ATTEMPTS):
        cid = FIRST_CID + (first - FIRST_CID + step) % (LAST_CID - FIRST_CID + 1)
        try:
            ioctl(file, SET_GUEST_CID, struct.pack("=Q", cid))
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                continue
            raise TransportError(f"CID {cid} cannot be claimed: {exc.strerror or exc}") from None
        return cid
    raise TransportError(f"none of {ATTEMPTS} CIDs tried is free", hint="end some of the guests of this host")
