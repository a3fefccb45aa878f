"""The driver `hyperv`: Hyper-V on Windows, by way of PowerShell.

A machine of Hyper-V is the host's, not a child of ours: it is known by its id, and outlives whoever made it.
Entering `launch` makes it, so that its id is known before it runs and the launcher can listen for exactly it;
`Machine.ready` starts it. See docs/decisions/0022-hyper-v.md. Not yet run on Windows by this project.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import trio

from kenaz_drivers._common.background import Background, open_background
from kenaz_drivers._common.output import Console
from kenaz_drivers._common.process import capture
from kenaz_drivers._common.qemu_img import find_qemu_img
from kenaz_drivers._common.winpipes import open_named
from kenaz_drivers.contract import (
    Capabilities,
    DriverError,
    Exit,
    JsonObject,
    LaunchPlan,
    LaunchRequest,
    Reason,
)
from kenaz_drivers.hyperv import scripts

QUESTION_DEADLINE = 10.0
"""Seconds for PowerShell to start and look around: 1 to 3."""

MAKE_DEADLINE = 30.0
START_DEADLINE = 30.0
REMOVE_DEADLINE = 20.0
"""Seconds for the scripts that do something."""

CONSOLE_PATIENCE = 5.0
"""Seconds for the pipe of COM1 to be there, once the machine runs."""

CONSOLE_PAUSE = 0.1

DEFAULT_PORT = 7881

_HINTS = (
    ("not recognized", "enable the feature Microsoft-Hyper-V-All"),
    ("required permission", "join the group Hyper-V Administrators, and sign in again"),
    ("not enough memory", "give the machine less memory"),
    ("being used by another process", "another machine uses this disk; end that one first"),
    ("must not be sparse", "have Windows keep the disk's folder plainly: compact /u, cipher /d"),
)


def hint_for(text: str) -> str:
    """What the user can do about a script that said this; empty when we do not know."""
    return next((hint for said, hint in _HINTS if said in text), "")


class PowerShell:
    """Runs scripts, each in a process of its own."""

    def __init__(self, program: str) -> None:
        self._program = program

    def argv(self, script: str) -> tuple[str, ...]:
        """The command that runs it."""
        return (self._program, "-NoProfile", "-NonInteractive", "-Command", script)

    async def run(self, script: str, what: str, deadline: float) -> str:
        """What it says. Raises DriverError when it fails, or is not done in `deadline` seconds."""
        captured = await capture(self.argv(script), deadline=deadline)
        if captured.code == 0:
            return captured.text
        lines = tuple(line.strip() for line in captured.text.splitlines() if line.strip())[-20:]
        why = lines[0] if lines else f"PowerShell ended with code {captured.code}"
        if captured.code is None:
            why = f"PowerShell is not done after {deadline:g} s"
        raise DriverError(f"{what}: {why}", hint=hint_for(captured.text), log=lines)


class HypervMachine:
    """A machine of Hyper-V. Made by `HypervDriver.launch` only."""

    def __init__(self, shell: PowerShell, machine: str, data: JsonObject, background: Background) -> None:
        self._shell = shell
        self._machine = machine
        self._data = data
        self._background = background
        self._cut = False
        self._pressed = False
        self._exit: Exit | None = None
        self._gone = trio.Event()
        self._started = trio.Event()

    @property
    def handle(self) -> JsonObject:
        return {"vm": self._machine, "mark": self._data["mark"], "powershell": self._data["powershell"]}

    async def ready(self) -> None:
        await self._shell.run(scripts.start(self._machine), "the machine cannot be started", START_DEADLINE)
        self._started.set()
        self._background.start_soon(self._watch)

    async def _watch(self) -> None:
        """Waits until the machine is off, or gone, and makes it known."""
        try:
            await self._shell.run(scripts.watch(self._machine), "the machine is gone", math.inf)
            ended = Exit(True, "the guest shut itself down")
        except DriverError as error:
            ended = Exit(False, str(error))
        if self._cut:
            ended = Exit(False, "the launcher cut the power")
        self._end(ended)

    def _end(self, ended: Exit) -> None:
        self._exit = self._exit or ended
        self._gone.set()

    async def wait(self) -> Exit:
        await self._gone.wait()
        assert self._exit is not None
        return self._exit

    async def powerdown(self) -> None:
        await trio.lowlevel.checkpoint()
        # It is done when the guest is; a guest without the service shows by its deadline. To press again
        # meanwhile would start another PowerShell, only for Hyper-V to refuse it.
        if not self._pressed:
            self._pressed = True
            self._background.start_soon(self._shut_down)

    async def _shut_down(self) -> None:
        with contextlib.suppress(DriverError):
            await self._shell.run(scripts.shut_down(self._machine), "the guest shuts not down", math.inf)
        self._pressed = False

    async def kill(self) -> None:
        with trio.CancelScope(shield=True):
            self._cut = self._cut or self._exit is None
            await self._shell.run(
                scripts.remove(self._machine), "the machine cannot be removed", REMOVE_DEADLINE
            )
            self._end(Exit(False, "the launcher cut the power"))

    def console(self) -> AsyncIterator[bytes]:
        return self._read_console()

    async def _read_console(self) -> AsyncIterator[bytes]:
        """Reads COM1; nothing where the pipe cannot be had."""
        await self._started.wait()
        pipe = await self._open_console()
        if pipe is not None:
            async with pipe:
                async for data in Console(pipe):
                    yield data

    async def _open_console(self) -> trio.abc.ReceiveStream | None:
        with trio.move_on_after(CONSOLE_PATIENCE):
            while not self._gone.is_set():
                # A DriverError where this is not Windows, and its PowerShell is told by a path: WSL.
                with contextlib.suppress(OSError, DriverError):
                    return open_named(self._data["console"])
                await trio.sleep(CONSOLE_PAUSE)
        return None

    async def port_closed(self) -> None:
        await trio.sleep_forever()  # it has no such port


class HypervDriver:
    """Runs machines with Hyper-V on this host."""

    name: ClassVar[str] = "hyperv"
    options_schema: ClassVar[JsonObject] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Options of the driver hyperv",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "secureBoot": {
                "title": "Secure boot",
                "description": "Whether the firmware boots only what Microsoft's certificate authority for "
                "others has signed, as it has the boot loaders of most distributions.",
                "type": "boolean",
                "default": False,
                "examples": [True],
            },
            "powershell": {
                "title": "Path of PowerShell",
                "description": "Taken instead of `powershell.exe` from the search path, on whatever system.",
                "type": "string",
                "minLength": 1,
                "default": "",
                "examples": ["C:\\Program Files\\PowerShell\\7\\pwsh.exe"],
            },
        },
    }

    async def probe(self, arch: str, options: JsonObject) -> Capabilities:
        named = str(options.get("powershell", ""))
        program = named or (shutil.which("powershell.exe") or "" if sys.platform == "win32" else "")
        if not program:
            return Capabilities(False, (Reason(False, "Hyper-V runs on Windows only"),), arch)
        try:
            said = await PowerShell(program).run(
                scripts.look(DEFAULT_PORT), "PowerShell cannot be asked", QUESTION_DEADLINE
            )
            reasons = _reasons(_answer(said), find_qemu_img())
        except (DriverError, ValueError, LookupError, TypeError) as error:
            reasons = (Reason(False, str(error), getattr(error, "hint", "") or "repair PowerShell"),)
        usable = all(reason.ok for reason in reasons if not reason.transport)
        return Capabilities(
            usable=usable,
            reasons=reasons,
            arch=arch,
            accelerator="hyperv" if usable else "none",
            transports=("hyperv",) if usable else (),
            disk_formats=("vhdx",),
            boots_kernels=False,
            data={"powershell": program} if usable else {},
        )

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        program = str(request.capabilities.data.get("powershell", ""))
        if not program:
            raise request.capabilities.refusal("Hyper-V")
        secure_boot = bool(request.options.get("secureBoot", False))
        script = scripts.create(request, secure_boot=secure_boot)
        notes = [] if secure_boot else ["secure boot is off: the firmware boots whatever is on the disk"]
        if request.network == "nat":
            notes.append("network nat: the guest reaches whatever this host reaches")
        return LaunchPlan(
            driver=self.name,
            argv=PowerShell(program).argv(script),
            notes=tuple(notes),
            data={
                "powershell": program,
                "mark": request.mark,
                "console": scripts.pipe_of(request.mark),
                "directory": str(Path(request.directory) / scripts.machine_name(request.mark)),
            },
            trace={"powershell": program},
        )

    @asynccontextmanager
    async def launch(self, plan: LaunchPlan, descriptors: Mapping[str, int]) -> AsyncIterator[HypervMachine]:
        shell = PowerShell(str(plan.data["powershell"]))
        name = scripts.machine_name(str(plan.data["mark"]))
        try:
            said = await shell.run(plan.argv[-1], "the machine cannot be made", MAKE_DEADLINE)
            made = str(_answer(said)["id"]).lower()
            removal = scripts.remove(made)
        except BaseException as error:
            # Half of it may be there, under the name that was chosen for it.
            with trio.CancelScope(shield=True), contextlib.suppress(DriverError):
                await shell.run(
                    scripts.remove(name, by_name=True), "the machine cannot be removed", REMOVE_DEADLINE
                )
            if isinstance(error, (ValueError, LookupError, TypeError)):
                raise DriverError("PowerShell does not say the machine's id") from error
            raise
        async with open_background() as background:
            machine = HypervMachine(shell, made, plan.data, background)
            try:
                yield machine
            finally:
                with trio.CancelScope(shield=True):
                    await shell.run(removal, "the machine cannot be removed", REMOVE_DEADLINE)
                    # What Hyper-V keeps of a machine beside its disks; empty directories stay of it.
                    shutil.rmtree(str(plan.data["directory"]), ignore_errors=True)

    async def release(self, handle: JsonObject) -> None:
        program = str(handle.get("powershell", "")) or shutil.which("powershell.exe") or "powershell.exe"
        if "vm" in handle:
            removal = scripts.remove(str(handle["vm"]))
        else:
            removal = scripts.remove(scripts.machine_name(str(handle["mark"])), by_name=True)
        await PowerShell(program).run(removal, "the machine cannot be removed", REMOVE_DEADLINE)


def _answer(said: str) -> Any:
    """The JSON that a script ends with: PowerShell may have said something before it. Raises ValueError."""
    return json.loads(said.strip().rpartition("\n")[2])


def _reasons(seen: Mapping[str, Any], qemu_img: str) -> tuple[Reason, ...]:
    module, allowed, registered = (bool(seen[name]) for name in ("module", "allowed", "registered"))
    enable = "as administrator: Enable-WindowsOptionalFeature -Online -FeatureName Microsoft-Hyper-V-All"
    service = scripts.service_id(DEFAULT_PORT)
    return (
        Reason(module, "Hyper-V is there" if module else "Hyper-V's module is not installed", enable),
        Reason(
            allowed,
            "this user may make machines" if allowed else "this user may make no machines",
            "join the group Hyper-V Administrators, and sign in again",
        ),
        Reason(
            registered,
            f"service {service} (port {DEFAULT_PORT}) is {'' if registered else 'not '}registered",
            f"as administrator, once: {scripts.register(DEFAULT_PORT)}",
        ),
        Reason(
            bool(qemu_img),
            f"qemu-img at {qemu_img}" if qemu_img else "there is no qemu-img, which makes VHDX of images",
            "winget install SoftwareFreedomConservancy.QEMU",
        ),
    )
