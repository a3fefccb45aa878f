"""A port of 127.0.0.1 that is held for a hypervisor, as the kernel has it."""

from __future__ import annotations

import socket
import sys

import pytest
import trio

from kenaz_engine.channel.transports import TransportError
from kenaz_engine.channel.transports import tcp as module
from kenaz_engine.channel.transports.tcp import ForwardedPort, reserve_port


def hypervisor(port: int) -> socket.socket:
    """Listens there as libslirp does."""
    listening = socket.socket()
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        listening.listen(1)
    except BaseException:
        listening.close()
        raise
    return listening


async def test_the_hypervisor_can_bind_what_is_held_and_is_reached_there() -> None:
    reserved = reserve_port()
    with pytest.raises(TransportError, match="refused"):
        await reserved.accept()
    with hypervisor(reserved.port) as listening:
        accepted = await reserved.accept()
        theirs, _ = listening.accept()
        with theirs:
            await accepted.stream.send_all(b"hi")
            assert theirs.recv(2) == b"hi"
            await accepted.stream.aclose()
        assert accepted.peer == reserved.address == f"tcp:127.0.0.1:{reserved.port}"
    await reserved.aclose()
    await reserved.aclose()


@pytest.mark.only_where(sys.platform == "linux")
async def test_nobody_else_gets_the_port_and_nobody_listens_beside_the_hypervisor() -> None:
    reserved = reserve_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", reserved.port))
    with hypervisor(reserved.port), pytest.raises(OSError, match="in use"):
        hypervisor(reserved.port)
    # Whoever listened first keeps the hypervisor out, who then says so.
    await reserved.aclose()


async def test_only_the_loopback_address_is_taken() -> None:
    reserved = reserve_port()
    with socket.socket() as elsewhere:
        elsewhere.bind(("127.0.0.2", reserved.port))
    await reserved.aclose()


def test_a_host_without_a_port_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOPBACK", "192.0.2.1")
    with pytest.raises(TransportError, match=r"no port of 192\.0\.2\.1 can be had"):
        reserve_port()


async def test_where_a_port_cannot_be_shared_it_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    reserved = reserve_port()
    assert isinstance(reserved, ForwardedPort)
    with hypervisor(reserved.port):
        await (await reserved.accept()).stream.aclose()
    await trio.lowlevel.checkpoint()
