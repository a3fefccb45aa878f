"""The driver `process`: the guest's agent as a child process, for hosts without a hypervisor.

It keeps the agent from the terminal, the environment and core dumps of the launcher, and bounds its memory
but on Windows.
It keeps it from nothing else: the agent runs as the user who runs the launcher.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import ClassVar

import trio

from kenaz_drivers._common.background import open_background
from kenaz_drivers._common.output import Console, describe_end
from kenaz_drivers._common.process import ChildProcess, open_pipe, spawn
from kenaz_drivers._common.terminate import terminate
from kenaz_drivers._common.windows import needed_environment
from kenaz_drivers.contract import (
    MARK,
    Capabilities,
    DriverError,
    Exit,
    JsonObject,
    LaunchPlan,
    LaunchRequest,
    Reason,
)

TERM_GRACE = 0.2
DRAIN_GRACE = 0.5
"""Seconds for the last output of an agent that has ended, which a child of its own may keep open."""

_NO_ISOLATION = "the driver process isolates nothing: the agent runs as you, on this machine"


_NO_BOUNDS = "the agent's memory is not bounded on Windows"


def describe_exit(code: int, asked: bool) -> Exit:
    """How the agent ended; `asked` says that the power button was pressed before."""
    if code == 0:
        return Exit(True, "the agent ended", code)
    if code == -signal.SIGTERM and asked:
        return Exit(True, "the agent ended on SIGTERM, as it was asked to", code)
    return Exit(False, describe_end("the agent", code), code)


if sys.platform == "win32":

    class Button:
        """The end of the agent's standard input: no signal of Windows is more than a power cut."""

        def __init__(self) -> None:
            self.theirs, self._ours = os.pipe()

        def handed_over(self) -> None:
            """The agent has its end."""
            os.close(self.theirs)

        def press(self, child: ChildProcess) -> None:
            """Does nothing the second time."""
            self.close()

        def close(self) -> None:
            """Idempotent."""
            ours, self._ours = self._ours, -1
            if ours != -1:
                os.close(ours)

else:

    class Button:
        """SIGTERM."""

        theirs = subprocess.DEVNULL
        """The agent's standard input."""

        def handed_over(self) -> None:
            """Nothing is."""

        def press(self, child: ChildProcess) -> None:
            """Does nothing where the agent is gone."""
            child.send_signal(signal.SIGTERM)

        def close(self) -> None:
            """Holds nothing."""


class ProcessMachine:
    """A running agent. Made by `ProcessDriver.launch` only."""

    def __init__(self, child: ChildProcess, console: trio.abc.ReceiveStream, button: Button) -> None:
        self._child = child
        self._console = console
        self._button = button
        self._asked = False
        self._exit: Exit | None = None
        self._gone = trio.Event()

    @property
    def handle(self) -> JsonObject:
        return self._child.handle

    async def watch(self) -> None:
        """Waits for the end of the agent and makes it known; then ends the console."""
        code = await self._child.wait()
        self._exit = describe_exit(code, self._asked)
        self._gone.set()
        await trio.sleep(DRAIN_GRACE)
        await self._console.aclose()

    async def ready(self) -> None:
        """The agent runs from its first instruction on; whether it dials shows on the channel."""
        await trio.lowlevel.checkpoint()
        if self._exit is not None:
            raise DriverError(self._exit.reason)

    async def wait(self) -> Exit:
        await self._gone.wait()
        assert self._exit is not None
        return self._exit

    async def powerdown(self) -> None:
        await trio.lowlevel.checkpoint()
        self._asked = True
        self._button.press(self._child)

    async def kill(self) -> None:
        with trio.CancelScope(shield=True):
            await self._child.end()
            await self._gone.wait()

    def console(self) -> AsyncIterator[bytes]:
        return Console(self._console)

    async def port_closed(self) -> None:
        await trio.sleep_forever()  # it has no such port


class ProcessDriver:
    """Runs the agent itself, without any machine around it."""

    name: ClassVar[str] = "process"
    options_schema: ClassVar[JsonObject] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Options of the driver process",
        "description": "It has none.",
        "type": "object",
        "additionalProperties": False,
        "properties": {},
    }

    async def probe(self, arch: str, options: JsonObject) -> Capabilities:
        await trio.lowlevel.checkpoint()
        needed = needed_environment("PATH", "TEMP")
        return Capabilities(
            usable=True,
            reasons=(Reason(True, _NO_ISOLATION),),
            arch=arch,
            transports=("unix",),
            disk_formats=("directory",),
            boots_image=False,
            isolates=False,
            data={"environment": needed} if needed else {},
        )

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        if not request.agent:
            raise DriverError("the driver process needs an agent to run", hint="use an image with an agent")
        if request.transport != "unix":
            raise DriverError(f"the driver process has no transport {request.transport!r}", hint="unix")
        scratch = next((disk.path for disk in request.disks if disk.role == "root"), request.directory)
        environment = {"HOME": scratch, "LANG": "C.UTF-8", "PATH": "/usr/local/bin:/usr/bin:/bin"}
        windows = request.capabilities.data.get("environment", {})
        environment |= windows
        environment |= {MARK: request.mark} if request.mark else {}
        if any("\0" in text for text in (*request.agent, scratch)):
            raise DriverError("a NUL character cannot stand in a command line", hint="rename the file")
        return LaunchPlan(
            driver=self.name,
            argv=request.agent,
            environment=environment,
            notes=(_NO_ISOLATION, *((_NO_BOUNDS,) if windows else ())),
            data={"directory": scratch, "limits": {"core": 0, "data": request.memory}},
        )

    @asynccontextmanager
    async def launch(self, plan: LaunchPlan, descriptors: Mapping[str, int]) -> AsyncIterator[ProcessMachine]:
        button = Button()
        try:
            with open_pipe() as (console, theirs):
                child = spawn(
                    plan.argv,
                    stdin=button.theirs,
                    stdout=theirs,
                    stderr=theirs,
                    env=plan.environment,
                    cwd=plan.data["directory"],
                    limits=plan.data["limits"],
                    no_new_privileges=True,
                )
        except BaseException:
            button.close()
            raise
        finally:
            button.handed_over()
        machine = ProcessMachine(child, console, button)
        async with open_background() as background:
            background.start_soon(machine.watch)
            try:
                yield machine
            finally:
                with trio.CancelScope(shield=True):
                    try:
                        await child.end((signal.SIGTERM, TERM_GRACE))
                        await terminate(child.handle)  # what has left the agent's group
                    finally:
                        button.close()
                        await console.aclose()

    async def release(self, handle: JsonObject) -> None:
        await terminate(handle)
