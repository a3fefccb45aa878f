"""The driver `simulated`: a machine that is a script, on trio's clock and without any process.

For tests and rehearsals. Its guest dials the local socket of the session and speaks the channel's protocol as
far as a session needs: hello, pong, and bye when it is asked to drain.
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import trio

from kenaz_drivers._common.background import open_background
from kenaz_drivers._common.loopback import dial_local
from kenaz_drivers.contract import (
    Capabilities,
    DriverError,
    Exit,
    JsonObject,
    LaunchPlan,
    LaunchRequest,
    Reason,
)

_SECONDS = {"type": "number", "minimum": 0}
_MAYBE_SECONDS = {"type": ["number", "null"], "minimum": 0}

_SCRIPT: dict[str, Any] = {
    "title": "Script",
    "description": "What the machine does. Times are in seconds from launch, if not said otherwise.",
    "type": "object",
    "additionalProperties": False,
    "default": {},
    "examples": [{"dial": 1.5, "console": [{"at": 0.2, "line": "Linux version 6.1"}], "powerdown": None}],
    "properties": {
        "ready": {
            "title": "Ready",
            "description": "When the machine is set up; null: never.",
            "default": 0.05,
            "examples": [0.05],
            **_MAYBE_SECONDS,
        },
        "refuse": {
            "title": "Refusal",
            "description": "The machine is not set up, for this reason.",
            "type": "string",
            "default": "",
            "examples": ["no memory"],
        },
        "console": {
            "title": "Console",
            "description": "Lines that the guest prints, in order of time.",
            "type": "array",
            "default": [],
            "examples": [[{"at": 0.2, "line": "Kernel panic - not syncing"}]],
            "items": {
                "title": "Line",
                "description": "One line and when it is printed.",
                "type": "object",
                "additionalProperties": False,
                "required": ["at", "line"],
                "properties": {
                    "at": {"title": "Time", "description": "When.", "examples": [0.2], **_SECONDS},
                    "line": {
                        "title": "Text",
                        "description": "What, without its line feed.",
                        "type": "string",
                        "examples": ["login:"],
                    },
                },
            },
        },
        "dial": {
            "title": "Dial",
            "description": "When the guest dials the channel; null: never.",
            "default": 0.1,
            "examples": [0.1],
            **_MAYBE_SECONDS,
        },
        "exit": {
            "title": "Exit",
            "description": "When the machine ends by itself; null: never.",
            "default": None,
            "examples": [30],
            **_MAYBE_SECONDS,
        },
        "clean": {
            "title": "Clean exit",
            "description": "Whether that end is a power-off by the guest or a crash.",
            "type": "boolean",
            "default": True,
            "examples": [False],
        },
        "powerdown": {
            "title": "Power button",
            "description": "Seconds from the press of the button to power-off; null: the guest hangs.",
            "default": 0.1,
            "examples": [None],
            **_MAYBE_SECONDS,
        },
    },
}

_machines: dict[int, SimulatedMachine] = {}
_numbers = itertools.count(1)


def _read_environment(path: str) -> dict[str, str]:
    """The variables of an environment file: `NAME=value` lines, values quoted as a shell would.

    Read in one go: under virtual time a thread's work would take until the next deadline.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line and not line.startswith("#"))
    return {name.strip(): "".join(shlex.split(value)) for name, _, value in pairs}


