"""The driver `qemu`: QEMU as a child process, steered over QMP."""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import ClassVar

import trio

from kenaz_drivers._common.background import open_background
from kenaz_drivers._common.output import Console, LogTail, describe_end
from kenaz_drivers._common.process import ChildProcess
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
from kenaz_drivers.qemu import probe
from kenaz_drivers.qemu.argv import CHARDEV_ID, PORT_ID, Facts, build, console_pipe
from kenaz_drivers.qemu.qmp import Event, QmpClient, QmpError, QmpRefused
from kenaz_drivers.qemu.wiring import NamedConsole, connect

GREETING_DEADLINE = 20.0
"""Seconds for QEMU to set the machine up and answer. It takes 0.05; a cold, busy disk has taken 5."""

COMMAND_DEADLINE = 5.0
QUIT_GRACE = 0.5
TERM_GRACE = 0.5
DRAIN_GRACE = 3.0
"""Seconds for the last events and lines of a QEMU that has ended to be read."""

# What QEMU says, and what its user can do.
_HINTS = (
    ("Could not access KVM", "driverOptions.qemu.accel: tcg, or join the group kvm"),
    ('Failed to get "', "another machine uses this disk; end that one first"),
    ("Cannot allocate memory", "give the machine less memory"),
    ("cannot set up guest memory", "give the machine less memory"),
    ("No space left on device", "free some space"),
    ("Could not set up host forwarding", "another process took the port first; run it again"),
    ("Permission denied", "let your user read that file"),
    ("cannot start ", "driverOptions.qemu.binary: the path of QEMU"),
)

_WORDS = {
    "guest-shutdown": "the guest powered off",
    "guest-reset": "the guest asked for a reboot",
    "guest-panic": "the guest's kernel panicked",
    "host-qmp-quit": "the launcher ended QEMU",
    "host-signal": "a signal ended QEMU",
}


def hint_for(log: tuple[str, ...]) -> str:
    """What the user can do about a QEMU that said this and ended; empty when we do not know."""
    if sys.platform == "win32" and any("Could not open" in line and not line.isascii() for line in log):
        # Run under Wine with the code page 1252: QEMU 11 takes such a name for UTF-8, CreateFileA does not.
        return "set KENAZ_STATE_DIR and KENAZ_CACHE_DIR to paths of ASCII: QEMU for Windows opens no others"
    return next((hint for said, hint in _HINTS if any(said in line for line in log)), "")


def describe_exit(code: int, shutdown: str, log: tuple[str, ...]) -> Exit:
    """How a machine ended, from QEMU's exit code and the reason in its last SHUTDOWN event.

    The code alone says nothing: a power-off, a reboot, a panic and a SIGTERM all give 0.
    """
    if code == 0 and shutdown:
        return Exit(shutdown == "guest-shutdown", f"{shutdown}: {_WORDS.get(shutdown, 'QEMU ended')}", code)
    return Exit(False, describe_end("QEMU", code, log), code)


class QemuMachine:
    """A running QEMU. Made by `QemuDriver.launch` only."""

    def __init__(self, child: ChildProcess, qmp: trio.abc.Stream, console: trio.abc.ReceiveStream) -> None:
        self._child = child
        self._qmp = QmpClient(qmp, self._on_event)
        self._console = console
        self._log = LogTail()
        self._shutdown = ""
        self._port_opened = False
        self._port_changed = trio.Event()
        self._exit: Exit | None = None
        self._gone = trio.Event()

    @property
    def handle(self) -> JsonObject:
        return self._child.handle

    def _on_event(self, event: Event) -> None:
        if event.name == "SHUTDOWN":
            self._shutdown = str(event.data.get("reason", ""))
        elif event.name == "VSERPORT_CHANGE" and event.data.get("id") == PORT_ID:
            self._port_opened = self._port_opened or bool(event.data.get("open"))
            self._port_changed.set()
            self._port_changed = trio.Event()

    async def serve_monitor(self) -> None:
        await self._qmp.run()

    async def read_log(self, stream: trio.abc.ReceiveStream) -> None:
        """Reads what QEMU says on stderr."""
        await self._log.read(stream)

    async def watch(self) -> None:
        """Waits for the end of QEMU and makes it known."""
        code = await self._child.wait()
        if isinstance(self._console, NamedConsole):
            self._console.give_up()
        with trio.move_on_after(DRAIN_GRACE):
            await self._qmp.ended.wait()
            await self._log.ended.wait()
        self._exit = describe_exit(code, self._shutdown, self._log.lines())
        self._gone.set()

    async def ready(self) -> None:
        try:
            with trio.fail_after(GREETING_DEADLINE):
                status = await self._qmp.execute("query-status")
        except QmpError as error:
            # A monitor that ends is the first sign of a QEMU that does.
            with trio.move_on_after(DRAIN_GRACE + TERM_GRACE):
                ended = await self.wait()
                raise self._failure(ended.reason) from error
            raise self._failure(str(error)) from error
        except trio.TooSlowError as error:
            raise self._failure(f"QEMU does not answer within {GREETING_DEADLINE:g} s") from error
        if status["status"] != "running":
            raise self._failure(f"QEMU made a machine that does not run: {status['status']}")

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
                await self._qmp.execute("system_powerdown")
        except QmpError as error:
            raise self._failure(f"the power button does not work: {error}") from error
        except trio.TooSlowError as error:
            raise self._failure("the power button does not work: QEMU does not answer") from error

    async def screenshot(self, path: str) -> None:
        try:
            with trio.fail_after(COMMAND_DEADLINE):
                await self._qmp.execute("screendump", filename=path, format="png")
        except QmpRefused as error:
            hint = "machine.display: vnc" if "no graphical" in str(error).lower() else ""
            raise DriverError(f"QEMU makes no picture of the screen: {error}", hint=hint) from error
        except QmpError as error:
            raise self._failure(f"QEMU makes no picture of the screen: {error}") from error
        except trio.TooSlowError as error:
            raise self._failure("QEMU makes no picture of the screen: it does not answer") from error

    async def kill(self) -> None:
        with trio.CancelScope(shield=True):
            with trio.move_on_after(QUIT_GRACE):
                try:
                    await self._qmp.execute("quit")
                except QmpError:
                    pass
                else:
                    await self._gone.wait()
            # A stopped process holds SIGTERM back until it goes on; SIGKILL takes it as it is.
            await self._child.end((signal.SIGTERM, TERM_GRACE))
            await self._gone.wait()

    def console(self) -> AsyncIterator[bytes]:
        return Console(self._console)

    async def port_closed(self) -> None:
        # QEMU tells of a port once a second at the most, and then of its last state only: so what it tells
        # is a reason to ask.
        while True:
            changed = self._port_changed
            if self._port_opened and not await self._port_is_open():
                return
            await changed.wait()

    async def _port_is_open(self) -> bool:
        try:
            devices = await self._qmp.execute("query-chardev")
        except QmpError:  # it ends, which is told elsewhere
            await trio.sleep_forever()
        return any(device["label"] == CHARDEV_ID and device["frontend-open"] for device in devices)


