"""Joins guest and harness: what a session's activities use of the channel.

    guest ══ Connection ══ run ──▶ protocol ──▶ inward queue ──▶ serve or drain ══ HarnessLink
                            ▲                                        │
                            └───────────── queue ◀── protocol ◀──────┘

`run` reads the guest for as long as the channel lives. `serve` and `drain` move frames to and from the
harness while they are active; they may be cancelled at any await, since every frame is moved by one step
that does not wait: until then it is in one queue, from then on in the other. While neither is active the
inward queue fills, and `run` stops reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import trio

from kenaz_engine.channel import strict_json
from kenaz_engine.channel.connection import Connection, FrameQueue
from kenaz_engine.channel.dialect import KENAZ, Dialect, Talk
from kenaz_engine.channel.framing import FramingError, LengthPrefixed
from kenaz_engine.channel.harness import HarnessLink
from kenaz_engine.channel.protocol import (
    Action,
    Bye,
    Executed,
    Expected,
    HarnessEnded,
    Hello,
    Limits,
    NotExecuted,
    Opened,
    Output,
    Refused,
    Report,
    Restarted,
    Side,
    ToGuest,
    ToHarness,
    Violation,
)

__all__ = [
    "Bye",
    "ChannelEnd",
    "Executed",
    "Expected",
    "GuestChannel",
    "HandshakeError",
    "Hello",
    "Limits",
    "Lost",
    "NotExecuted",
    "ProtocolViolation",
    "Report",
    "ServeEnd",
    "Violated",
    "handshake",
    "refuse",
]

LAST_WORD = 1.0
"""Seconds that a last frame to the guest, or the last frames to the harness, may take."""


class HandshakeError(Exception):
    """The guest did not prove itself. `code` is one of rule H4, `timeout` or `lost`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class ProtocolViolation(Exception):
    """`side` broke a rule of the protocol; the text quotes nothing of what it sent."""

    def __init__(self, side: Side, code: str, message: str) -> None:
        super().__init__(f"the {side} broke the protocol ({code}): {message}")
        self.side = side
        self.code = code


@dataclass(frozen=True, slots=True)
class Lost:
    """The guest's stream ended without a bye."""

    reason: str


@dataclass(frozen=True, slots=True)
class Violated:
    """The guest broke the protocol and was cut off."""

    code: str
    message: str


ChannelEnd = Bye | Lost | Violated


@dataclass(frozen=True, slots=True)
class ServeEnd:
    """Who ended the serving. After `guest`, `GuestChannel.end` says how."""

    by: Literal["guest", "harness"]


def _no_report(report: Report) -> None:
    pass


def _nothing() -> None:
    pass


def _no_bye(bye: Bye) -> None:
    pass


def _no_output(stream: str, text: str) -> None:
    pass


async def handshake(
    stream: trio.abc.Stream | Connection,
    expected: Expected,
    *,
    dialect: Dialect = KENAZ,
    after: GuestChannel | None = None,
    on_message: Callable[[Report], None] = _no_report,
    on_bye: Callable[[Bye], None] = _no_bye,
    touch: Callable[[], None] = _nothing,
) -> GuestChannel:
    """Waits for the guest's hello and answers it; where the launcher dialled, says `auth` and waits for the
    answer. Owns the stream from now on, and closes it if this fails.

    A machine's stream is there long before its guest is, so the wait for the first byte is the caller's to
    bound; from then on `expected.limits.handshake` does. Raises HandshakeError; the guest has then been told
    why.

    `after` is the lost channel whose guest is expected back; its harness learns that it is. Where `detach` of
    that channel gives a connection, that stands in place of the stream.

    `on_message` gets a record of each message; `touch` is called for each message that is not a heartbeat;
    `on_bye` is called once, when what the guest said before has reached the harness, where one is being
    served. None of them may wait or raise.
    """
    limits = expected.limits
    if after is not None and not after.introduced:
        after = None  # the harness has heard of none, so it misses none
    if isinstance(stream, Connection):
        connection = stream
    else:
        connection = Connection(stream, dialect.framing(expected), queue=limits.queue, write=limits.write)
    protocol = dialect.talk(expected, after.void if after is not None else {})
    try:
        hello = await _greet(connection, protocol, limits.handshake, on_message)
    except BaseException:
        await connection.aclose()
        raise
    return GuestChannel(connection, protocol, expected, hello, on_message, on_bye, touch, after)


