"""The work that states invoke. What each needs and acquires is declared in `vocabulary`.

An activity acquires through the ledger, so that what it made outlives it; it waits for readiness outside of
the acquisition. The long-lived things (machine, channel) are tasks of the session that put events into its
inbox.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import trio

from kenaz_drivers.contract import DriverError, LaunchPlan, Machine
from kenaz_engine.channel.connection import Connection
from kenaz_engine.channel.harness import HarnessError, HarnessLink
from kenaz_engine.channel.policy import ToolPolicy
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
from kenaz_engine.channel.transports.unix import listen_unix
from kenaz_engine.channel.transports.vsock import Claim, claim_cid, listen_vsock
from kenaz_engine.guest.recipe import CONSOLE_PATTERNS
from kenaz_engine.images.catalog import default_cache, find_image
from kenaz_engine.images.config_disk import environment_file, write_config_disk
from kenaz_engine.images.disks import create_overlay
from kenaz_engine.images.errors import ImageError
from kenaz_engine.images.manifest import Image
from kenaz_engine.lifecycle.machine import Event
from kenaz_engine.session.console import Console
from kenaz_engine.session.guest import (
    ENVIRONMENT_FILE,
    Layout,
    channel_limits,
    disk_formats,
    guest_variables,
    launch_request,
)
from kenaz_engine.session.ledger import AcquireTimeout, Made
from kenaz_engine.session.lifecycles import executes
from kenaz_engine.session.prepare import Prepared
from kenaz_engine.session.recorder import Recorder, RecordLost
from kenaz_engine.session.resources import file_handle, made_directory, made_file, open_reference
from kenaz_engine.session.runner import ActivityError, ActivityFunction, Work
from kenaz_engine.session.vocabulary import VOCABULARY

LAST_WORDS = 1.0
"""Seconds for which the channel of a machine that is gone is read on, before `vm.exited` is put."""

EXIT_GRACE = 0.25
"""Seconds to wait for the machine's exit before a lost channel is put as such."""

PRESS_AGAIN = 2.0
"""Seconds after which the power button is pressed again."""

ALARMS = frozenset({"guest.panic", "guest.emergency", "firmware.shell"})
"""Names of console patterns after which a guest cannot go on; see docs/decisions/0009-console-alarms.md."""

CONSOLE_LINES = 12
"""Lines of the console that are shown when a guest fails."""

MACHINE_BOUND = 15.0
"""Seconds that ending a machine may take at its release: asked, terminated, killed, reaped."""


Connect = Callable[[], Awaitable[HarnessLink]]
"""How the session reaches its harness, once the guest is there."""

CAPABILITIES = frozenset({"tools", "prompts"})
"""What a guest may be granted, where a harness takes part."""

COMMANDS = frozenset({"exec"})
"""What it is granted in sessions that run one command."""

Show = Callable[[str, str], None]
"""Gets what the guest's command wrote: `stdout` or `stderr`, and the text. It may not wait."""


