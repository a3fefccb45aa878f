"""The driver `vfkit`: Virtualization.framework on macOS, by way of vfkit as a child process.

Why another program, and this one, is in docs/decisions/0020-vfkit.md.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar

import trio

from kenaz_drivers._common.background import open_background
from kenaz_drivers._common.output import Console, LogTail, describe_end
from kenaz_drivers._common.process import ChildProcess, open_pipe, spawn
from kenaz_drivers._common.terminate import terminate
from kenaz_drivers.contract import (
    MARK,
    Capabilities,
    DriverError,
    Exit,
    JsonObject,
    LaunchPlan,
    LaunchRequest,
)
from kenaz_drivers.vfkit import probe
from kenaz_drivers.vfkit.argv import build
from kenaz_drivers.vfkit.rest import BROKEN, RUNNING, RestClient, RestError, RestRefused

READY_DEADLINE = 20.0
"""Seconds for the machine to run. vfkit itself waits for 5 s."""

PAUSE = 0.05
"""Seconds between two looks at the state: nothing tells of it."""

COMMAND_DEADLINE = 5.0
CUT_GRACE = 0.5
"""Seconds for the power cut over REST, and vfkit's end after it."""

TERM_GRACE = 0.5
"""Seconds after SIGTERM, of which vfkit would take 5 or more: it presses the guest's button first."""

DRAIN_GRACE = 1.0

_HINTS = (
    (
        "com.apple.security.virtualization",
        "vfkit is not signed for it: brew reinstall vfkit, or codesign --entitlements",
    ),
    ("kernel must be uncompressed", "use an image with an uncompressed kernel (Image)"),
    ("does not support qcow2", "use an image with a raw disk"),
    ("address already in use", "remove the socket that is named, if no vfkit uses it"),
    ("cannot start ", "driverOptions.vfkit.binary: the path of vfkit"),
)

_NO_CHANNEL = "error exposing vsock port"
"""What vfkit only warns of: the machine runs on without its channel (cmd/vfkit/main.go)."""


def hint_for(log: tuple[str, ...]) -> str:
    """What the user can do about a vfkit that said this and ended; empty when we do not know."""
    return next((hint for said, hint in _HINTS if any(said in line for line in log)), "")


def describe_exit(code: int, *, cut: bool, log: tuple[str, ...], no_channel: str = "") -> Exit:
    """How a machine ended, from vfkit's exit code: 0 when it stopped, for whatever reason. `cut` says that
    the launcher cut the power."""
    if no_channel:
        return Exit(False, f"vfkit gave the guest no channel: {no_channel}", code)
    if code == 0:
        return Exit(not cut, "the launcher cut the power" if cut else "the guest powered off", code)
    return Exit(False, describe_end("vfkit", code, log), code)


class VfkitMachine:
    """A running vfkit. Made by `VfkitDriver.launch` only."""

    def __init__(
        self, child: ChildProcess, rest: RestClient, console: trio.abc.ReceiveStream, files: tuple[str, ...]
    ) -> None:
        self._child = child
        self._rest = rest
        self._console = console
        self._files = files
        self._log = LogTail()
        self._no_channel = ""
        self._cut = False
        self._exit: Exit | None = None
        self._gone = trio.Event()

    @property
    def handle(self) -> JsonObject:
        return {**self._child.handle, "files": list(self._files)}

    async def read_log(self, stream: trio.abc.ReceiveStream) -> None:
        """Keeps what vfkit logs flowing, and its last lines; ends a machine that has no channel."""
        try:
            async for data in Console(stream):
                self._log.feed(data)
                warned = [line for line in self._log.lines() if _NO_CHANNEL in line]
                if warned and not self._no_channel:
                    self._no_channel = warned[-1]
                    self._child.kill_group()
        finally:
            self._log.ended.set()

    async def watch(self) -> None:
        """Waits for the end of vfkit and makes it known; then ends the console."""
        code = await self._child.wait()
        with trio.move_on_after(DRAIN_GRACE):
            await self._log.ended.wait()
        self._exit = describe_exit(code, cut=self._cut, log=self._log.lines(), no_channel=self._no_channel)
        self._gone.set()
        await trio.sleep(DRAIN_GRACE)
        await self._console.aclose()

    async def ready(self) -> None:
        with trio.move_on_after(READY_DEADLINE):
            while self._exit is None:
                with contextlib.suppress(RestError):
                    state = await self._rest.state()
                    if state == RUNNING:
                        return
                    if state in BROKEN:
                        break
                await trio.sleep(PAUSE)
        if self._exit is None:  # it ends by itself when the machine cannot run
            with trio.move_on_after(DRAIN_GRACE):
                await self._gone.wait()
        if self._exit is not None:
            raise self._failure(self._exit.reason)
        raise self._failure(f"vfkit has no running machine within {READY_DEADLINE:g} s")

    def _failure(self, message: str) -> DriverError:
        log = self._log.lines()
        hint = hint_for(log) or "`kenaz-launcher plan` prints the command to try by hand"
        return DriverError(message, hint=hint, log=log)

    async def wait(self) -> Exit:
        await self._gone.wait()
        assert self._exit is not None
        return self._exit

    async def powerdown(self) -> None:
        try:
            with trio.fail_after(COMMAND_DEADLINE):
                await self._rest.change("Stop")
        except RestError as error:
            raise self._failure(f"the power button does not work: {error}") from error
        except trio.TooSlowError as error:
            raise self._failure("the power button does not work: vfkit does not answer") from error

    async def kill(self) -> None:
        with trio.CancelScope(shield=True):
            self._cut = self._cut or self._exit is None
            with trio.move_on_after(CUT_GRACE):
                # A refusal says that the machine is in no state to be stopped: vfkit is ended all the same.
                with contextlib.suppress(RestError, RestRefused):
                    await self._rest.change("HardStop")
                    await self._gone.wait()
            await self._child.end((signal.SIGTERM, TERM_GRACE))
            await self._gone.wait()

    def console(self) -> AsyncIterator[bytes]:
        return Console(self._console)

    async def port_closed(self) -> None:
        await trio.sleep_forever()  # it has no such port