async def _greet(
    connection: Connection, protocol: Talk, seconds: float, on_message: Callable[[Report], None]
) -> Hello:
    payload: bytes | None = None
    _put(connection, protocol.begin(), on_message)
    await connection.flush()
    try:
        alive = connection.has_received or await connection.fill()
        with trio.move_on_after(seconds) as scope:
            payload = await connection.receive() if alive else None
            while payload == b"":
                protocol.from_guest(payload)
                payload = await connection.receive()
        if scope.cancelled_caught:
            raise HandshakeError(
                "timeout", f"the guest began a hello and did not end it within {seconds:g} s"
            )
    except FramingError as exc:
        if exc.code == "frame_cut":
            raise HandshakeError("lost", str(exc)) from None
        actions = protocol.fault(exc.code, str(exc))
    else:
        if payload is None:
            raise HandshakeError(
                "lost", connection.failure or "the guest closed the channel before its hello"
            )
        actions = protocol.from_guest(payload)
    _put(connection, actions, on_message)
    hello = next((action.hello for action in actions if isinstance(action, Opened)), None)
    refused = next((a for a in actions if isinstance(a, Refused)), Refused("bad_hello", ""))
    with trio.move_on_after(LAST_WORD if hello is None else seconds):
        await connection.flush()
    if hello is None:
        raise HandshakeError(refused.code, refused.message)
    if connection.failure:
        raise HandshakeError("lost", f"the guest did not take its welcome: {connection.failure}")
    return hello


def _put(connection: Connection, actions: Iterable[Action], on_message: Callable[[Report], None]) -> None:
    for action in actions:
        match action:
            case ToGuest(payload):
                connection.put(payload)
            case Report():
                on_message(action)


async def refuse(stream: trio.abc.Stream) -> None:
    """Turns away whoever dials while the session has its guest: `refused already_connected`. Closes the
    stream."""
    answer = {"kind": "refused", "code": "already_connected", "message": "this session has its guest"}
    connection = Connection(stream, LengthPrefixed(), queue=1, write=LAST_WORD)
    connection.put(strict_json.dumps(answer))
    try:
        await connection.flush()
    finally:
        await connection.aclose()


