"""AF_HYPERV on a system that has none: what would be asked of Windows, held by a stand-in for its sockets."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

import pytest
import trio

from kenaz_engine.channel.transports import TransportError, hyperv
from kenaz_engine.channel.transports.hyperv import listen_hyperv, service_id

MACHINE = "5ff6bb3e-2f6a-4ed9-9c4c-0a4b1f9b6f01"
OTHER = "00000000-0000-0000-0000-000000000001"


@pytest.mark.parametrize(
    ("port", "service"),
    [
        (0, "00000000-facb-11e6-bd58-64006a7986d3"),
        (2761, "00000ac9-facb-11e6-bd58-64006a7986d3"),
        (7881, "00001ec9-facb-11e6-bd58-64006a7986d3"),
        (0x7FFFFFFF, "7fffffff-facb-11e6-bd58-64006a7986d3"),
    ],
)
def test_a_port_is_a_service(port: int, service: str) -> None:
    assert service_id(port) == service


@pytest.mark.parametrize("port", [-1, 0x80000000])
def test_a_port_without_a_service_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match=f"port {port}"):
        service_id(port)


class Windows:
    """A socket as Windows has it: `peers` are the machines that connect, None for one that is gone again."""

    def __init__(self, peers: list[str | None], error: int = 0) -> None:
        self.calls: list[Any] = []
        self.type = socket.SOCK_STREAM
        self.did_shutdown_SHUT_WR = False
        self._peers = peers
        self._error = error

    def __call__(self, *arguments: Any) -> Windows:
        self.calls.append(arguments)
        return self

    def bind(self, address: Any) -> None:
        self.calls.append(address)
        if self._error:
            raise OSError(self._error, os.strerror(self._error))

    def listen(self, backlog: int) -> None:
        self.calls.append(backlog)

    def close(self) -> None:
        self.calls.append("closed")

    async def accept(self) -> tuple[Windows, None]:
        await trio.lowlevel.checkpoint()
        return Windows([self._peers.pop(0)]), None

    def getpeername(self) -> tuple[str, str]:
        if self._peers[0] is None:
            raise OSError(errno.ENOTCONN, "not connected")
        return self._peers[0], service_id(7881)

    def setsockopt(self, *_: Any) -> None: ...


def on_windows(monkeypatch: pytest.MonkeyPatch, windows: Windows) -> None:
    monkeypatch.setattr(socket, "AF_HYPERV", 34, raising=False)
    monkeypatch.setattr(socket, "HV_PROTOCOL_RAW", 1, raising=False)
    monkeypatch.setattr(socket, "socket", windows)
    monkeypatch.setattr(hyperv.trio, "SocketStream", lambda connected: connected)


async def test_only_the_machine_of_the_session_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = Windows([OTHER, None, f"{{{MACHINE.upper()}}}"])
    on_windows(monkeypatch, windows)
    listener = listen_hyperv(7881, machine=f"{{{MACHINE.upper()}}}", wrap=lambda stdlib: stdlib)
    assert windows.calls == [(34, socket.SOCK_STREAM, 1), (MACHINE, service_id(7881)), 4]
    assert listener.address == f"hyperv:{service_id(7881)}"
    accepted = await listener.accept()
    assert accepted.peer == f"machine {MACHINE}"
    await listener.aclose()
    assert windows.calls[-1] == "closed"


def test_a_service_that_is_not_registered_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = Windows([], errno.EACCES)
    on_windows(monkeypatch, windows)
    with pytest.raises(TransportError, match="cannot listen: Permission denied") as caught:
        listen_hyperv(7881, machine=MACHINE)
    assert "GuestCommunicationServices" in caught.value.hint
    assert windows.calls[-1] == "closed"


def test_a_system_without_it_says_what_it_takes() -> None:
    with pytest.raises(TransportError, match="no AF_HYPERV") as caught:
        listen_hyperv(7881, machine=MACHINE)
    assert "Python 3.12" in caught.value.hint
