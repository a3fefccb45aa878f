"""Dialling a program of this user on this host: at a UNIX socket, or where Python has none, at a port of
127.0.0.1 behind two secrets.

A file stands where the socket's would: a JSON object of `port`, `ask` and `answer`. Who dials says `ask` and
a line feed, and must be answered `answer` and a line feed: anybody may have taken the port since. Who listens
is in the engine: channel/transports/loopback.py.
"""

from __future__ import annotations

import errno
import hmac
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

LOOPBACK = "127.0.0.1"

PATIENCE = 5.0
"""Seconds that who dials has for his secret, once he is heard."""

LINE = 64
"""Most bytes of a secret and its line feed."""

_FILE = 1024


if sys.platform == "win32":

    async def dial_local(path: str | os.PathLike[str]) -> trio.SocketStream:
        """Connects to who listens by the file at `path`. Raises OSError, as `dial_loopback`."""
        return await dial_loopback(path)

else:

    async def dial_local(path: str | os.PathLike[str]) -> trio.SocketStream:
        """Connects to the socket at `path`. Raises OSError."""
        return await trio.open_unix_socket(path)


async def dial_loopback(path: str | os.PathLike[str]) -> trio.SocketStream:
    """Connects to who listens by that file, as soon as he accepts: has no deadline of its own.

    Raises OSError: FileNotFoundError where there is none, ConnectionRefusedError where nobody listens,
    ConnectionAbortedError where it is somebody else.
    """
    port, ask, answer = read_secrets(Path(path))
    stream = await _connect(port)
    said = bytearray()
    try:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(ask + b"\n")
            await read_line(stream, said)
        if not hmac.compare_digest(said, answer + b"\n"):
            raise ConnectionAbortedError(errno.ECONNABORTED, "who listens there does not know the secret")
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return stream


async def read_line(stream: trio.abc.ReceiveStream, said: bytearray) -> None:
    """Adds to `said` up to a line feed, LINE bytes, or the end of the stream. One byte at a time, for what
    follows the line is not for us."""
    while not said.endswith(b"\n") and len(said) < LINE and (byte := await stream.receive_some(1)):
        said += byte


async def _connect(port: int) -> trio.SocketStream:
    dialling = trio.socket.socket()
    try:
        await dialling.connect((LOOPBACK, port))
    except BaseException:
        dialling.close()
        raise
    return trio.SocketStream(dialling)


def read_secrets(path: Path) -> tuple[int, bytes, bytes]:
    """The port, what who dials says, and what he is answered. Raises OSError: FileNotFoundError also while
    the file is empty."""
    with path.open("rb") as file:
        text = file.read(_FILE)
    if not text:
        raise FileNotFoundError(errno.ENOENT, "nothing is written there yet", str(path))
    try:
        said: Any = json.loads(text)
        port, ask, answer = said["port"], said["ask"], said["answer"]
        if type(port) is not int or not 0 < port < 1 << 16:
            raise ValueError
        return port, ask.encode("ascii"), answer.encode("ascii")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise OSError(errno.EINVAL, "that file names no port and secrets", str(path)) from None
