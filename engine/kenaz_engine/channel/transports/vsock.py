"""AF_VSOCK: the guest dials CID 2, the host's kernel says from which CID.

Sources: vsock(7), linux/vhost.h; behaviour seen with Linux 6.1, where all of this is run in tests, in a
virtual machine that plays the host (tests/integration/test_kernel_vsock.py).
"""

from __future__ import annotations

import errno
import itertools
import os
import secrets
import socket
import struct
import sys
from collections import deque
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


class SharedPort:
    """One listening socket of this process, for all its sessions on that port.

    Ports are shared by all guests of a host, and with vsock_loopback by its processes: who dials is told by
    its CID alone. Sessions that wait take turns at the socket; what comes for another is put aside for it.
    """

    def __init__(self, listening: trio.socket.SocketType, port: int) -> None:
        self.port = port
        self._socket = listening
        self._aside: dict[int, deque[trio.socket.SocketType]] = {}
        self._changed = trio.lowlevel.ParkingLot()
        self._taken = False

    def join(self, cid: int) -> VsockListener:
        """The port for the guest of that CID. Raises TransportError where it has a listener already."""
        if cid in self._aside:
            raise TransportError(f"vsock port {self.port}: another session of this process has CID {cid}")
        self._aside[cid] = deque()
        return VsockListener(self, cid)

    def move(self, before: int, cid: int) -> None:
        """Has the listener of one CID listen for another. Raises TransportError as `join` does."""
        if cid in self._aside:
            raise TransportError(f"vsock port {self.port}: another session of this process has CID {cid}")
        self._aside[cid] = self._aside.pop(before)

    def leave(self, cid: int) -> None:
        """Closes what was put aside, and the socket after the last."""
        for connected in self._aside.pop(cid, ()):
            connected.close()
        self._changed.unpark_all()
        if not self._aside:
            self._socket.close()
            if _ports.get(self.port) is self:
                del _ports[self.port]

    async def accept(self, cid: int) -> trio.socket.SocketType:
        """The next connection of that guest. Raises TransportError."""
        while True:
            if cid not in self._aside:
                raise TransportError(f"vsock port {self.port}: listened no more for CID {cid}")
            if self._aside[cid]:
                await trio.lowlevel.checkpoint()
                return self._aside[cid].popleft()
            if self._taken:
                await self._changed.park()
                continue
            self._taken = True
            try:
                self._sort(await accept_socket(self._socket))
            finally:
                self._taken = False
                self._changed.unpark_all()

    def _sort(self, connected: trio.socket.SocketType) -> None:
        try:
            cid, _ = connected.getpeername()
        except OSError:  # gone again
            cid = CID_ANY
        aside = self._aside.get(cid)
        if aside is None or len(aside) >= BACKLOG:
            connected.close()
        else:
            aside.append(connected)


_ports: dict[int, SharedPort] = {}
"""The ports on which this process listens."""


_nobodys = itertools.count(-1, -1)
"""Numbers that are no CIDs, for listeners that wait to be told theirs."""


class VsockListener:
    """Made by `listen_vsock`: a port, for one guest."""

    def __init__(self, shared: SharedPort, cid: int) -> None:
        self.port = shared.port
        self._shared = shared
        self._cid = cid

    @property
    def address(self) -> str:
        """`vsock:PORT`."""
        return f"vsock:{self.port}"

    def expect(self, cid: int) -> None:
        """Listens for that guest, whose CID was not known before. Raises TransportError."""
        self._shared.move(self._cid, cid)
        self._cid = cid

    async def accept(self) -> Accepted:
        """The next connection of the expected guest; those of nobody's guest are closed. Raises
        TransportError."""
        connected = await self._shared.accept(self._cid)
        return Accepted(trio.SocketStream(connected), f"cid {self._cid}")

    async def aclose(self) -> None:
        """Stops listening for this guest. Idempotent."""
        self._shared.leave(self._cid)
        await trio.lowlevel.checkpoint()


def listen_vsock(port: int, *, cid: int | None, or_another: bool = False) -> VsockListener:
    """Listens on `port` (PORT_ANY: a free one) for the guest of that CID, or for one that `expect` will tell.
    Raises TransportError.

    A process listens once on a port, for all its sessions; where another process has the port, `or_another`
    takes a free one instead. That this succeeds proves nothing about guests: the kernel lets anyone listen.
    """
    cid = next(_nobodys) if cid is None else cid
    if port in _ports:
        return _ports[port].join(cid)
    try:
        listening = socket.socket(_family(), socket.SOCK_STREAM)
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
        if exc.errno == errno.EADDRINUSE and or_another:
            return listen_vsock(PORT_ANY, cid=cid)
        hint = {
            errno.EADDRINUSE: "another process listens there: choose another spec.channel.port",
            errno.EACCES: "ports below 1024 need CAP_NET_BIND_SERVICE: choose a higher spec.channel.port",
        }.get(exc.errno or 0, "")
        raise TransportError(f"vsock port {port}: cannot listen: {exc.strerror or exc}", hint=hint) from None
    shared = _ports[bound] = SharedPort(trio.socket.from_stdlib_socket(listening), bound)
    return shared.join(cid)


def _family() -> int:
    family: int | None = getattr(socket, "AF_VSOCK", None)
    if family is None:
        raise TransportError(
            "this system has no AF_VSOCK", hint="set spec.channel.transport to virtio-serial or auto"
        )
    return family


async def dial_vsock(cid: int, port: int) -> trio.SocketStream:
    """Connects to a port of the guest of that CID. The kernel gives up after 2 s. Raises TransportError."""
    dialling = trio.socket.socket(_family(), socket.SOCK_STREAM)
    try:
        await dialling.connect((cid, port))
    except BaseException as exc:
        dialling.close()
        if not isinstance(exc, OSError):
            raise
        why = {
            errno.ENODEV: "no guest has that CID",
            errno.ECONNRESET: "the guest does not listen there",
            errno.ETIMEDOUT: "the guest is not up",
        }.get(exc.errno or 0, exc.strerror or str(exc))
        raise TransportError(f"vsock {cid}:{port} cannot be dialled: {why}") from exc
    return trio.SocketStream(dialling)


if sys.platform == "linux":
    from fcntl import ioctl as _ioctl

else:

    def _ioctl(file: int, request: int, argument: bytes) -> object:
        raise OSError(errno.ENODEV, "there are no such devices on this system")


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
    ioctl = ioctl or _ioctl
    if first is None:
        first = FIRST_CID + secrets.randbelow(LAST_CID - FIRST_CID + 1)
    try:
        file = os.open(device, os.O_RDWR)
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
