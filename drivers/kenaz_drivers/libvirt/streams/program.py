"""The program itself, run as `python -I -S DIRECTORY-OF-THIS/__main__.py`, with one of

    URI console UUID SOCKET
    URI channel UUID SOCKET
    URI upload POOL FILE NAME [FILE NAME ...]

and nothing at all, which tells whether there is a libvirt to do it with. The first two connect that UNIX
socket to the domain's, say `open`, and go on until one side ends. The last sees to it that each file is in
the pool under that name, and says how far it is, FILE by its number: `FILE BYTES OF`, or `FILE waiting OF`
where somebody else brings it.

virsh has no command for a channel, and its `console` wants a terminal. Some calls of libvirt's library block:
here nobody minds, for each stream has a process and a connection of its own, so that one who does not read
holds up nobody else.
"""

from __future__ import annotations

import ctypes
import socket
import sys
import time
from pathlib import Path

from kenaz_drivers.libvirt.streams.carrier import Carrier
from kenaz_drivers.libvirt.streams.library import LIBRARY, NONBLOCK, Connection
from kenaz_drivers.libvirt.streams.store import Failed, Store
from kenaz_drivers.libvirt.streams.upload import put

PACE = 0.1
"""Seconds between two reports of a file."""


def main(words: list[str]) -> int:
    try:
        library = ctypes.CDLL(LIBRARY)
        if not words:
            return 0
        uri, what, *rest = words
        if what == "upload":
            pairs = list(zip(rest[1::2], rest[2::2], strict=True))
            upload(Connection(uri, library).pool(rest[0]), pairs)
        else:
            carry(Connection(uri, library, events=True), what, *rest)
    except (Failed, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def carry(connection: Connection, kind: str, uuid: str, path: str) -> None:
    """Joins the domain's console or channel with that socket, until one of them ends."""
    stream = connection.stream(NONBLOCK)
    opening = "virDomainOpenConsole" if kind == "console" else "virDomainOpenChannel"
    connection.call(opening, connection.domain(uuid), None, stream, 0)
    with _dial(path) as near:
        carrier = Carrier(connection, stream, near)
        say("open")
        carrier.run()


if sys.platform == "win32":

    def _dial(path: str) -> socket.socket:
        raise OSError("there are no UNIX sockets on this platform")

else:

    def _dial(path: str) -> socket.socket:
        dialled = socket.socket(socket.AF_UNIX)
        dialled.connect(path)
        return dialled


def upload(pool: Store, pairs: list[tuple[str, str]]) -> None:
    """Puts those files there, by those names."""
    for number, (path, name) in enumerate(pairs):
        said = -1.0

        def told(line: str, number: int = number) -> None:
            nonlocal said
            done, _, whole = line.partition(" ")
            if done == whole or time.monotonic() - said > PACE:
                said = time.monotonic()
                say(f"{number} {line}")

        with Path(path).open("rb") as file:
            put(pool, file.fileno(), name, told)


def say(line: str) -> None:
    """Tells the launcher."""
    print(line, flush=True)