class SimulatedMachine:
    """A scripted machine. Made by `SimulatedDriver.launch` only."""

    def __init__(self, data: JsonObject) -> None:
        defaults = {name: each["default"] for name, each in _SCRIPT["properties"].items()}
        self._script: JsonObject = {**defaults, **data["script"]}
        self._data = data
        self._started = trio.current_time()
        self._ready = trio.Event()
        self._button = trio.Event()
        self._gone = trio.Event()
        self._exit: Exit | None = None
        self._printed, self._console = trio.open_memory_channel[bytes](len(self._script["console"]))
        self.number = next(_numbers)

    @property
    def handle(self) -> JsonObject:
        return {"simulated": self.number}

    async def _at(self, seconds: float | None) -> None:
        if seconds is None:
            await trio.sleep_forever()
        else:
            await trio.sleep_until(self._started + seconds)

    def _end(self, ended: Exit) -> None:
        if self._exit is None:
            self._exit = ended
            self._printed.close()
            self._gone.set()

    async def power(self) -> None:
        """The machine's own life: set up, then perhaps an end of its own."""
        await self._at(self._script["ready"])
        self._ready.set()
        await self._at(self._script["exit"])
        clean = bool(self._script["clean"])
        self._end(Exit(clean, "the guest powered off" if clean else "the machine crashed", 0 if clean else 1))

    async def obey(self) -> None:
        """What the power button does."""
        await self._button.wait()
        if self._script["powerdown"] is None:
            return
        await trio.sleep(self._script["powerdown"])
        self._end(Exit(True, "the guest powered off", 0))

    async def print(self) -> None:
        """What the guest prints."""
        for line in self._script["console"]:
            await self._at(line["at"])
            try:
                self._printed.send_nowait(line["line"].encode() + b"\n")
            except trio.ClosedResourceError:
                return

    async def talk(self) -> None:
        """What the guest says on the channel. A dead machine's connection is closed with it."""
        await self._at(self._script["dial"])
        try:
            stream = await dial_local(self._data["channel"])
            async with stream, trio.open_nursery() as nursery:
                nursery.start_soon(self._converse, stream, nursery.cancel_scope)
                await self._gone.wait()
                nursery.cancel_scope.cancel()
        except OSError as error:
            self._end(Exit(False, f"the scripted guest could not dial: {error.strerror}", 1))

    async def _converse(self, stream: trio.abc.Stream, scope: trio.CancelScope) -> None:
        variables = _read_environment(self._data["environment"])
        hello = {
            "kind": "hello",
            "protocol": 1,
            "session": self._data["session"],
            "token": variables.get("HARNESS_VM_TOKEN", ""),
            "agent": "simulated",
            "build": variables.get("KENAZ_WORKBENCH_BUILD", ""),
            "capabilities": [],
        }
        try:
            await _send(stream, hello)
            async for message in _messages(stream):
                if message.get("kind") == "ping":
                    await _send(stream, {**message, "kind": "pong"})
                elif message.get("kind") == "drain":
                    await _send(stream, {"kind": "bye", "reason": "drained"})
        except (trio.BrokenResourceError, ValueError):
            pass  # the launcher hung up, or talks nonsense: either way the guest has nobody to talk to
        scope.cancel()

    async def ready(self) -> None:
        if self._script["refuse"]:
            raise DriverError(f"the scripted machine refuses: {self._script['refuse']}")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_first, self._ready, nursery.cancel_scope)
            nursery.start_soon(_first, self._gone, nursery.cancel_scope)
        if self._exit is not None:
            raise DriverError(self._exit.reason)

    async def wait(self) -> Exit:
        await self._gone.wait()
        assert self._exit is not None
        return self._exit

    async def powerdown(self) -> None:
        await trio.lowlevel.checkpoint()
        self._button.set()

    async def kill(self) -> None:
        await trio.lowlevel.cancel_shielded_checkpoint()
        self._end(Exit(False, "the power was cut"))

    def console(self) -> AsyncIterator[bytes]:
        return self._console

    async def port_closed(self) -> None:
        await trio.sleep_forever()  # it has no such port


async def _first(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


async def _send(stream: trio.abc.SendStream, message: JsonObject) -> None:
    body = json.dumps(message).encode()
    await stream.send_all(len(body).to_bytes(4, "big") + body)


async def _messages(stream: trio.abc.ReceiveStream) -> AsyncIterator[JsonObject]:
    """The messages that come: a length in four bytes, big end first, and that many bytes of JSON."""
    rest = bytearray()
    async for data in stream:
        rest += data
        while len(rest) >= 4 and len(rest) >= (end := 4 + int.from_bytes(rest[:4], "big")):
            message = json.loads(bytes(rest[4:end]))
            del rest[:end]
            yield message


class SimulatedDriver:
    """Runs scripts instead of machines."""

    name: ClassVar[str] = "simulated"
    options_schema: ClassVar[JsonObject] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Options of the driver simulated",
        "type": "object",
        "additionalProperties": False,
        "properties": {"script": _SCRIPT},
    }

    async def probe(self, arch: str, options: JsonObject) -> Capabilities:
        await trio.lowlevel.checkpoint()
        return Capabilities(
            usable=True,
            reasons=(Reason(True, "a script needs nothing of the host"),),
            arch=arch,
            transports=("unix",),
            disk_formats=("directory",),
            boots_image=False,
        )

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        config = next((disk.path for disk in request.disks if disk.role == "config"), "")
        if request.transport != "unix" or not config:
            raise DriverError("the driver simulated needs a UNIX channel and a config directory")
        return LaunchPlan(
            driver=self.name,
            argv=(),
            notes=("simulated: no machine is run",),
            data={
                "session": request.session,
                "channel": request.channel,
                "environment": str(Path(config, "kenaz.env")),
                "script": dict(request.options.get("script", {})),
            },
        )

    @asynccontextmanager
    async def launch(
        self, plan: LaunchPlan, descriptors: Mapping[str, int]
    ) -> AsyncIterator[SimulatedMachine]:
        machine = SimulatedMachine(plan.data)
        _machines[machine.number] = machine
        async with open_background() as background:
            for task in (machine.power, machine.obey, machine.print, machine.talk):
                background.start_soon(task)
            try:
                yield machine
            finally:
                await machine.kill()
                del _machines[machine.number]

    async def release(self, handle: JsonObject) -> None:
        if machine := _machines.get(handle.get("simulated", 0)):
            await machine.kill()
