"""Where a guest's connection comes from: one module for each kind of socket, to listen on and to dial.

| module | the guest dials: the launcher listens | the host dials |
| --- | --- | --- |
| `unix` | `listen_unix` | `dial_unix` |
| `vsock` (Linux, AF_VSOCK) | `listen_vsock` | `dial_vsock` |
| `hybrid` (Firecracker, Cloud Hypervisor, vhost-device-vsock) | `listen_hybrid` | `dial_hybrid` |
| `virtio_serial` (QEMU everywhere) | `listen_serial` | |
| `vfkit` (macOS) | `listen_vfkit` | `dial_vfkit` |
| `hyperv` (Windows, AF_HYPERV) | `listen_hyperv` | |
| `tcp` (a forwarded port of 127.0.0.1) | | `ForwardedPort` |

Every module can be imported on every platform; what the platform lacks is a TransportError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import trio


class TransportError(Exception):
    """A transport cannot be used here. `hint` is what the user can do about it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Accepted:
    """A connection whose peer is the one that was expected; `peer` describes it, for the journal."""

    stream: trio.abc.Stream
    peer: str


class Listener(Protocol):
    """A bound socket that listens already."""

    @property
    def address(self) -> str:
        """Where the guest's side dials: `unix:PATH`, `vsock:PORT` or `hyperv:SERVICE`."""
        ...

    async def accept(self) -> Accepted:
        """The next connection of the expected peer; others are closed. Raises TransportError."""
        ...

    async def aclose(self) -> None:
        """Stops listening. Accepted connections stay. Idempotent."""
        ...