class Activities:
    """The activities of one session, and what they share."""

    def __init__(
        self,
        prepared: Prepared,
        layout: Layout,
        recorder: Recorder,
        connect: Connect,
        failed: Callable[[], bool],
        show: Show,
    ) -> None:
        self.exit_code: int | None = None
        self._console: Console | None = None
        self._prepared = prepared
        self._layout = layout
        self._recorder = recorder
        self._connect = connect
        self._failed = failed
        self._show = show
        self._harness: HarnessLink | None = None
        self._claim: Claim | None = None
        self._token = secrets.token_urlsafe(32)
        self._image: Image | None = None
        self._listener: Listener | None = None
        self._machine: Machine | None = None
        self._machine_ready_or_not = trio.Event()
        self._machine_exited = trio.Event()
        self._machine_gone = trio.Event()
        self._channel: GuestChannel | None = None
        self._channel_released = False
        self._channel_wanted = trio.Event()
        self._channel_ended = trio.Event()
        self._peer = ""

    def table(self) -> dict[str, ActivityFunction]:
        """The activities by name: exactly those that are declared."""
        functions: dict[str, ActivityFunction] = {
            "image.ensure": self._ensure_image,
            "disk.allocate": self._allocate,
            "vm.start": self._start_machine,
            "channel.accept": self._accept,
            "channel.reaccept": self._reaccept,
            "session.serve": self._serve,
            "session.exec": self._execute,
            "session.drain": self._drain,
            "vm.stop": self._stop_machine,
            "vm.kill": self._kill_machine,
            "resources.release": self._release,
        }
        assert functions.keys() == VOCABULARY.activities.keys()
        return {name: _explained(function) for name, function in functions.items()}

    def console_tail(self) -> tuple[str, ...]:
        """The last lines that the guest printed."""
        return tuple(self._console.tail(CONSOLE_LINES)) if self._console else ()

    async def _ensure_image(self, work: Work) -> None:
        if not self._prepared.capabilities.boots_image:
            return
        image = find_image(self._prepared.resolved.image, self._prepared.arch, default_cache())

        async def make() -> tuple[Made, None]:
            file, handle = open_reference(image.root)

            async def release() -> None:
                os.close(file)

            return Made(handle, release), None

        await work.ledger.acquire("image", "image-reference", {"digest": image.digest}, make)
        self._image = image

    async def _allocate(self, work: Work) -> None:
        root_format, config_format = disk_formats(self._prepared)
        root = self._layout.disk("root", root_format)
        config = self._layout.disk("config", config_format)
        files = {
            ENVIRONMENT_FILE: environment_file(guest_variables(self._prepared, self._layout, self._token))
        }

        async def make_root() -> tuple[Made, None]:
            if self._image is None:
                root.mkdir(mode=0o700)
                return made_directory(root), None
            image, size = self._image, self._prepared.resolved.machine.disk
            await create_overlay(root, base=image.root, base_format=image.root_format, size=size)
            return made_file(root), None

        async def make_config() -> tuple[Made, None]:
            if config_format == "directory":
                write_directory(config, files)
                return made_directory(config), None
            write_config_disk(config, files)
            return made_file(config), None

        kind = "directory" if root_format == "directory" else "file"
        await work.ledger.acquire("disk", kind, {"path": str(root)}, make_root)
        kind = "directory" if config_format == "directory" else "file"
        await work.ledger.acquire("config", kind, {"path": str(config)}, make_config)
        await self._listen(work)

    async def _listen(self, work: Work) -> None:
        """Listens before the machine starts, so that no guest dials in vain."""
        if self._prepared.transport == "vsock":

            async def make_cid() -> tuple[Made, None]:
                claim = claim_cid()
                try:
                    listener = listen_vsock(self._prepared.resolved.channel.port, cid=claim.cid)
                except BaseException:
                    os.close(claim.file)
                    raise
                self._claim, self._listener = claim, listener
                return Made({"cid": claim.cid, "port": listener.port}, self._end_claim), None

            await work.ledger.acquire("socket", "cid", {}, make_cid)
            return

        async def make_socket() -> tuple[Made, None]:
            self._listener = listener = listen_unix(self._layout.channel)
            return Made(file_handle(listener.path), listener.aclose), None

        await work.ledger.acquire("socket", "socket", {"path": str(self._layout.channel)}, make_socket)

    async def _end_claim(self) -> None:
        assert self._listener is not None
        await self._listener.aclose()
        self._close_claim()

    def _close_claim(self) -> None:
        """QEMU has its own copy from its start on; the CID is free when the last one is closed."""
        claim, self._claim = self._claim, None
        if claim is not None:
            os.close(claim.file)

    async def _start_machine(self, work: Work) -> None:
        cid = self._claim.cid if self._claim else None
        plan = self._prepared.driver.plan(launch_request(self._prepared, self._layout, self._image, cid=cid))

        async def make() -> tuple[Made, Machine]:
            machine = await work.start(partial(self._own_machine, plan, work.ledger.last, work))
            return Made(machine.handle, self._end_machine), machine

        uses = ("disk", "config", "socket")
        intent = {"driver": plan.driver, "argv": list(plan.argv)}
        machine = await work.ledger.acquire("vm", "machine", intent, make, uses=uses, bound=MACHINE_BOUND)
        try:
            await machine.ready()
        finally:
            self._machine_ready_or_not.set()

    async def _own_machine(
        self, plan: LaunchPlan, ledger_id: int, work: Work, *, task_status: trio.TaskStatus[Machine]
    ) -> None:
        """Holds the machine from its start until it is gone, and says so."""

        def alarm(name: str, line: str) -> None:
            data = {"pattern": name, "message": line[:200]}
            work.put(Event("guest.panic", data, id=ledger_id))

        self._console = Console(self._layout.directory / "console.log", self._patterns(), alarm)
        descriptors = {"vhost-vsock": self._claim.file} if self._claim else {}
        try:
            launching = self._prepared.driver.launch(plan, descriptors)
            async with launching as machine, trio.open_nursery() as nursery:
                self._machine = machine
                self._close_claim()
                task_status.started(machine)
                nursery.start_soon(self._read_console, machine)
                ended = await machine.wait()
                self._machine_exited.set()
                self._channel_wanted.set()
                nursery.cancel_scope.deadline = trio.current_time() + LAST_WORDS
                # What the driver says of a machine that did not start goes before, for it says more.
                await self._machine_ready_or_not.wait()
                if self._channel is not None:
                    await self._channel_ended.wait()
            data = {"clean": ended.clean, "message": ended.reason}
            work.put(Event("vm.exited", data, id=ledger_id))
        finally:
            self._machine_exited.set()
            self._machine_gone.set()
            self._console.close()

    def _patterns(self) -> list[tuple[str, str]]:
        patterns = self._image.console_patterns if self._image else CONSOLE_PATTERNS
        return [(event, pattern) for event, pattern in patterns if event in ALARMS]

    async def _read_console(self, machine: Machine) -> None:
        assert self._console is not None
        async for data in machine.console():
            self._console.feed(data)

    async def _end_machine(self) -> None:
        assert self._machine is not None
        await self._machine.kill()
        await self._machine_gone.wait()

    async def _accept(self, work: Work) -> None:
        assert self._listener is not None
        try:
            accepted = await self._listener.accept()
            await self._greet(accepted.stream, accepted.peer, work)
        except HandshakeError as exc:
            if exc.code == "lost":
                await self._unless_exiting()
            raise

    async def _unless_exiting(self) -> None:
        """The stream of a machine that ends breaks first. Its end is what happened, and is put elsewhere."""
        with trio.move_on_after(EXIT_GRACE):
            await self._machine_exited.wait()
        if self._machine_exited.is_set():
            await trio.sleep_forever()

    async def _reaccept(self, work: Work) -> None:
        """The lost channel is given back. Where its guest's agent has begun anew on the stream, that goes on;
        else the guest dials again."""
        lost, peer = self._channel, self._peer
        assert lost is not None
        stays = lost.detach()
        try:
            await work.ledger.release("channel")
            if stays is None:
                await self._accept(work)
            else:
                await self._greet(stays, peer, work)
        except BaseException:
            if stays is not None:
                await stays.aclose()
            raise

    async def _greet(self, stream: trio.SocketStream | Connection, peer: str, work: Work) -> None:
        # Ids are given in order: the channel's is the next.
        ledger_id = work.ledger.last + 1

        def report(message: Report) -> None:
            self._recorder.append("channel", _channel_fields(message))

        def bye(farewell: Bye) -> None:
            work.put(Event("guest.bye", {"reason": farewell.reason}, id=ledger_id))

        guest = await handshake(
            stream,
            self._expected(),
            after=self._channel,
            on_message=report,
            on_bye=bye,
            touch=work.touch,
        )
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
        resolved = self._prepared.resolved
        return Expected(
            session=resolved.id,
            token=self._token,
            tools=ToolPolicy(resolved.tools.allow, resolved.tools.deny),
            limits=channel_limits(resolved),
            capabilities=COMMANDS if executes(self._prepared.lifecycle) else CAPABILITIES,
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
        assert self._listener is not None
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

    async def _serve(self, work: Work) -> dict[str, Any]:
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

    async def _execute(self, work: Work) -> dict[str, Any]:
        assert self._channel is not None
        argv = self._prepared.resolved.workbench.args
        if not COMMANDS.issubset(self._channel.hello.capabilities):
            raise ActivityError("the guest's agent runs no commands", hint="take an image whose agent does")
        self._channel_wanted.set()
        ended = await self._channel.execute(argv, self._show)
        if ended is None:
            # How it left is an event of its own, and decides.
            await trio.sleep_forever()
        if isinstance(ended, NotExecuted):
            raise ActivityError(f"{argv[0]}: {ended.code}", code=ended.code)
        self.exit_code = ended.code
        return {"code": ended.code, "message": f"exit code {ended.code}"}

    async def _drain(self, work: Work) -> None:
        assert self._channel is not None
        self._channel_wanted.set()
        end = await self._channel.drain(work.timeout or 0.0)
        if isinstance(end, Lost):
            await trio.sleep_forever()

    async def _stop_machine(self, work: Work) -> None:
        """Presses the power button until the machine is gone: a guest still starting hears no press."""
        machine = self._machine
        while machine is not None and not self._machine_exited.is_set():
            try:
                await machine.powerdown()
            except DriverError:
                await self._unless_exiting()
                raise
            with trio.move_on_after(PRESS_AGAIN):
                await machine.wait()
                return

    async def _kill_machine(self, work: Work) -> None:
        if self._machine is not None:
            await self._machine.kill()

    async def _release(self, work: Work) -> None:
        seconds = work.timeout if work.timeout is not None else math.inf
        left = await work.ledger.release_all(trio.current_time() + seconds)
        if left:
            raise ActivityError("; ".join(f"the {entry.resource} {entry.error}" for entry in left))


def _explained(function: ActivityFunction) -> ActivityFunction:
    """What the parts raise, as what the session reports: one line, and what to do."""

    async def explained(work: Work) -> Any:
        try:
            return await function(work)
        except DriverError as exc:
            raise ActivityError(str(exc), hint=exc.hint, transient=exc.transient) from exc
        except (ImageError, TransportError, HarnessError) as exc:
            raise ActivityError(str(exc), hint=exc.hint) from exc
        except (HandshakeError, ProtocolViolation) as exc:
            raise ActivityError(str(exc), code=exc.code) from exc
        except (AcquireTimeout, RecordLost) as exc:
            raise ActivityError(str(exc)) from exc
        except OSError as exc:
            raise ActivityError(f"{exc.filename or 'the system'}: {exc.strerror or exc}") from exc

    return explained


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


def write_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """The config disk as a directory, for drivers that run no machine: 0700, its files 0400."""
    path.mkdir(mode=0o700)
    for name, content in files.items():
        file = os.open(path / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
        with os.fdopen(file, "wb") as stream:
            stream.write(content)
