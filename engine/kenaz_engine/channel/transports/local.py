"""On which sockets the launcher hears programs of its own user: UNIX sockets, or what stands for them on
Windows. How they are dialled is `kenaz_drivers.host.dial_local`."""

from __future__ import annotations

import os
import sys

from kenaz_engine.channel.transports import TransportError
from kenaz_engine.channel.transports.loopback import LoopbackListener, listen_loopback
from kenaz_engine.channel.transports.unix import SUN_PATH, UnixListener, listen_unix

LocalListener = UnixListener | LoopbackListener

SERIAL_BY_PORT = sys.platform == "win32"
"""Whether a hypervisor connects its virtio-serial port to a port of 127.0.0.1: it knows no secrets."""

LEAST_PYTHON = (3, 12, 4)
"""The first that lets nobody else into a directory that it makes with the mode 0700 on Windows."""

if sys.platform == "win32":
    SCHEME = "loopback"
    LONGEST_PATH = 259  # MAX_PATH without its NUL

    def check_local() -> None:
        """Raises TransportError where nothing can be listened on."""
        require_private_directories(sys.version_info[:3])

    def listen_local(path: str | os.PathLike[str]) -> LocalListener:
        """Listens by a file at `path`, which lies in a directory of the launcher's own. Raises
        TransportError."""
        check_local()
        return listen_loopback(path)

else:
    SCHEME = "unix"
    LONGEST_PATH = SUN_PATH - 1

    def check_local() -> None:
        """Nothing is in the way."""

    def listen_local(path: str | os.PathLike[str]) -> LocalListener:
        """Binds `path` and listens. Raises TransportError."""
        return listen_unix(path)


def require_private_directories(version: tuple[int, int, int]) -> None:
    """Raises TransportError for a Python whose `os.mkdir` lets others into directories of the mode 0700 on
    Windows (CVE-2024-4030, mended in 3.12.4)."""
    if version < LEAST_PYTHON:
        raise TransportError(
            "this Python makes no directory on Windows that is its user's alone",
            hint=f"use Python {'.'.join(map(str, LEAST_PYTHON))} or later",
        )
