"""UNIX sockets: on which the launcher listens, and which it dials.

The process driver's agent dials one, and other transports are made of them: see `hybrid`, `virtio_serial` and
`vfkit`. Who may dial: the socket lies in a directory that only this user can enter, and the kernel tells the
peer's user id.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import sys
from contextlib import suppress
from pathlib import Path

import trio

from kenaz_engine.channel.transports import Accepted, TransportError
from kenaz_engine.shortage import what_to_do

SUN_PATH = 108 if sys.platform == "linux" else 104
"""Bytes of `sockaddr_un.sun_path`, the closing NUL included (unix(7); <sys/un.h> on macOS)."""

BACKLOG = 4

SOL_LOCAL, LOCAL_PEERCRED, LOCAL_PEERPID = 0, 1, 2
"""How macOS is asked for the peer (<sys/un.h>): Python does not know these."""

XUCRED = struct.Struct("=2Ih2x16I")
"""Version, user, number of groups and groups (<sys/ucred.h>)."""

if sys.platform == "win32":

    def _user() -> int:
        return 0

    def _unix_socket() -> socket.socket:
        raise TransportError("this system has no UNIX sockets that Python can use", hint="use Linux or macOS")

else:
    from os import geteuid as _user

    def _unix_socket() -> socket.socket:
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)


class UnixListener:
    """Made by `listen_unix`."""

    def __init__(self, listening: trio.socket.SocketType, path: Path) -> None:
        status = path.lstat()
        self.path = path
        self._inode = status.st_dev, status.st_ino
        self._socket = listening

    @property
    def address(self) -> str:
        """`unix:PATH`."""
        return f"unix:{self.path}"

    async def accept(self) -> Accepted:
        """The next connection of this user or root; others are closed. Raises TransportError."""
        while True:
            stream = trio.SocketStream(await accept_socket(self._socket))
            with suppress(OSError):  # whose user is not told is not heard
                uid, pid = _credentials(stream.socket)
                if uid in (_user(), 0):
                    return Accepted(stream, f"uid {uid} pid {pid}")
            await trio.aclose_forcefully(stream)

    async def aclose(self) -> None:
        """Stops listening, and removes the socket's file if it is still ours. Idempotent."""
        self._socket.close()
        try:
            status = self.path.lstat()
            if (status.st_dev, status.st_ino) == self._inode:
                self.path.unlink()
        except FileNotFoundError:
            pass
        await trio.lowlevel.checkpoint()


def listen_unix(path: str | os.PathLike[str]) -> UnixListener:
    """Binds `path` (mode 0600) and listens. Raises TransportError: for a path that is too long or exists, and
    for a directory that others may enter."""
    place = Path(path)
    size = len(os.fsencode(place))
    if size >= SUN_PATH:
        raise TransportError(
            f"{place}: the path of this socket has {size} bytes; the system allows {SUN_PATH - 1} "
            f"(sun_path is {SUN_PATH})",
            hint="set XDG_RUNTIME_DIR to a shorter directory",
        )
    listening = _unix_socket()
    try:
        _require_private(place.parent)
        if sys.platform == "linux":
            # There the file is born with the mode of the unbound socket. Elsewhere chmod has to follow: macOS
            # answers this by EINVAL (chmod(2)). Before it listens, nobody is let in.
            os.fchmod(listening.fileno(), 0o600)
        listening.bind(str(place))
        place.chmod(0o600)
        listening.listen(BACKLOG)
        return UnixListener(trio.socket.from_stdlib_socket(listening), place)
    except OSError as exc:
        listening.close()
        if exc.errno == errno.EADDRINUSE:
            raise TransportError(
                f"{place}: exists already", hint="another session uses it, or left it: remove it if none runs"
            ) from None
        raise TransportError(f"{place}: cannot listen: {exc.strerror or exc}", hint=what_to_do(exc)) from None
    except BaseException:
        listening.close()
        raise


async def accept_socket(listening: trio.socket.SocketType) -> trio.socket.SocketType:
    """One connection, whoever it is. Raises TransportError when none can be taken any more."""
    while True:
        try:
            accepted, _ = await listening.accept()
        except OSError as exc:
            if exc.errno in {errno.ECONNABORTED, errno.ECONNRESET}:  # gone again before it was taken
                continue
            raise TransportError(f"cannot accept: {exc.strerror or exc}", hint=what_to_do(exc)) from None
        return accepted


async def dial_unix(path: str | os.PathLike[str]) -> trio.SocketStream:
    """Connects to the socket at `path`. Raises TransportError; `__cause__` is the system's error."""
    try:
        return await trio.open_unix_socket(path)
    except OSError as exc:
        raise TransportError(f"{path}: cannot be dialled: {exc.strerror or exc}") from exc


def _require_private(directory: Path) -> None:
    status = directory.stat()
    if status.st_uid != _user() or stat.S_IMODE(status.st_mode) & 0o077:
        raise TransportError(
            f"{directory}: others may enter this directory, and so dial the channel",
            hint="make it yours alone: chmod 700",
        )


def _credentials(connected: trio.socket.SocketType) -> tuple[int, int]:
    """User and process id of the peer; where not told, the user whom the directory admits, and 0. Raises
    OSError."""
    pid = 0
    if sys.platform == "darwin":
        _, uid, *_ = XUCRED.unpack(connected.getsockopt(SOL_LOCAL, LOCAL_PEERCRED, XUCRED.size))
        with suppress(OSError):  # who has closed already has a user only
            [pid] = struct.unpack("i", connected.getsockopt(SOL_LOCAL, LOCAL_PEERPID, struct.calcsize("i")))
    elif option := getattr(socket, "SO_PEERCRED", None):
        size = struct.calcsize("3i")
        pid, uid, _gid = struct.unpack("3i", connected.getsockopt(socket.SOL_SOCKET, option, size))
    else:
        uid = _user()
    return uid, pid
