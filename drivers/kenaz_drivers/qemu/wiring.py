"""How a QEMU is started so that its monitor, its console and its log reach us: over descriptors of ours, or
on Windows, where none can be passed, over its standard streams and a named pipe that it serves."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import trio

from kenaz_drivers._common.process import ChildProcess, open_pipe, spawn
from kenaz_drivers._common.winpipes import open_named
from kenaz_drivers.contract import DriverError, LaunchPlan

CONSOLE_PAUSE = 0.02
"""Seconds between two attempts to open the console's pipe, which QEMU makes early on and then waits for."""


@dataclass(frozen=True, slots=True)
class Wires:
    """A QEMU that was started, and our ends."""

    child: ChildProcess
    qmp: trio.abc.Stream
    console: trio.abc.ReceiveStream
    log: trio.abc.ReceiveStream

    async def aclose(self) -> None:
        """Closes our ends."""
        for stream in (self.qmp, self.console, self.log):
            await stream.aclose()


class NamedConsole(trio.abc.ReceiveStream):
    r"""The pipe of the console, which is there some time after QEMU has started. QEMU goes on only when it is
    opened, so `open` must run. Whoever reads waits for it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._pipe: trio.abc.ReceiveStream | None = None
        self._closed = False
        self._changed = trio.Event()

    async def open(self) -> None:
        """Tries until the pipe is open, or this is closed."""
        while not self._closed and self._pipe is None:
            try:
                self._pipe = open_named(self._path)
            except OSError:
                await trio.sleep(CONSOLE_PAUSE)
        self._changed.set()

    def give_up(self) -> None:
        """QEMU has ended: nobody serves the pipe any more, if anybody ever did."""
        self._closed = self._pipe is None
        self._changed.set()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As of any stream."""
        await self._changed.wait()
        if self._pipe is None or self._closed:
            raise trio.ClosedResourceError
        return bytes(await self._pipe.receive_some(max_bytes))

    async def aclose(self) -> None:
        """As of any stream."""
        self._closed = True
        self._changed.set()
        if self._pipe is not None:
            await self._pipe.aclose()
        await trio.lowlevel.checkpoint()


if sys.platform == "win32":
    import os

    from kenaz_drivers._common.winpipes import input_pipe, output_pipe

    def connect(plan: LaunchPlan, descriptors: Mapping[str, int]) -> Wires:
        """Starts the QEMU of that plan. Raises DriverError."""
        to_qemu, stdin = input_pipe()
        from_qemu, stdout = output_pipe()
        try:
            with open_pipe() as (log, stderr):
                child = spawn(plan.argv, stdin=stdin, stdout=stdout, stderr=stderr, env=plan.environment)
        except BaseException:
            to_qemu.close()
            from_qemu.close()
            raise
        finally:
            os.close(stdin)
            os.close(stdout)
        console = NamedConsole(str(plan.data["console"]))
        return Wires(child, trio.StapledStream(to_qemu, from_qemu), console, log)

else:

    def connect(plan: LaunchPlan, descriptors: Mapping[str, int]) -> Wires:
        """Starts the QEMU of that plan. Raises DriverError."""
        if not plan.descriptors:
            raise DriverError("this plan is for a QEMU of Windows")
        own = {"qmp": socket.socketpair(), "console": socket.socketpair()}
        try:
            numbers = {purpose: theirs.fileno() for purpose, (_, theirs) in own.items()} | dict(descriptors)
            missing = [purpose for purpose in plan.descriptors.values() if purpose not in numbers]
            if missing:
                raise DriverError(f"QEMU needs an open descriptor for {', '.join(missing)}")
            with open_pipe() as (log, log_end):
                child = spawn(
                    plan.argv,
                    descriptors={number: numbers[purpose] for number, purpose in plan.descriptors.items()},
                    stderr=log_end,
                    env=plan.environment,
                )
        except BaseException:
            for ours, _ in own.values():
                ours.close()
            raise
        finally:
            for _, theirs in own.values():
                theirs.close()
        qmp, console = (_stream(own[purpose][0]) for purpose in ("qmp", "console"))
        return Wires(child, qmp, console, log)

    def _stream(ours: socket.socket) -> trio.SocketStream:
        return trio.SocketStream(trio.socket.from_stdlib_socket(ours))
