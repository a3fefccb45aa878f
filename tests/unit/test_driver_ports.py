"""Whose end of a connection it is, read from the table that Windows gives."""

from __future__ import annotations

import struct

from kenaz_drivers._common.ports import owner_in, port_owner

HOME, ELSEWHERE = bytes((127, 0, 0, 1)), bytes((10, 0, 0, 1))


def row(
    here: int, there: int, pid: int, *, local: bytes = HOME, remote: bytes = HOME, noise: int = 0
) -> bytes:
    """MIB_TCPROW_OWNER_PID: state, twice address and port, which is big end first in its low two bytes."""
    ports = [struct.pack(">H", port) + struct.pack("<H", noise) for port in (here, there)]
    return struct.pack("<I", 5) + local + ports[0] + remote + ports[1] + struct.pack("<I", pid)


def table(*rows: bytes) -> bytes:
    return struct.pack("<I", len(rows)) + b"".join(rows) + bytes(100)  # the buffer is longer than the table


def test_the_other_end_is_told_from_our_own() -> None:
    both = table(row(7881, 50001, 10), row(50001, 7881, 20))
    assert owner_in(both, 50001, 7881) == 20
    assert owner_in(both, 7881, 50001) == 10
    assert owner_in(both, 50002, 7881) == 0


def test_what_is_undefined_in_a_port_is_passed_over() -> None:
    assert owner_in(table(row(0x1234, 0xFF01, 30, noise=0xFFFF)), 0x1234, 0xFF01) == 30


def test_a_connection_of_another_address_is_not_meant() -> None:
    others = table(row(5, 6, 1, local=ELSEWHERE), row(5, 6, 2, remote=ELSEWHERE), row(5, 6, 3))
    assert owner_in(others, 5, 6) == 3


def test_a_table_that_is_cut_short_is_read_as_far_as_it_goes() -> None:
    assert owner_in(struct.pack("<I", 1000) + row(5, 6, 3), 5, 6) == 3
    assert owner_in(struct.pack("<I", 1000) + row(5, 6, 3)[:-1], 5, 6) == 0


def test_no_owner_is_known_elsewhere() -> None:
    assert port_owner(1, 2) == 0
