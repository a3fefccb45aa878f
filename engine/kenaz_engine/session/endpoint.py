"""Where the guest dials, or is dialled: made before the machine, told of it, and gone with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kenaz_drivers.contract import Machine
from kenaz_drivers.host import LOOPBACK
from kenaz_engine.channel.transports import Listener
from kenaz_engine.channel.transports.hyperv import listen_hyperv, service_id
from kenaz_engine.channel.transports.local import SERIAL_BY_PORT, LocalListener, listen_local
from kenaz_engine.channel.transports.tcp import ForwardedPort, reserve_port
from kenaz_engine.channel.transports.vfkit import listen_vfkit
from kenaz_engine.channel.transports.virtio_serial import SerialPort, listen_serial, listen_serial_port
from kenaz_engine.channel.transports.vsock import Claim, VsockListener, claim_cid, listen_vsock
from kenaz_engine.session.guest import Layout
from kenaz_engine.session.ledger import Ledger, Made
from kenaz_engine.session.prepared import Prepared
from kenaz_engine.session.recorder import Recorder
from kenaz_engine.session.resources import file_handle

RESOURCE = "socket"
"""Its name in the ledger, whatever it is."""

_LISTEN: Mapping[str, Callable[[str], LocalListener | SerialPort]] = {
    "virtio-serial": listen_serial,
    "vfkit": listen_vfkit,
}
"""How to listen at a path for the guest; a plain socket for all other transports."""


class Endpoint:
    """The host's end of one session's channel, by its transport."""

    def __init__(self, prepared: Prepared, layout: Layout, recorder: Recorder) -> None:
        self._transport = prepared.transport
        self._assigns_cid = prepared.capabilities.assigns_cid
        self._layout = layout
        self._recorder = recorder
        self._claim: Claim | None = None
        self.listener: Listener | None = None
        """None until it is open; for `hyperv`, until the machine is known."""
        self.port = prepared.resolved.channel.port
        """The port that the guest is told: where the one of the spec was taken, another one."""

    async def open(self, ledger: Ledger) -> None:
        """Acquires it: before the machine starts, so that no guest dials in vain, and before the config disk
        is made, which says where. Raises TransportError."""
        match self._transport:
            case "vsock":
                wanted = self.port
                await ledger.acquire(RESOURCE, "cid", {"port": wanted}, self._make_cid)
                if self.port != wanted:
                    self._recorder.append("note", {"about": "port", "wanted": wanted, "taken": self.port})
            case "tcp":
                await ledger.acquire(RESOURCE, "port", {"address": LOOPBACK}, self._make_forwarded)
            case "hyperv":
                service = {"service": service_id(self.port)}
                await ledger.acquire(RESOURCE, "port", service, self._make_service)
            case "virtio-serial" if SERIAL_BY_PORT:
                await ledger.acquire(RESOURCE, "port", {"address": LOOPBACK}, self._make_serial_port)
            case _:
                path = self._layout.listening(self._transport, self.port)
                await ledger.acquire(RESOURCE, "socket", {"path": path}, self._make_socket)

    @property
    def asked(self) -> Mapping[str, Any]:
        """What `launch_request` has to know of it."""
        listener = self.listener
        return {
            "cid": self._claim.cid if self._claim else None,
            "forward": listener.port if isinstance(listener, ForwardedPort) else 0,
            "channel": listener.port_address if isinstance(listener, SerialPort) else "",
        }

    @property
    def descriptors(self) -> Mapping[str, int]:
        """What the driver hands to the machine."""
        return {"vhost-vsock": self._claim.file} if self._claim else {}

    def handed_over(self) -> None:
        """The machine has its own copies: the CID is free when the last one is closed."""
        claim, self._claim = self._claim, None
        if claim is not None:
            os.close(claim.file)

    def expect(self, handle: Mapping[str, Any]) -> None:
        """From now on only that machine's guest is heard. It has been made, and does not run yet."""
        match self.listener:
            case VsockListener() if self._assigns_cid:
                self.listener.expect(int(handle["cid"]))
            case SerialPort() if "pid" in handle:
                self.listener.expect(int(handle["pid"]))
            case None:
                self.listener = listen_hyperv(self.port, machine=str(handle["vm"]))

    async def watch(self, machine: Machine) -> None:
        """Tells the listener what the machine says of its guest, until that is gone."""
        if isinstance(self.listener, SerialPort):
            await watch_port(machine, self.listener)

    async def _make_cid(self) -> tuple[Made, None]:
        # Where the hypervisor chooses it, the machine tells, before its guest runs.
        claim = None if self._assigns_cid else claim_cid()
        cid = claim.cid if claim else None
        try:
            listener = listen_vsock(self.port, cid=cid, or_another=True)
        except BaseException:
            if claim is not None:
                os.close(claim.file)
            raise
        self._claim, self.listener, self.port = claim, listener, listener.port
        return Made({"cid": cid, "port": listener.port}, self._close), None

    async def _make_forwarded(self) -> tuple[Made, None]:
        self.listener = reserved = reserve_port()
        return Made({"address": LOOPBACK, "port": reserved.port}, reserved.aclose), None

    async def _make_service(self) -> tuple[Made, None]:
        # Who may dial is known when the machine is made.
        return Made({"service": service_id(self.port)}, self._close), None

    async def _make_serial_port(self) -> tuple[Made, None]:
        self.listener = port = listen_serial_port()
        return Made({"address": port.address}, port.aclose), None

    async def _make_socket(self) -> tuple[Made, None]:
        path = self._layout.listening(self._transport, self.port)
        self.listener = listener = _LISTEN.get(self._transport, listen_local)(path)
        return Made(file_handle(Path(path)), listener.aclose), None

    async def _close(self) -> None:
        if self.listener is not None:
            await self.listener.aclose()
        self.handed_over()


async def watch_port(machine: Machine, port: SerialPort) -> None:
    """Ends the stream of a writer that has closed the port. Who has begun since is not meant."""
    while True:
        seen = port.openings
        await machine.port_closed()
        if port.openings == seen:
            port.guest_closed()
            await port.next_opening(seen)