class GuestChannel:
    """A guest that has proved itself, from its handshake to the end of its stream. Made by `handshake`.

    `run` is a task of the session and has to run for anything else to move. One of `serve` and `drain` may be
    active at a time.
    """

    def __init__(
        self,
        connection: Connection,
        protocol: Talk,
        expected: Expected,
        hello: Hello,
        on_message: Callable[[Report], None],
        on_bye: Callable[[Bye], None],
        touch: Callable[[], None],
        after: GuestChannel | None,
    ) -> None:
        self.hello = hello
        self._connection = connection
        self._protocol = protocol
        self._session = expected.session
        self._inward = FrameQueue(expected.limits.queue)
        self._on_message = on_message
        self._on_bye = on_bye
        self._touch = touch
        self._harness: HarnessLink | None = None
        # Whether the harness has been told of this session, by this channel or by one before it.
        self._introduced = False
        if after is not None:
            # What it has not yet taken of the guest that was lost comes first.
            self._introduced, self._inward = True, after._inward
            self._inward.put(_back(hello))
        self._harness_ended = False
        self._on_output: Callable[[str, str], None] = _no_output
        self._command_end: Executed | NotExecuted | None = None
        self._command_ended = trio.Event()
        self._active = False
        self._restarted = False
        self._end: ChannelEnd | None = None
        self._over = trio.Event()
        self._reading = trio.CancelScope()

    @property
    def end(self) -> ChannelEnd | None:
        """How the conversation ended; None while it goes on. Known before the stream itself ends."""
        return self._end

    @property
    def introduced(self) -> bool:
        """True when a harness has been told of this session."""
        return self._introduced

    @property
    def void(self) -> Mapping[str, str]:
        """Requests of this guest that its harness may still answer; for the channel that follows."""
        return self._protocol.void

    def detach(self) -> Connection | None:
        """The stream of a guest whose agent has begun anew on it, from `run`'s end on; the caller owns it
        now. None for every other guest, also where it is asked again."""
        if not self._restarted:
            return None
        self._restarted = False
        return self._connection.successor()

    async def run(self) -> ChannelEnd:
        """Reads until the guest's stream ends. Raises nothing for what the guest does."""
        try:
            with self._reading:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._connection.run)
                    await self._read()
                    nursery.cancel_scope.cancel()
        finally:
            self._end = self._end or Lost("the launcher closed the channel")
            self._over.set()
        return self._end

    async def serve(self, harness: HarnessLink) -> ServeEnd:
        """Relays both ways until the harness ends the session or the guest is gone.

        That the guest is gone says nothing of how the session fares: whoever runs `run` hears that from it.
        May be cancelled at any await: no frame is lost or doubled, and another `serve` with the same harness
        or a `drain` may follow. Raises ProtocolViolation for either side.
        """
        if self._harness is None:
            self._harness = harness
            if not self._introduced:
                harness.open(self._session, self.hello.build, self.hello.capabilities)
                self._introduced = True
        await self._relay(until_harness_ends=True)
        return ServeEnd("harness" if self._end is None else "guest")

    async def execute(
        self, argv: Sequence[str], on_output: Callable[[str, str], None]
    ) -> Executed | NotExecuted | None:
        """Has the guest run a command, and returns how it ended; None where the guest is gone.

        No harness takes part: what the guest asks of one is answered `unavailable`. `on_output` gets the name
        of the stream and the text; it may not wait or raise. If cancelled, the guest is asked to end the
        command. Raises ProtocolViolation.
        """
        self._harness_is_gone()
        self._on_output = on_output
        self._command_end, self._command_ended = None, trio.Event()
        self._apply(self._protocol.execute(argv))
        try:
            await self._relay(until_harness_ends=False, until=self._command_ended)
        finally:
            self._apply(self._protocol.cancel_command())
        return self._command_end

    async def drain(self, seconds: float) -> Bye | Lost:
        """Asks the guest to finish within `seconds`, relays what is still open, and returns how it left.

        The time is a message to the guest: what happens when it passes is the caller's to decide. May be
        cancelled as `serve` may. Raises ProtocolViolation for either side.
        """
        ending = self._apply(self._protocol.drain(seconds))
        if isinstance(ending, Bye):
            # Nothing was open, and this guest takes no leave: the harness gets what it has said.
            with trio.move_on_after(LAST_WORD):
                while self._harness is not None and self._inward.bytes_waiting:
                    await self._harness.send(self._inward.head())
                    self._inward.drop()
            return ending
        if self._harness is None:
            self._harness_is_gone()
        await self._relay(until_harness_ends=False)
        assert isinstance(self._end, Bye | Lost)
        return self._end

    async def aclose(self) -> None:
        """Takes leave, if the guest is still there, closes the stream, and so ends `run`; within LAST_WORD
        seconds."""
        with trio.CancelScope(shield=True):
            self._apply(self._protocol.bye("closed"))
            with trio.move_on_after(LAST_WORD):
                await self._connection.flush()
            await self._connection.aclose()
        self._reading.cancel()
        await trio.lowlevel.checkpoint()

    # The guest's side: `run`

    async def _read(self) -> None:
        end: ChannelEnd | None = None
        while end is None:
            await self._inward.room()
            await self._connection.room()
            actions, end = await self._next()
            match self._apply(actions):
                case Bye() as bye:
                    end = bye
                case Restarted(payload):
                    self._connection.give_back(payload)
                    self._restarted = True
                    end = Lost("the guest's agent started again")
                case Violation(_, code, message):
                    end = Violated(code, message)
        if isinstance(end, Violated):
            with trio.move_on_after(LAST_WORD):
                await self._connection.flush()
            await self._connection.aclose()
        if self._active:
            # Whoever serves shall have all that the guest said before it hears of the end.
            with trio.move_on_after(LAST_WORD):
                await self._inward.empty()
        self._end = end
        self._over.set()
        if isinstance(end, Bye):
            self._on_bye(end)
            await self._connection.discard()

    async def _next(self) -> tuple[list[Action], Lost | None]:
        """What follows from the next frame of the guest, or from the end of its stream."""
        try:
            payload = await self._connection.receive()
        except FramingError as exc:
            if exc.code != "frame_cut":
                return self._protocol.fault(exc.code, str(exc)), None
            return self._protocol.lost(), Lost(str(exc))
        if payload is None:
            reason = self._connection.failure or "the guest closed the channel without a bye"
            return self._protocol.lost(), Lost(reason)
        return self._protocol.from_guest(payload), None

    # The harness's side: `serve` and `drain`

    async def _relay(self, *, until_harness_ends: bool, until: trio.Event | None = None) -> None:
        if self._active:
            raise trio.BusyResourceError("another task serves or drains this channel")
        violation: ProtocolViolation | None = None

        async def from_harness() -> None:
            nonlocal violation
            violation = await self._from_harness()
            if violation is not None or until_harness_ends:
                nursery.cancel_scope.cancel()

        async def wait(event: trio.Event) -> None:
            await event.wait()
            nursery.cancel_scope.cancel()

        self._active = True
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._to_harness)
                nursery.start_soon(from_harness)
                if until is not None:
                    nursery.start_soon(wait, until)
                await self._over.wait()
                nursery.cancel_scope.cancel()
        finally:
            self._active = False
        if violation is not None:
            raise violation
        if isinstance(self._end, Violated):
            raise ProtocolViolation("guest", self._end.code, self._end.message)

    async def _to_harness(self) -> None:
        while True:
            await self._inward.some()
            if self._harness is not None:
                await self._harness.send(self._inward.head())
            self._inward.drop()

    async def _from_harness(self) -> ProtocolViolation | None:
        """Returns when the harness has ended; its violation, if that was the end."""
        ending: Violation | None = None
        while not self._harness_ended:
            assert self._harness is not None
            await self._connection.room()
            await self._inward.room()
            actions: list[Action] = []
            try:
                payload = await self._harness.receive()
            except FramingError as exc:
                payload = None
                if exc.code != "frame_cut":
                    actions = self._protocol.fault(exc.code, str(exc), side="harness")
            if payload is not None:
                actions = self._protocol.from_harness(payload)
            last = self._apply(actions)
            if isinstance(last, Violation):
                ending = last
            if payload is None or last is not None:
                self._harness_is_gone()
        if ending is None:
            return None
        with trio.move_on_after(LAST_WORD):
            await self._inward.empty()
        return ProtocolViolation(ending.side, ending.code, ending.message)

    def _harness_is_gone(self) -> None:
        self._harness_ended = True
        self._apply(self._protocol.harness_gone())

    # Both sides

    def _apply(self, actions: Iterable[Action]) -> Bye | Restarted | HarnessEnded | Violation | None:
        """Carries out what the protocol decided, without waiting; returns the action that ends something."""
        ending: Bye | Restarted | HarnessEnded | Violation | None = None
        for action in actions:
            match action:
                case ToGuest(payload):
                    self._connection.put(payload)
                case ToHarness(payload):
                    self._inward.put(payload)
                case Report(direction, kind):
                    self._on_message(action)
                    if direction.startswith("from-") and kind not in ("ping", "pong"):
                        self._touch()
                case Output(stream, text):
                    self._on_output(stream, text)
                case Executed() | NotExecuted():
                    self._command_end = action
                    self._command_ended.set()
                case Bye() | Restarted() | HarnessEnded() | Violation():
                    ending = action
        return ending


def _back(hello: Hello) -> bytes:
    message = {"kind": "guest.back", "build": hello.build, "capabilities": list(hello.capabilities)}
    return strict_json.dumps(message)
