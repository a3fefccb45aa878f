"""A driver of somebody else: the agent as a child, the shortest one that keeps all promises."""

import signal
from contextlib import asynccontextmanager
from typing import ClassVar

import trio

from kenaz_drivers.contract import MARK, Capabilities, DriverError, Exit, LaunchPlan, Reason
from kenaz_drivers.host import Console, open_background, open_pipe, spawn, terminate


class ExampleMachine:
    def __init__(self, child, console):
        self._child, self._console = child, console
        self._ended, self._gone = None, trio.Event()

    @property
    def handle(self):
        return self._child.handle

    async def watch(self):
        code = await self._child.wait()
        self._ended = Exit(code == 0, f"it ended with code {code}", code)
        self._gone.set()

    async def ready(self):
        await trio.lowlevel.checkpoint()
        if self._ended is not None:
            raise DriverError(self._ended.reason)

    async def wait(self):
        await self._gone.wait()
        return self._ended

    async def powerdown(self):
        await trio.lowlevel.checkpoint()
        self._child.send_signal(signal.SIGTERM)

    async def kill(self):
        with trio.CancelScope(shield=True):
            await self._child.end()
            await self._gone.wait()

    def console(self):
        return Console(self._console)

    async def port_closed(self):
        await trio.sleep_forever()


class ExampleDriver:
    name: ClassVar = "example"
    options_schema: ClassVar = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Options of the driver example",
        "type": "object",
        "additionalProperties": False,
        "properties": {},
    }

    async def probe(self, arch, options):
        await trio.lowlevel.checkpoint()
        return Capabilities(
            usable=True,
            reasons=(Reason(True, "it needs nothing"),),
            arch=arch,
            transports=("unix",),
            disk_formats=("directory",),
            boots_image=False,
            isolates=False,
        )

    def plan(self, request):
        if request.transport != "unix":
            raise DriverError(f"the driver example has no transport {request.transport!r}")
        root = next((disk.path for disk in request.disks if disk.role == "root"), request.directory)
        if any("\0" in word for word in (*request.agent, root)):
            raise DriverError("a NUL character cannot stand in a command line")
        return LaunchPlan(
            driver=self.name,
            argv=request.agent,
            environment={"PATH": "/usr/bin:/bin", MARK: request.mark},
            data={"directory": root},
        )

    @asynccontextmanager
    async def launch(self, plan, descriptors):
        with open_pipe() as (console, theirs):
            child = spawn(
                plan.argv, stdout=theirs, stderr=theirs, env=plan.environment, cwd=plan.data["directory"]
            )
        machine = ExampleMachine(child, console)
        async with open_background() as background:
            background.start_soon(machine.watch)
            try:
                yield machine
            finally:
                with trio.CancelScope(shield=True):
                    await machine.kill()
                    await console.aclose()

    async def release(self, handle):
        await terminate(handle)