class QemuDriver:
    """Runs machines with QEMU on this host."""

    name: ClassVar[str] = "qemu"
    options_schema: ClassVar[JsonObject] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Options of the driver qemu",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "accel": {
                "title": "Accelerator",
                "description": "How the guest's processor is run. `auto` takes the fastest one that has "
                "been seen to run a guest here and says so when that is `tcg`; any other name is that one or "
                "an error.",
                "enum": ["auto", "kvm", "tcg", "hvf", "whpx"],
                "default": "auto",
                "examples": ["tcg"],
            },
            "machine": {
                "title": "Machine type",
                "description": "`auto` takes virt for aarch64, and for x86_64 q35, or microvm where a "
                "kernel is given and hardware runs it.",
                "enum": ["auto", "microvm", "q35", "virt"],
                "default": "auto",
                "examples": ["q35"],
            },
            "binary": {
                "title": "Path of QEMU",
                "description": "Taken instead of `qemu-system-<arch>` from the search path.",
                "type": "string",
                "minLength": 1,
                "default": "",
                "examples": ["/opt/qemu/bin/qemu-system-x86_64"],
            },
            "vsockDaemon": {
                "title": "Path of vhost-device-vsock",
                "description": "The program behind the transport vhost-user-vsock, taken instead of the one "
                "from the search path or the launcher's cache.",
                "type": "string",
                "minLength": 1,
                "default": "",
                "examples": ["/opt/vhost/bin/vhost-device-vsock"],
            },
        },
    }

    async def probe(self, arch: str, options: JsonObject) -> Capabilities:
        return await probe.probe(arch, options)

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        capabilities = request.capabilities
        if "facts" not in capabilities.data:
            raise capabilities.refusal("QEMU")
        facts = Facts.from_json(capabilities.data["facts"])
        command = build(request, facts)
        fallback = str(capabilities.data.get("fallback", ""))
        return LaunchPlan(
            driver=self.name,
            argv=command.argv,
            # Nothing else of ours: a guest that breaks out of QEMU must not find our environment there.
            environment={
                "LC_ALL": "C.UTF-8",
                **capabilities.data.get("environment", {}),
                **(capabilities.data.get("desktop", {}) if request.display == "window" else {}),
                **({MARK: request.mark} if request.mark else {}),
            },
            descriptors=command.descriptors,
            helpers=command.helpers,
            notes=((fallback,) if fallback else ()) + command.notes,
            data={"console": rf"\\.\pipe\{console_pipe(request)}"} if facts.platform == "win32" else {},
        )

    @asynccontextmanager
    async def launch(self, plan: LaunchPlan, descriptors: Mapping[str, int]) -> AsyncIterator[QemuMachine]:
        wires = connect(plan, descriptors)
        machine = QemuMachine(wires.child, wires.qmp, wires.console)
        async with open_background() as background:
            background.start_soon(machine.serve_monitor)
            background.start_soon(lambda: machine.read_log(wires.log))
            background.start_soon(machine.watch)
            if isinstance(wires.console, NamedConsole):
                background.start_soon(wires.console.open)
            try:
                yield machine
            finally:
                with trio.CancelScope(shield=True):
                    try:
                        await machine.kill()
                    finally:
                        await wires.aclose()

    async def release(self, handle: JsonObject) -> None:
        await terminate(handle)