class VfkitDriver:
    """Runs machines with vfkit on this host."""

    name: ClassVar[str] = "vfkit"
    options_schema: ClassVar[JsonObject] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Options of the driver vfkit",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "binary": {
                "title": "Path of vfkit",
                "description": "Taken instead of `vfkit` from the search path: also another program with "
                "vfkit's command line and REST interface, on whatever system.",
                "type": "string",
                "minLength": 1,
                "default": "",
                "examples": ["/opt/homebrew/bin/vfkit"],
            },
        },
    }

    async def probe(self, arch: str, options: JsonObject) -> Capabilities:
        return await probe.probe(arch, options)

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        binary = str(request.capabilities.data.get("binary", ""))
        if not binary:
            raise request.capabilities.refusal("vfkit")
        command = build(request, binary)
        return LaunchPlan(
            driver=self.name,
            argv=command.argv,
            environment={"LC_ALL": "C.UTF-8", **({MARK: request.mark} if request.mark else {})},
            notes=command.notes,
            data={"rest": command.rest, "files": [*filter(None, (command.rest, command.variables))]},
        )

    @asynccontextmanager
    async def launch(self, plan: LaunchPlan, descriptors: Mapping[str, int]) -> AsyncIterator[VfkitMachine]:
        rest, files = str(plan.data["rest"]), tuple(plan.data["files"])
        _remove(files)  # vfkit ends where there is a socket already
        with open_pipe() as (console, console_end), open_pipe() as (log, log_end):
            terminal, stdin = _open_terminal()
            try:
                child = spawn(
                    plan.argv, stdin=stdin, stdout=console_end, stderr=log_end, env=plan.environment
                )
            except BaseException:
                os.close(terminal)
                raise
            finally:
                os.close(stdin)
        machine = VfkitMachine(child, RestClient(rest), console, files)
        async with open_background() as background:
            background.start_soon(lambda: machine.read_log(log))
            background.start_soon(machine.watch)
            try:
                yield machine
            finally:
                with trio.CancelScope(shield=True):
                    try:
                        await machine.kill()
                    finally:
                        os.close(terminal)
                        await console.aclose()
                        await log.aclose()
                        _remove(files)

    async def release(self, handle: JsonObject) -> None:
        await terminate(handle)
        _remove(handle.get("files", ()))


def _remove(files: tuple[str, ...]) -> None:
    for path in files:
        Path(path).unlink(missing_ok=True)


if sys.platform == "win32":

    def _open_terminal() -> tuple[int, int]:
        raise DriverError("vfkit needs a terminal, which this platform has not", hint="driver: hyperv")

else:

    def _open_terminal() -> tuple[int, int]:
        """A terminal that nobody types at: vfkit sets its stdin to raw mode, and ends where that is none."""
        return os.openpty()
