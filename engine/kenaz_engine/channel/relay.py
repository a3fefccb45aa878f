"""Joins guest and harness: what a session's activities use of the channel.

    guest ══ Connection ══ run ──▶ protocol ──▶ inward queue ──▶ serve or drain ══ HarnessLink
                            ▲                                        │
                            └───────────── queue ◀── protocol ◀──────┘

`run` reads the guest for as long as the channel lives. `serve` and `drain` move frames to and from the
harness while they are active; they may be cancelled at any await, since every frame is moved by one step
that does not wait: until then it is in one queue, from then on in the other. While neither is active the
inward queue fills, and `run` stops reading.

A peer that acknowledges is read also where there is no room: what it acknowledges may be what makes room.
What it says meanwhile is held, and not acknowledged, so that its window bounds what is held [Z5].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import trio

from kenaz_engine.channel import strict_json
from kenaz_engine.channel.connection import Connection, FrameQueue
from kenaz_engine.channel.dialect import KENAZ, Dialect, Talk
from kenaz_engine.channel.framing import FramingError, LengthPrefixed
from kenaz_engine.channel.harness import HarnessError, HarnessLink
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
    State,
    ToGuest,
    ToHarness,
    Violation,
)
from kenaz_engine.channel.resume import Kept

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

SLACK = 4096
"""Bytes that a peer may say beyond its window: acks, and what both count a little differently."""

_HEARD = ("from-guest", "from-harness")
_HEARTBEAT = ("ping", "pong")

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
    if isinstance(stream, Connection):
        connection = stream
    else:
        connection = Connection(stream, dialect.framing(expected), queue=limits.queue, write=limits.write)
    void = after.void if after is not None and after.introduced else {}
    protocol = dialect.talk(expected, void, after.kept if after is not None else None)
    try:
        opened = await _greet(connection, protocol, limits.handshake, on_message)
    except BaseException:
        await connection.aclose()
        raise
    if opened.resumed is None:
        if protocol.resumable:
            connection.number()
        resumed = False
    else:
        assert after is not None
        protocol = after.resume(connection, opened.resumed)
        resumed = True
    return GuestChannel(
        connection, protocol, expected, opened.hello, on_message, on_bye, touch, after, resumed=resumed
    )


async def _greet(
    connection: Connection, protocol: Talk, seconds: float, on_message: Callable[[Report], None]
) -> Opened:
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
    opened = next((action for action in actions if isinstance(action, Opened)), None)
    refused = next((a for a in actions if isinstance(a, Refused)), Refused("bad_hello", ""))
    with trio.move_on_after(LAST_WORD if opened is None else seconds):
        await connection.flush()
    if opened is None:
        raise HandshakeError(refused.code, refused.message)
    if connection.failure:
        raise HandshakeError("lost", f"the guest did not take its welcome: {connection.failure}")
    return opened


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
        # A socket that is closed with a hello unread is reset, and what was written is lost with it.
        with trio.move_on_after(LAST_WORD), suppress(FramingError):
            await connection.fill()
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
        *,
        resumed: bool = False,
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
        if after is not None and resumed:
            self._introduced, self._inward = after._introduced, after._inward
        elif after is not None and after.introduced:
            # What it has not yet taken of the guest that was lost comes first. A harness that has heard of
            # none misses none.
            after.give_up()
            self._introduced, self._inward = True, after._inward
            self._inward.put(_back(hello))
        # What came while there was no room for it. Empty at nearly all times.
        self._held: Mapping[Side, FrameQueue] = {
            "guest": FrameQueue(expected.limits.queue + expected.limits.frame + SLACK),
            "harness": FrameQueue(expected.limits.queue + expected.limits.frame + SLACK)
            if after is None
            else after._held["harness"],
        }
        self._harness_ended = False
        self._on_output: Callable[[str, str], None] = _no_output
        self._command_end: Executed | NotExecuted | None = None
        self._command_ended = trio.Event()
        self._active = False
        self._restarted = False
        self._ending: ChannelEnd | None = None
        self._harness_breach: Violation | None = None
        self._listening: dict[Side, trio.CancelScope] = {"guest": trio.CancelScope()}
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

    @property
    def kept(self) -> Kept | None:
        """What a guest that is away may go on with; None where it may not."""
        inbox, outbox = self._connection.inbox, self._connection.outbox
        if inbox is None or self._protocol.state is not State.AWAY:
            return None
        return Kept(self._protocol.conversation, inbox.received, outbox.lowest, outbox.highest)

    def resume(self, connection: Connection, received: int) -> Talk:
        """The guest that was away has taken so many messages, and goes on over that connection. The
        conversation moves to the channel that follows."""
        outbox = self._connection.outbox
        outbox.rewind(received)
        connection.number(outbox, self._connection.inbox)
        self._protocol.resumed()
        return self._protocol

    def give_up(self) -> None:
        """The guest that is away, if it is, does not come back: what the harness waits for is answered."""
        self._apply(self._protocol.give_up())

    async def leave(self, harness: HarnessLink) -> None:
        """As `give_up`, where no other channel follows and nobody serves; within LAST_WORD seconds."""
        if self._protocol.state is State.AWAY:
            self.give_up()
            with trio.move_on_after(LAST_WORD):
                while self._inward:
                    await harness.send(self._inward.head())
                    self._inward.drop()

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
                    nursery.start_soon(self._watch)
                    nursery.start_soon(self._work_off, "guest")
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
        self._act(self._protocol.execute(argv))
        try:
            await self._relay(until_harness_ends=False, until=self._command_ended)
        finally:
            self._act(self._protocol.cancel_command())
        return self._command_end

    async def drain(self, seconds: float) -> Bye | Lost:
        """Asks the guest to finish within `seconds`, relays what is still open, and returns how it left.

        The time is a message to the guest: what happens when it passes is the caller's to decide. May be
        cancelled as `serve` may. Raises ProtocolViolation for either side.
        """
        ending = self._apply(self._protocol.drain(seconds))
        self._push()
        if isinstance(ending, Bye):
            # Nothing was open, and this guest takes no leave: the harness gets what it has said.
            with trio.move_on_after(LAST_WORD):
                while self._harness is not None and self._inward:
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
        with self._listening["guest"]:
            while self._ending is None:
                await self._hear_guest()
        end = self._ending
        assert end is not None
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

    async def _hear_guest(self) -> None:
        """The next frame of the guest, or the end of its stream."""
        connection, numbered = self._connection, self._protocol.resumable
        if not (numbered or self._has_room):
            await self._room("guest")
        take = self._take if numbered else self._decide
        try:
            payload = await connection.receive()
            while payload is not None:
                take("guest", payload)
                if self._ending is not None:
                    return  # what comes next is for whoever follows
                payload = connection.receive_nowait() if numbered or self._has_room else None
                if payload is None:
                    return
            reason = self._connection.failure or "the guest closed the channel without a bye"
        except FramingError as exc:
            if exc.code != "frame_cut":
                await self._held["guest"].empty()
                self._settle("guest", self._protocol.fault(exc.code, str(exc)))
                return
            reason = str(exc)
        finally:
            self._push()
        if self._protocol.resumable:
            connection.fail(reason)  # nobody acknowledges any more: what is held needs no room for answers
        await self._held["guest"].empty()
        if self._ending is None:
            self._apply(self._protocol.lost())
            self._push()
            self._ending = Lost(reason)

    async def _watch(self) -> None:
        """Ends what takes too long."""
        while True:
            await trio.sleep_until(self._protocol.next_deadline(trio.current_time()))
            self._act(self._protocol.expire(trio.current_time()))

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
        self._listening["harness"] = trio.CancelScope()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._to_harness)
                nursery.start_soon(self._work_off, "harness")
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
        """Returns when the harness has ended; its violation, if that was the end. Raises HarnessError where
        it went away and did not come back."""
        with self._listening["harness"]:
            while not self._harness_ended:
                await self._hear_harness()
        if self._harness_breach is None:
            return None
        with trio.move_on_after(LAST_WORD):
            await self._inward.empty()
        breach = self._harness_breach
        return ProtocolViolation(breach.side, breach.code, breach.message)

    async def _hear_harness(self) -> None:
        """The next frame of the harness, or its end."""
        assert self._harness is not None
        if not self._harness.resumable:
            await self._room("harness")
        try:
            payload = await self._harness.receive()
        except FramingError as exc:
            await self._held["harness"].empty()
            if exc.code != "frame_cut":
                self._settle("harness", self._protocol.fault(exc.code, str(exc), side="harness"))
                self._push()
            self._harness_is_gone()
            return
        except HarnessError:
            self._harness_is_gone()
            raise
        if payload:
            self._take("harness", payload)
            self._push()
        elif payload is not None:
            # Room for what it said may come only with its return, so there has to be room without.
            held = self._held["harness"]
            while held:
                await self._connection.room()
                self._work_off_one("harness")
        else:
            await self._held["harness"].empty()
            self._harness_is_gone()

    def _harness_is_gone(self) -> None:
        self._harness_ended = True
        self._act(self._protocol.harness_gone())

    # Both sides

    def _put_inward(self, payload: bytes) -> None:
        harness = self._harness
        if self._active and harness is not None and not self._inward and harness.has_room:
            harness.put(payload)
        else:
            self._inward.put(payload)

    def _act(self, actions: Iterable[Action]) -> None:
        self._apply(actions)
        self._push()

    def _push(self) -> None:
        self._connection.push()
        if self._harness is not None:
            self._harness.push()

    def _take(self, side: Side, payload: bytes) -> None:
        """A frame has come: it is looked at, or held where there is no room and its sender may go on."""
        held = self._held[side]
        if not held and (self._has_room or not self._acknowledges(side)):
            self._decide(side, payload)
            return
        held.put(payload)
        if not held.has_room:
            held.clear()
            self._settle(side, self._protocol.fault("window", "more than its window", side=side))

    def _acknowledges(self, side: Side) -> bool:
        if side == "guest":
            return self._protocol.resumable
        return self._harness is not None and self._harness.resumable

    async def _work_off(self, side: Side) -> None:
        """What is held, as there is room."""
        held = self._held[side]
        while True:
            await held.some()
            await self._room(side)
            self._work_off_one(side)

    def _work_off_one(self, side: Side) -> None:
        held = self._held[side]
        if held:
            payload = held.drop()
            self._decide(side, payload)
            self._push()

    @property
    def _has_room(self) -> bool:
        return self._inward.has_room and self._connection.has_room

    async def _room(self, side: Side) -> None:
        """A frame of that side may become one for either. One of a guest that is gone is answered to
        nobody."""
        await self._inward.room()
        await self._connection.room(or_failure=side == "guest")

    def _decide(self, side: Side, payload: bytes) -> None:
        now = trio.current_time()
        if side == "guest":
            if not self._settle(side, self._protocol.from_guest(payload, now)):
                self._connection.took(len(payload))
        else:
            assert self._harness is not None
            self._settle(side, self._protocol.from_harness(payload, now))
            self._harness.took(len(payload))

    def _settle(self, side: Side, actions: list[Action]) -> bool:
        """Carries out what follows from a frame, and what ends with it. True when the guest's agent has begun
        anew."""
        ending = self._apply(actions)
        if ending is None:
            return False
        match ending:
            case Bye() as bye:
                self._ending = bye
            case Restarted(payload):
                self._connection.give_back(payload)
                self._restarted = True
                self._ending = Lost("the guest's agent started again")
            case Violation("guest", code, message):
                self._ending = Violated(code, message)
            case Violation() as breach:
                self._harness_breach = breach
                self._harness_is_gone()
            case HarnessEnded():
                self._harness_is_gone()
        self._held[side].clear()
        self._listening[side].cancel()
        return self._restarted

    def _apply(self, actions: Iterable[Action]) -> Bye | Restarted | HarnessEnded | Violation | None:
        """Carries out what the protocol decided, without waiting; returns the action that ends something."""
        ending: Bye | Restarted | HarnessEnded | Violation | None = None
        for action in actions:  # the first three are nearly all there are, and on every frame's way
            if isinstance(action, Report):
                self._on_message(action)
                if action.direction in _HEARD and action.kind not in _HEARTBEAT:
                    self._touch()
                continue
            if isinstance(action, ToHarness):
                self._put_inward(action.payload)
                continue
            if isinstance(action, ToGuest):
                self._connection.put(action.payload)
                continue
            match action:
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
