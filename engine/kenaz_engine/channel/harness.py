"""The far side of the relay: a harness that listens on a UNIX socket, or the built-in one of the demo."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import trio

from kenaz_engine.channel import strict_json
from kenaz_engine.channel.connection import Connection
from kenaz_engine.channel.framing import LengthPrefixed
from kenaz_engine.channel.protocol import VERSION, Limits

LAST_WORD = 1.0
"""Seconds that writing `session.close` may take."""

QUIET = 1.0
"""Seconds without a message after which the demo harness ends the session."""


class HarnessError(Exception):
    """The harness cannot be reached. `hint` is what the user can do about it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class HarnessLink(Protocol):
    """A harness, for one session. It outlives the activities that use it: `run` is a task of the session."""

    async def run(self) -> None:
        """Writes what was sent. Returns when the harness takes no more; raises nothing for what it does."""
        ...

    def open(self, session: str, build: str, capabilities: Sequence[str]) -> None:
        """Tells the harness which session this is. The first call, and the only one of its kind."""
        ...

    async def send(self, payload: bytes) -> None:
        """Takes a payload, when there is room; drops it if the harness is gone. If cancelled, it took
        nothing."""
        ...

    async def receive(self) -> bytes | None:
        """The next payload; None when no more will come. If cancelled, none is lost.

        Raises FramingError when the harness sends no frames.
        """
        ...

    async def aclose(self, outcome: str) -> None:
        """Tells the harness how the session ended, and closes. Bounded, also where the harness reads
        nothing."""
        ...


class UnixHarness:
    """A harness that listens on a UNIX socket; the launcher dials it."""

    def __init__(self, stream: trio.abc.Stream, limits: Limits) -> None:
        self._connection = Connection(
            stream, LengthPrefixed(limits.frame), queue=limits.queue, write=limits.write
        )

    async def run(self) -> None:
        """Writes what was sent. Returns when the harness takes no more."""
        await self._connection.run()

    def open(self, session: str, build: str, capabilities: Sequence[str]) -> None:
        """Queues `session.open`."""
        self._connection.put(
            strict_json.dumps(
                {
                    "kind": "session.open",
                    "session": session,
                    "build": build,
                    "capabilities": list(capabilities),
                    "protocol": VERSION,
                }
            )
        )

    async def send(self, payload: bytes) -> None:
        """Takes a payload, when there is room; drops it if the harness is gone. If cancelled, it took
        nothing."""
        await self._connection.send(payload)

    async def receive(self) -> bytes | None:
        """The next payload; None when no more will come. If cancelled, none is lost. Raises FramingError."""
        return await self._connection.receive()

    async def aclose(self, outcome: str) -> None:
        """Writes `session.close` and closes; within LAST_WORD seconds."""
        self._connection.put(strict_json.dumps({"kind": "session.close", "outcome": outcome}))
        with trio.CancelScope(shield=True):
            with trio.move_on_after(LAST_WORD):
                await self._connection.flush()
            await self._connection.aclose()
        await trio.lowlevel.checkpoint()


async def connect_harness(address: str, limits: Limits) -> UnixHarness:
    """Dials the harness at `unix:PATH`. Raises HarnessError."""
    scheme, _, path = address.partition(":")
    if scheme != "unix" or not path:
        raise HarnessError(f"{address!r} is not the address of a harness", hint="write unix:PATH")
    try:
        stream = await trio.open_unix_socket(path)
    except FileNotFoundError:
        raise HarnessError(f"no harness listens at {path}", hint="start it before the session") from None
    except OSError as exc:
        raise HarnessError(
            f"the harness at {path} cannot be reached: {exc.strerror or exc}",
            hint="see that it listens there and that you may write to the socket",
        ) from None
    return UnixHarness(stream, limits)


class DemoHarness:
    """Answers a guest where there is no harness, and tells what it sees.

    It ends the session when it has answered the guest's second prompt, or when for QUIET seconds no message
    has come. `say` gets one line of printable text at a time.
    """

    PROMPTS = 2

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._answers: deque[bytes] = deque()
        self._news = trio.Event()
        self._prompts = 0

    async def run(self) -> None:
        """Nothing of it outlives a call."""
        await trio.lowlevel.checkpoint()

    def open(self, session: str, build: str, capabilities: Sequence[str]) -> None:
        """Says who is there."""
        can = f", capable of {', '.join(capabilities)}" if capabilities else ""
        self._say(_line(f"guest connected: build {build or 'unnamed'}{can}"))

    async def send(self, payload: bytes) -> None:
        """Answers at once; the answer waits for `receive`."""
        message = json.loads(payload)  # the protocol has looked at it
        answer = self._answer(message)
        if answer is not None:
            self._answers.append(strict_json.dumps(answer))
        self._news.set()

    async def receive(self) -> bytes | None:
        """The next answer; None after the last, or after QUIET seconds in which no message came."""
        while not self._answers:
            if self._prompts >= self.PROMPTS:
                return None
            self._news = trio.Event()
            with trio.move_on_after(QUIET) as scope:
                await self._news.wait()
            if scope.cancelled_caught:
                self._say("nothing more to do")
                return None
        return self._answers.popleft()

    async def aclose(self, outcome: str) -> None:
        """Nothing is held."""
        await trio.lowlevel.checkpoint()

    def _answer(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        match message["kind"]:
            case "tool.invoke":
                self._say(_line(f"guest invokes {message['tool']}"))
                return {"kind": "tool.result", "id": message["id"], "result": _canned(message["tool"])}
            case "prompt":
                self._prompts += 1
                self._say(_line(f"guest says: {message['text']}"))
                text = "Hello from the harness. All is well on this side."
                return {"kind": "prompt.result", "id": message["id"], "text": text}
            case "task.approval_requested":
                self._say("guest asks for an approval: denied")
                ids = {name: message.get(name) for name in ("task_id", "approval_id")}
                return {"kind": "task.approval_decision", **ids, "decision": "deny"}
            case "guest.lost":
                self._say("the guest's channel is lost")
                return None
            case "guest.back":
                self._say("the guest is back")
                return None
            case kind:
                self._say(_line(f"guest sends {kind}"))
                return None


def _canned(tool: str) -> Any:
    """A small result such as tools of that name give."""
    if tool.startswith("fs."):
        return {"text": "the contents of a file that does not exist\n"}
    if tool.startswith("web."):
        return {"hits": [{"title": "Kenaz", "url": "https://example.org/kenaz"}]}
    return {"ok": True}


def _line(text: str) -> str:
    """At most 200 characters that no terminal takes for commands: the guest wrote them."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:200])
