"""The control socket of a session: how another terminal asks it to end.

One request and one reply a connection, each a line of JSON: `{"command": "end"}`, `{"command": "abort"}` or
`{"command": "screenshot", "path": ...}`, answered by `{"ok": true}` or `{"ok": false, "error": ...}`. Only
the session's own user (or root) is heard.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from kenaz_drivers.contract import DriverError
from kenaz_drivers.host import dial_local
from kenaz_engine.channel.transports import TransportError
from kenaz_engine.channel.transports.local import LocalListener

COMMANDS = ("end", "abort", "screenshot")

Photograph = Callable[[str], Awaitable[None]]
"""Writes what the guest's screen shows to a path. Raises DriverError."""

_REQUEST_BYTES = 4096
_PATIENCE = 5.0
_PAUSE = 1.0


class ControlError(Exception):
    """A session could not be asked."""


async def serve_control(
    listener: LocalListener, request: Callable[[str], None], photograph: Photograph
) -> None:
    """Answers until the listener is closed; `request` is called with each command to end that was asked for,
    `photograph` for a picture."""
    async with trio.open_nursery() as nursery:
        with suppress(trio.ClosedResourceError):
            while True:
                try:
                    accepted = await listener.accept()
                except TransportError:  # out of descriptors, perhaps not for long
                    await trio.sleep(_PAUSE)
                else:
                    nursery.start_soon(_answer, accepted.stream, request, photograph)


async def _answer(stream: trio.abc.Stream, request: Callable[[str], None], photograph: Photograph) -> None:
    with trio.move_on_after(_PATIENCE):
        async with stream:
            try:
                reply = await _reply(await _read_line(stream), request, photograph)
                await stream.send_all(json.dumps(reply).encode() + b"\n")
            except trio.BrokenResourceError:
                return


async def ask(path: Path, command: str, /, **arguments: str) -> None:
    """Asks the session whose control socket is at `path`. Raises ControlError."""
    reply: dict[str, Any] = {}
    with trio.move_on_after(_PATIENCE) as scope:
        try:
            async with await dial_local(path) as stream:
                await stream.send_all(json.dumps({"command": command, **arguments}).encode() + b"\n")
                reply = json.loads(await _read_line(stream) or b"{}")
        except (OSError, ValueError, trio.BrokenResourceError) as exc:
            raise ControlError(f"its control socket does not answer: {exc}") from exc
    if scope.cancelled_caught:
        raise ControlError(f"its control socket did not answer within {_PATIENCE:g} s")
    if not reply.get("ok"):
        raise ControlError(str(reply.get("error", "it closed the connection without an answer")))


async def _read_line(stream: trio.abc.Stream) -> bytes:
    data = b""
    while b"\n" not in data and len(data) < _REQUEST_BYTES:
        chunk = await stream.receive_some(_REQUEST_BYTES)
        if not chunk:
            break
        data += chunk
    return data.split(b"\n", 1)[0]


async def _reply(line: bytes, request: Callable[[str], None], photograph: Photograph) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    command = message.get("command") if isinstance(message, dict) else None
    if command not in COMMANDS:
        return {"ok": False, "error": f"unknown command; known are {', '.join(COMMANDS)}"}
    if command == "screenshot":
        try:
            await photograph(str(message.get("path", "")))
        except DriverError as exc:
            return {"ok": False, "error": f"{exc} ({exc.hint})" if exc.hint else str(exc)}
    else:
        request(command)
    return {"ok": True}
