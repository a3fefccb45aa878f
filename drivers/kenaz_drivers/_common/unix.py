"""UNIX sockets, where there are any."""

from __future__ import annotations

import socket
import sys

from kenaz_drivers.contract import DriverError

if sys.platform == "win32":

    def unix_socket() -> socket.socket:
        raise DriverError("there are no UNIX sockets on this platform")

else:

    def unix_socket() -> socket.socket:
        """One that is bound to nothing yet."""
        return socket.socket(socket.AF_UNIX)
