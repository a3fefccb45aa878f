r"""Pipes of Windows, as trio's streams: those to and from a child, and named ones that somebody else serves.

They are read and written by overlapped operations, which trio waits for and can cancel. `\\.\pipe\NAME` is
opened for reading only. Run under Wine 8.0, not on Windows yet.
"""

from __future__ import annotations

import sys

import trio

from kenaz_drivers.contract import DriverError

MOST = 1 << 16
"""Bytes that are read at once, unless the caller says otherwise."""

if sys.platform == "win32":
    import _winapi
    import msvcrt
    from asyncio.windows_utils import pipe

    class _End:
        """One end of a pipe, opened for overlapped operations."""

        def __init__(self, handle: int) -> None:
            self._handle = handle
            trio.lowlevel.register_with_iocp(handle)

        def close(self) -> None:
            """Closes it; what waits for it is told. Idempotent."""
            handle, self._handle = self._handle, -1
            if handle != -1:
                _winapi.CloseHandle(handle)

        async def aclose(self) -> None:
            self.close()
            await trio.lowlevel.checkpoint()

        def _opened(self) -> int:
            if self._handle == -1:
                raise trio.ClosedResourceError("this pipe was closed")
            return self._handle

    class PipeReader(_End, trio.abc.ReceiveStream):
        """The end that is read."""

        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            """As of any stream; empty when the other end is closed."""
            handle = self._opened()
            buffer = bytearray(max_bytes or MOST)
            try:
                size = await trio.lowlevel.readinto_overlapped(handle, buffer)
            except OSError as exc:
                await trio.lowlevel.checkpoint()
                self._opened()
                if isinstance(exc, BrokenPipeError):  # however the other end was closed
                    return b""
                raise trio.BrokenResourceError from exc
            return bytes(buffer[:size])

    class PipeWriter(_End, trio.abc.SendStream):
        """The end that is written."""

        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            """As of any stream."""
            handle, view = self._opened(), memoryview(data)
            await trio.lowlevel.checkpoint()
            try:
                while view:
                    view = view[await trio.lowlevel.write_overlapped(handle, view) :]
            except OSError as exc:
                self._opened()
                raise trio.BrokenResourceError from exc

        async def wait_send_all_might_not_block(self) -> None:
            """As of any stream. Windows does not tell."""
            self._opened()
            await trio.lowlevel.checkpoint()

    def output_pipe() -> tuple[PipeReader, int]:
        """A pipe from a child: our end, and the descriptor to give to it."""
        ours, theirs = pipe(overlapped=(True, False))
        return PipeReader(ours), msvcrt.open_osfhandle(theirs, 0)

    def input_pipe() -> tuple[PipeWriter, int]:
        """A pipe to a child."""
        theirs, ours = pipe(overlapped=(False, True))
        return PipeWriter(ours), msvcrt.open_osfhandle(theirs, 0)

    def open_named(path: str) -> PipeReader:
        """The pipe that somebody serves under that name. Raises OSError when nobody does, or not now."""
        flags = _winapi.FILE_FLAG_OVERLAPPED
        handle = _winapi.CreateFile(
            path, _winapi.GENERIC_READ, 0, _winapi.NULL, _winapi.OPEN_EXISTING, flags, _winapi.NULL
        )
        return PipeReader(handle)

else:

    def open_named(path: str) -> trio.abc.ReceiveStream:
        """There are no pipes of that kind."""
        raise DriverError(f"{path}: this is not Windows")
