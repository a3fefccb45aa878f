"""QMP, the monitor protocol of QEMU: one JSON object per line, replies by id, events in between.

`QmpCodec` knows the bytes and does no IO; `QmpClient` runs it over a trio stream. Facts:
https://www.qemu.org/docs/master/interop/qmp-spec.html, and QEMU 7.2 as observed: `quit` sends its SHUTDOWN
event before its own reply, then the stream ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import trio

MAX_LINE = 1 << 20
"""Longest line accepted, in bytes. The longest reply to a command that we send has a few hundred."""


class QmpError(Exception):
    """The monitor broke, ended or did not answer in time; nothing more can be had from it."""


class QmpRefused(QmpError):
    """QEMU answered a command with an error. The monitor itself is well."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """The first message; `version` is `major.minor.micro`."""

    version: str


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to the command of that number: its value, or the text of its error."""

    number: int
    value: Any = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in QEMU."""

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)


Message = Greeting | Reply | Event


class QmpCodec:
    """Bytes to messages and commands to bytes."""

    def __init__(self) -> None:
        self._rest = b""
        self._commands = 0

    def command(self, name: str, arguments: Mapping[str, Any]) -> tuple[int, bytes]:
        """The number under which the reply will come, and the bytes to send."""
        self._commands += 1
        message: dict[str, Any] = {"execute": name, "id": self._commands}
        if arguments:
            message["arguments"] = dict(arguments)
        return self._commands, json.dumps(message).encode() + b"\n"

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes. Raises QmpError for what is no QMP."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE or any(len(line) > MAX_LINE for line in lines):
            raise QmpError(f"QEMU's monitor sent a line of more than {MAX_LINE} bytes")
        return [_message(line) for line in lines if line.strip()]


def _message(line: bytes) -> Message:
    try:
        found = json.loads(line)
        if "event" in found:
            return Event(str(found["event"]), dict(found.get("data", {})))
        if "return" in found:
            return Reply(int(found["id"]), value=found["return"])
        if "error" in found:
            return Reply(int(found["id"]), error=str(found["error"]["desc"]) or "no reason given")
        version = found["QMP"]["version"]["qemu"]
        return Greeting(f"{version['major']}.{version['minor']}.{version['micro']}")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise QmpError(f"QEMU's monitor sent what is no QMP: {line[:80]!r}") from error


class _Pending:
    """A command that waits for its reply."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.reply: Reply | None = None


class QmpClient:
    """One monitor. `run` must be running for anything to be answered; `on_event` must not block or raise."""

    def __init__(self, stream: trio.abc.Stream, on_event: Callable[[Event], None]) -> None:
        self._stream = stream
        self._on_event = on_event
        self._codec = QmpCodec()
        self._pending: dict[int, _Pending] = {}
        self._broken = ""
        self._greeted = trio.Event()
        self._negotiating = trio.Lock()
        self._negotiated = False
        self._sending = trio.Lock()
        self.ended = trio.Event()
        """Set when no event can come any more."""

    async def run(self) -> None:
        """Reads until QEMU closes the monitor. Never raises: what went wrong is what commands then raise."""
        try:
            async for data in self._stream:
                for message in self._codec.feed(bytes(data)):
                    self._receive(message)
            self._fail("QEMU closed its monitor")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._fail("QEMU closed its monitor")
        except QmpError as error:
            self._fail(str(error))
        finally:
            self._fail("QEMU's monitor is no longer read")
            self.ended.set()

    def _receive(self, message: Message) -> None:
        match message:
            case Event():
                self._on_event(message)
            case Greeting():
                self._greeted.set()
            case Reply() if pending := self._pending.pop(message.number, None):
                pending.reply = message
                pending.done.set()
            case Reply():  # of a command that was given up
                pass

    def _fail(self, reason: str) -> None:
        self._broken = self._broken or reason
        self._greeted.set()
        for pending in self._pending.values():
            pending.done.set()
        self._pending.clear()

    async def negotiate(self) -> None:
        """Waits for the greeting and leaves negotiation mode; does nothing the second time.

        Raises QmpError. Has no deadline of its own.
        """
        async with self._negotiating:
            if not self._negotiated:
                await self._greeted.wait()
                await self._command("qmp_capabilities", {})
                self._negotiated = True

    async def execute(self, name: str, **arguments: Any) -> Any:
        """Runs one command and returns its value, negotiating first when that was not done yet.

        Raises QmpRefused when QEMU says no, QmpError when it cannot answer. Has no deadline of its own; a
        command that is cancelled may have been carried out.
        """
        await self.negotiate()
        return await self._command(name, arguments)

    async def _command(self, name: str, arguments: Mapping[str, Any]) -> Any:
        pending = _Pending()
        number, data = self._codec.command(name, arguments)
        if self._broken:
            raise QmpError(self._broken)
        self._pending[number] = pending
        try:
            await self._send(data)
            await pending.done.wait()
        finally:
            self._pending.pop(number, None)
        if pending.reply is None:
            raise QmpError(self._broken)
        if pending.reply.error:
            raise QmpRefused(f"{name}: {pending.reply.error}")
        return pending.reply.value

    async def _send(self, data: bytes) -> None:
        async with self._sending:
            # Half a command would spoil all that follow, so cancellation has to wait a moment.
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1) as scope:
                try:
                    await self._stream.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    self._fail("QEMU closed its monitor")
            if scope.cancelled_caught:
                self._fail("QEMU does not read its monitor")
