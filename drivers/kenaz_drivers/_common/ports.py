"""Whose end of a TCP connection on this host it is: what Windows tells of a port, as the kernel tells the
peer of a UNIX socket elsewhere.

Facts: Microsoft's documentation of iphlpapi.h, GetExtendedTcpTable, and of MIB_TCPROW_OWNER_PID.
"""

from __future__ import annotations

import ctypes
import struct
import sys

_ROW = struct.Struct("<I4sI4sII")  # state, address and port here, address and port there, process
_COUNT = struct.Struct("<I")
_HOME = bytes((127, 0, 0, 1))

_IPV4 = 2
_CONNECTIONS = 4
"""TCP_TABLE_OWNER_PID_CONNECTIONS."""


def owner_in(table: bytes, here: int, there: int) -> int:
    """The process that has the connection from port `here` to port `there`, both of 127.0.0.1, in a
    MIB_TCPTABLE_OWNER_PID; 0 where there is none."""
    count = min(_COUNT.unpack_from(table)[0], (len(table) - _COUNT.size) // _ROW.size)
    for number in range(count):
        _, address, port, remote, remote_port, pid = _ROW.unpack_from(table, 4 + number * _ROW.size)
        # The low two bytes are the port, big end first; the others are undefined.
        if (address, remote) == (_HOME, _HOME) and (_port(port), _port(remote_port)) == (here, there):
            return int(pid)
    return 0


def _port(value: int) -> int:
    return (value & 0xFF) << 8 | value >> 8 & 0xFF


if sys.platform == "win32":

    def port_owner(here: int, there: int) -> int:
        """The process that has the connection from port `here` to port `there` of 127.0.0.1; 0 where that is
        not known."""
        iphlpapi = ctypes.WinDLL("iphlpapi")
        size = ctypes.c_uint32(1 << 16)
        for _ in range(5):  # it may grow between two calls
            table = ctypes.create_string_buffer(size.value)
            arguments = (table, ctypes.byref(size), False, _IPV4, _CONNECTIONS, 0)
            if iphlpapi.GetExtendedTcpTable(*arguments) == 0:
                return owner_in(table.raw, here, there)
        return 0

else:

    def port_owner(here: int, there: int) -> int:
        """Is not asked for here."""
        return 0
