"""The channel's side of a session: the activities that talk, and the tasks that own channel and harness.

Imported when the machine boots already: nothing of this is needed before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import trio

from kenaz_engine.channel.connection import Connection
from kenaz_engine.channel.dialect import Dialect, dialect_of
from kenaz_engine.channel.harness import HarnessError, HarnessLink
from kenaz_engine.channel.harness_vm import APPROVAL
from kenaz_engine.channel.policy import ToolPolicy
from kenaz_engine.channel.protocol import Limits
from kenaz_engine.channel.relay import (
    Bye,
    Expected,
    GuestChannel,
    HandshakeError,
    Lost,
    NotExecuted,
    ProtocolViolation,
    Report,
    Violated,
    handshake,
    refuse,
)
from kenaz_engine.channel.transports import Listener, TransportError
from kenaz_engine.channel.transports.virtio_serial import SerialPort
from kenaz_engine.lifecycle.machine import Event
from kenaz_engine.session.ledger import Made
from kenaz_engine.session.lifecycles import executes, reaccepts
from kenaz_engine.session.prepared import Prepared
from kenaz_engine.session.recorder import Recorder
from kenaz_engine.session.runner import ActivityError, Work
from kenaz_engine.session.seams import EXIT_GRACE, Connect, Show, unless_exiting
from kenaz_engine.spec.resolve import ResolvedSession

CAPABILITIES = frozenset({"tools", "prompts"})
"""What a guest may be granted, where a harness takes part."""

RETURNING = frozenset({"resume"})
"""What it is granted besides, where the lifecycle waits for a guest that is lost."""

COMMANDS = frozenset({"exec"})
"""What it is granted in sessions that run one command."""

PATIENCE, MORE_PATIENCE = 0.5, 1.2
"""Seconds for the first attempt to be answered where the launcher dials, and by how much each next one has
more, up to the handshake's limit. QEMU accepts while its guest still boots, and tells the guest of it once in
6 s: an attempt that was too early is better given up soon, and yet a slow guest must be able to answer."""

REDIAL = 0.1
"""Seconds between two attempts."""

ENVELOPE = 256
"""Bytes of a frame that its command cannot have."""


def channel_limits(resolved: ResolvedSession) -> Limits:
    """What both ends of the channel may take."""
    limits = resolved.channel.limits
    return Limits(
        frame=limits.frame,
        depth=limits.depth,
        invocations=limits.invocations,
        handshake=limits.handshake,
        tool=resolved.tools.timeout,
        grace=resolved.channel.grace,
    )


@contextmanager
def explaining() -> Iterator[None]:
    """What the channel raises, as what the session reports: one line, and what to do."""
    try:
        yield
    except HarnessError as exc:
        raise ActivityError(str(exc), hint=exc.hint) from exc
    except (HandshakeError, ProtocolViolation) as exc:
        raise ActivityError(str(exc), code=exc.code) from exc


class Conversation:
    """One session's talk with its guest, over one channel after the other, and with its harness.

    `machine_exited` is set by whoever owns the machine; `failed` says whether the session has failed so far.
    """

    def __init__(
        self,
        prepared: Prepared,
        token: str,
        listener: Listener,
        machine_exited: trio.Event,
        recorder: Recorder,
        connect: Connect,
        failed: Callable[[], bool],
        show: Show,
    ) -> None:
        self.exit_code: int | None = None
        channel = prepared.resolved.channel
        self._dialect: Dialect = dialect_of(channel.framing, channel.dial)
        self._prepared = prepared
        self._token = token
        self._listener = listener
        self._machine_exited = machine_exited
        self._recorder = recorder
        self._connect = connect
        self._failed = failed
        self._show = show
        self._harness: HarnessLink | None = None
        self._channel: GuestChannel | None = None
        self._channel_released = False
        self._channel_wanted = trio.Event()
        self._channel_ended = trio.Event()
        self._peer = ""

    async def last_words(self) -> None:
        """Once the machine is gone: returns when its channel, if there is one, has been read to its end."""
        self._channel_wanted.set()
        if self._channel is not None:
            await self._channel_ended.wait()

    async def accept(self, work: Work) -> None:
        if self._dialect.dialled:
            await self._dial(work)
            return
        try:
            accepted = await self._listener.accept()
            await self._greet(accepted.stream, accepted.peer, work)
        except HandshakeError as exc:
            if exc.code == "lost":
                await unless_exiting(self._machine_exited)
            raise

    async def _dial(self, work: Work) -> None:
        """Dials until the guest has answered the auth line: that alone proves that it is there. A guest that
        has answered by something else is not asked again. The state's deadline ends the attempts."""
        attempts, patience = 0, PATIENCE
        while True:
            attempts += 1
            failure = f"no answer within {patience:g} s"
            try:
                with trio.move_on_after(patience):
                    accepted = await self._listener.accept()
                    guest = await self._shake(accepted.stream, work)
                    break
            except TransportError as exc:
                failure = str(exc)
            except HandshakeError as exc:
                if exc.code not in ("lost", "timeout"):
                    raise
                failure = str(exc)
            if attempts == 1:
                self._recorder.append("note", {"about": "dial", "message": failure})
            patience = min(MORE_PATIENCE * patience, self._prepared.resolved.channel.limits.handshake)
            await trio.sleep(REDIAL)
        self._recorder.append("note", {"about": "dial", "attempts": attempts})
        await self._hold(guest, accepted.peer, work)

    async def reaccept(self, work: Work) -> None:
        """The lost channel is given back. Where its guest's agent has begun anew on the stream, that goes on;
        else the guest dials again."""
        lost, peer = self._channel, self._peer
        assert lost is not None
        stays = lost.detach()
        try:
            await work.ledger.release("channel")
            if stays is None:
                await self.accept(work)
            else:
                await self._greet(stays, peer, work)
        except BaseException:
            if stays is not None:
                await stays.aclose()
            raise

    async def _greet(self, stream: trio.abc.Stream | Connection, peer: str, work: Work) -> None:
        await self._hold(await self._shake(stream, work), peer, work)

    async def _shake(self, stream: trio.abc.Stream | Connection, work: Work) -> GuestChannel:
        # Ids are given in order: the channel's is the next.
        ledger_id = work.ledger.last + 1

        def report(message: Report) -> None:
            self._recorder.append("channel", _channel_fields(message))

        def bye(farewell: Bye) -> None:
            work.put(Event("guest.bye", {"reason": farewell.reason}, id=ledger_id))

        return await handshake(
            stream,
            self._expected(),
            dialect=self._dialect,
            after=self._channel,
            on_message=report,
            on_bye=bye,
            touch=work.touch,
        )

    async def _hold(self, guest: GuestChannel, peer: str, work: Work) -> None:
        """The channel is the session's from now on."""
        ledger_id = work.ledger.last + 1
        hello = guest.hello
        fields = {"agent": hello.agent, "build": hello.build, "clock": dict(hello.clock)}
        self._recorder.append("note", {"about": "hello", **fields})

        async def make() -> tuple[Made, None]:
            self._channel, self._peer = guest, peer
            self._channel_released = False
            self._channel_wanted, self._channel_ended = trio.Event(), trio.Event()
            await work.start(partial(self._own_channel, guest, ledger_id, work))
            return Made({"peer": peer}, self._end_channel), None

        try:
            await work.ledger.acquire("channel", "stream", {"peer": peer}, make, uses=("vm",))
        except BaseException:
            await guest.aclose()
            raise

    def _expected(self) -> Expected:
        resolved, lifecycle = self._prepared.resolved, self._prepared.lifecycle
        if self._dialect.dialled:
            capabilities = frozenset({APPROVAL} if resolved.channel.approvals == "harness" else ())
        elif executes(lifecycle):
            capabilities = COMMANDS
        else:
            capabilities = CAPABILITIES | RETURNING if reaccepts(lifecycle) else CAPABILITIES
        return Expected(
            session=resolved.id,
            token=self._token,
            tools=ToolPolicy(resolved.tools.allow, resolved.tools.deny),
            limits=channel_limits(resolved),
            capabilities=capabilities,
            one_stream=self._prepared.transport == "virtio-serial",
        )

    async def _own_channel(
        self, guest: GuestChannel, ledger_id: int, work: Work, *, task_status: trio.TaskStatus[None]
    ) -> None:
        """Reads the channel from the moment when somebody serves it to its end, and says so where it is lost.

        What a quick guest says before waits in the stream: its bye is for the state that serves.
        """
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._refuse_others)
            await self._channel_wanted.wait()
            try:
                end = await guest.run()
            finally:
                self._channel_ended.set()
            nursery.cancel_scope.cancel()
        if isinstance(end, Bye) or self._channel_released:
            return
        with trio.move_on_after(EXIT_GRACE):
            await self._machine_exited.wait()
        if not self._machine_exited.is_set():
            work.put(Event("channel.lost", {"message": _why(end)}, id=ledger_id))

    async def _refuse_others(self) -> None:
        """The session has its guest: whoever dials now is told so. The journal names the first of them."""
        if self._dialect.dialled or isinstance(self._listener, SerialPort):
            return  # nobody can: what comes next on a port is its next writer
        try:
            accepted = await self._listener.accept()
            self._recorder.append("note", {"about": "refused", "peer": accepted.peer})
            while True:
                await refuse(accepted.stream)
                accepted = await self._listener.accept()
        except TransportError:
            return  # out of descriptors: those who dial wait

    async def _end_channel(self) -> None:
        assert self._channel is not None
        self._channel_released = True
        self._channel_wanted.set()
        await self._channel.aclose()
        await self._channel_ended.wait()

    async def serve(self, work: Work) -> dict[str, Any]:
        assert self._channel is not None
        if self._harness is None:
            await self._join(await self._connect(), work)
        assert self._harness is not None
        self._channel_wanted.set()
        end = await self._channel.serve(self._harness)
        if end.by == "guest":
            # How it left is an event of its own, and decides.
            await trio.sleep_forever()
        return {"by": end.by}

    async def _join(self, harness: HarnessLink, work: Work) -> None:
        """The link to the harness is the session's own: it outlives a channel that is lost."""

        async def release() -> None:
            self._harness = None
            if self._channel is not None:
                await self._channel.leave(harness)
            await harness.aclose("failure" if self._failed() else "success")

        async def make() -> tuple[Made, None]:
            await work.start(partial(_own_harness, harness))
            self._harness = harness
            return Made({}, release), None

        try:
            await work.ledger.acquire("harness", "stream", {}, make)
        except BaseException:
            await harness.aclose("failure")
            raise

    async def execute(self, work: Work) -> dict[str, Any]:
        assert self._channel is not None
        argv = self._prepared.resolved.workbench.args
        if not COMMANDS.issubset(self._channel.hello.capabilities):
            raise ActivityError("the guest's agent runs no commands", hint="take an image whose agent does")
        if len(json.dumps(argv)) > self._prepared.resolved.channel.limits.frame - ENVELOPE:
            raise ActivityError("the command does not fit in a frame", hint="raise spec.channel.limits.frame")
        self._channel_wanted.set()
        ended = await self._channel.execute(argv, self._show)
        if ended is None:
            # How it left is an event of its own, and decides.
            await trio.sleep_forever()
        if isinstance(ended, NotExecuted):
            raise ActivityError(f"{argv[0]}: {ended.code}", code=ended.code)
        self.exit_code = ended.code
        return {"code": ended.code, "message": f"exit code {ended.code}"}

    async def drain(self, work: Work) -> None:
        assert self._channel is not None
        self._channel_wanted.set()
        end = await self._channel.drain(work.timeout or 0.0)
        if isinstance(end, Lost):
            await trio.sleep_forever()


async def _own_harness(harness: HarnessLink, *, task_status: trio.TaskStatus[None]) -> None:
    task_status.started()
    await harness.run()


def _why(end: Lost | Violated) -> str:
    return (
        end.reason if isinstance(end, Lost) else f"the guest broke the protocol ({end.code}): {end.message}"
    )


def _channel_fields(message: Report) -> dict[str, Any]:
    """Structure only; what is empty is left out."""
    fields = {
        "direction": message.direction,
        "message": message.kind,
        "size": message.size,
        "outcome": message.outcome,
    }
    optional = {"id": message.id, "name": message.name}
    return fields | {name: value for name, value in optional.items() if value}
