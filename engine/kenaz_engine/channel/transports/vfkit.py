"""Sockets of vfkit, which holds the machine on macOS; there is no AF_VSOCK on such a host.

vfkit is told of one path for each port, `--device virtio-vsock,port=P,socketURL=PATH,listen` or `,connect`,
and the words are seen from the guest: `listen` has the guest dial, and vfkit connects to our socket for each
connection; `connect` has the host dial, and vfkit makes the socket. It makes it after the machine runs, and
only warns where it cannot, hence the removal of what lies there, the patience and the deadline here. No line
is exchanged before the guest's bytes.

Facts: vfkit 0.6.4, pkg/vf/vsock.go and pkg/config. Not yet run on macOS by this project; the sockets are UNIX
sockets, which are.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import trio

from kenaz_engine.channel.transports import TransportError
from kenaz_engine.channel.transports.unix import UnixListener, dial_unix, listen_unix

PAUSE = 0.1
"""Seconds between two attempts to reach a socket that is not there yet."""


def listen_vfkit(path: str | os.PathLike[str]) -> UnixListener:
    """Listens where vfkit will connect for a guest that dials. Raises TransportError, also for a path that
    vfkit's command line cannot express."""
    if "," in os.fspath(path):
        raise TransportError(
            f"{path}: vfkit takes no path with a comma", hint="set TMPDIR to another directory"
        )
    return listen_unix(path)


def clear_vfkit(path: str | os.PathLike[str]) -> None:
    """Removes the socket of a vfkit that is gone, before another is told to make it: it would run on without
    a channel. Raises TransportError where something else lies there."""
    try:
        if not stat.S_ISSOCK(Path(path).lstat().st_mode):
            raise TransportError(f"{path}: is no socket", hint="remove it if it is not needed")
        Path(path).unlink()
    except FileNotFoundError:
        pass


async def dial_vfkit(path: str | os.PathLike[str], *, deadline: float) -> trio.SocketStream:
    """Connects to the guest's port through the socket that vfkit makes, within `deadline` seconds. Raises
    TransportError. That it is connected says nothing of the guest: where that does not listen, the stream
    ends."""
    with trio.move_on_after(deadline):
        while True:
            try:
                return await dial_unix(path)
            except TransportError as exc:
                cause = exc.__cause__
                if not isinstance(cause, OSError) or cause.errno not in {errno.ENOENT, errno.ECONNREFUSED}:
                    raise
            await trio.sleep(PAUSE)
    raise TransportError(
        f"{path}: vfkit made no socket there within {deadline:g} s",
        hint="its log says why, as a warning only",
    )
