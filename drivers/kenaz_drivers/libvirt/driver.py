"""The driver `libvirt`: transient domains, made and watched by virsh.

One virsh owns the domain: it makes it, paused and tied to its own connection (`--autodestroy`), and then
tells of its events. It is a child of ours that dies with us, and libvirt ends the domain when that connection
goes: so a machine does not outlive its launcher. Where the URI leads to another host, the disks are volumes
there (`elsewhere`), and a program for each carries console and channel (`streams`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import trio

from kenaz_drivers._common.background import open_background
from kenaz_drivers._common.output import Console, LogTail
from kenaz_drivers._common.process import ChildProcess, open_pipe, spawn
from kenaz_drivers._common.terminate import terminate
from kenaz_drivers._common.unix import unix_socket
from kenaz_drivers.contract import (
    MARK,
    Capabilities,
    Content,
    DriverError,
    Exit,
    JsonObject,
    LaunchPlan,
    LaunchRequest,
)
from kenaz_drivers.libvirt import elsewhere, probe
from kenaz_drivers.libvirt.domain import (
    PREFIX,
    Facts,
    Volume,
    build,
    cid_of,
    console_path,
    name_of,
    placed,
    uuid_of,
    volumes,
)
from kenaz_drivers.libvirt.lines import Lines
from kenaz_drivers.libvirt.virsh import (
    FIXED,
    Lifecycle,
    call,
    describe_exit,
    destroy,
    environment,
    failed,
    failure,
    parse_event,
    parse_monitor,
    start_daemon,
)

MADE_DEADLINE = 50.0
"""Seconds for libvirt to make the domain. It takes 0.3; a daemon that has just started may take 9. On two
busy cores it was not done after 30, once in some hundred times, for a reason that is not known. The state
`booting` has 60."""

HEARD_DEADLINE = 2.0
"""Seconds for the event of a domain that was resumed; without it, its owner did not listen yet."""

DRAIN_GRACE = 1.0
"""Seconds for the last lines of a virsh that has ended to be read."""

TERM_GRACE = 0.5

KILL_DEADLINE = 4.0
"""Seconds of a kill that nobody cuts: the lifecycles give it 5, and a host that drops what it is sent would
have all that it is given."""

CARRIER_MEMORY = 256 << 20
"""Bytes of data that a carrier may have, whatever a guest sends that does not read. It has 10 MB."""


class LibvirtMachine:
    """A domain. Made by `LibvirtDriver.launch` only."""

    def __init__(self, data: JsonObject, child: ChildProcess, console: socket.socket) -> None:
        self._virsh, self._uri, self._uuid = str(data["virsh"]), str(data["uri"]), str(data["uuid"])
        self._name = str(data["name"])
        self._pool, self._volumes = str(data["pool"]), [str(one["name"]) for one in data["volumes"]]
        self._discarded = False
        self._uncarried = set(data["carried"])
        self._lost = ""
        self._child = child
        self._listening = trio.socket.from_stdlib_socket(console)
        self._console = trio.Event()
        self._stream: trio.SocketStream | None = None
        self._events: list[Lifecycle] = []
        self._changed = trio.lowlevel.ParkingLot()
        self._made = False
        self._cid: int | None = None
        self._rebooted = trio.Event()
        self._closings = 0
        self._log = LogTail()
        self._exit: Exit | None = None
        self._left: DriverError | None = None
        self._gone = trio.Event()

    @property
    def handle(self) -> JsonObject:
        more: dict[str, object] = {} if self._cid is None else {"cid": self._cid}
        if self._volumes:
            more |= {"pool": self._pool, "volumes": self._volumes}
        return {**self._child.handle, "uri": self._uri, "uuid": self._uuid, **more}

    # --- tasks ----------------------------------------------------------------------------------------------

    async def follow(self, stream: trio.abc.ReceiveStream) -> None:
        """Hears what the owner tells of the domain, and ends it with the domain."""
        async for line in Lines(stream):
            self._hear(line)
            self._changed.unpark_all()
            if self._stopped:
                break
        await self._child.end((signal.SIGTERM, TERM_GRACE))

    def _hear(self, line: str) -> None:
        if line == self._name:
            self._made = True
        elif (event := parse_event(line)) is not None:
            self._events.append(event)
            if event.event == "Reboot":
                self._rebooted.set()

    @property
    def _stopped(self) -> bool:
        return bool(self._events) and self._events[-1].event == "Stopped"

    async def listen(self, environment: Mapping[str, str]) -> None:
        """Hears from QEMU's monitor when the guest closes the channel's port, of which libvirt tells nothing.

        It lets one look there, and promises nothing of it: where it cannot be had, it is gone without.
        """
        with contextlib.suppress(DriverError):
            await self._until(lambda: self._made)
            command = f"qemu-monitor-event --domain {self._uuid} --loop"
            argv = [self._virsh, "-c", self._uri, "--quiet", command]
            with open_pipe() as (output, output_end):
                child = spawn(argv, stdout=output_end, env=environment)
            async with output:
                try:
                    async for line in Lines(output):
                        if (told := parse_monitor(line)) is not None:
                            self._closings += told[0] == "VSERPORT_CHANGE" and told[1].get("open") is False
                            self._changed.unpark_all()
                finally:
                    await child.end((signal.SIGTERM, TERM_GRACE))

    async def carry(self, kind: str, path: str, environment: Mapping[str, str]) -> None:
        """Connects the socket of that path to the console or the channel of a domain on another host."""
        with contextlib.suppress(DriverError):
            await self._until(lambda: self._made)
            argv = [*elsewhere.STREAMS, self._uri, kind, self._uuid, path]
            with open_pipe() as (output, theirs):
                limits = {"data": CARRIER_MEMORY}
                child = spawn(argv, stdout=theirs, stderr=theirs, env=environment, limits=limits)
            async with output:
                try:
                    async for line in Lines(output):
                        if line == "open":
                            self._uncarried.discard(kind)
                        else:
                            self._lost = f"the {kind} cannot be had: {line}"
                        self._changed.unpark_all()
                finally:
                    await child.end((signal.SIGTERM, TERM_GRACE))
        if kind in self._uncarried:
            self._lost = self._lost or f"the {kind} cannot be had"
            self._changed.unpark_all()

    async def end_with_reboot(self) -> None:
        """A throw-away machine does not start anew."""
        await self._rebooted.wait()
        with contextlib.suppress(DriverError):
            await destroy(self._virsh, self._uri, self._uuid)

    async def read_log(self, stream: trio.abc.ReceiveStream) -> None:
        """Reads what virsh says on stderr."""
        await self._log.read(stream)

    async def watch(self) -> None:
        """Waits for the end of the owner, which is that of the domain, and makes it known."""
        await self._child.wait()
        with trio.move_on_after(DRAIN_GRACE):
            await self._log.ended.wait()
        if self._stopped:
            self._exit = describe_exit(self._events)
        else:
            log = "\n".join(self._log.lines())
            self._exit = Exit(False, str(failure("libvirt's connection ended", log, self._uri)))
            try:
                await destroy(self._virsh, self._uri, self._uuid)
            except DriverError as error:
                self._left = error
        self._gone.set()
        self._changed.unpark_all()

    async def take_console(self) -> None:
        """Lets QEMU connect the console, once."""
        try:
            with self._listening, contextlib.suppress(trio.ClosedResourceError):
                connected, _ = await self._listening.accept()
                self._stream = trio.SocketStream(connected)
        finally:
            self._console.set()

    async def close(self) -> None:
        """Closes the console."""
        self._listening.close()
        if self._stream is not None:
            await self._stream.aclose()

    # --- the contract ---------------------------------------------------------------------------------------

    async def learn_cid(self) -> None:
        """Waits for the domain, which is paused yet, and asks which CID libvirt found for it."""
        with trio.move_on_after(MADE_DEADLINE):
            await self._until(lambda: self._made)
            done = await call(self._virsh, self._uri, f"dumpxml {self._uuid}")
            self._cid = cid_of(done.text) if done.code == 0 else None
        if self._cid is None:
            raise DriverError("libvirt does not tell the guest's CID", hint="transport: virtio-serial")

    async def ready(self) -> None:
        with trio.move_on_after(MADE_DEADLINE):
            await self._until(lambda: self._made)
            while self._uncarried and not self._lost:
                await self._until(lambda: not self._uncarried or bool(self._lost))
            if self._uncarried:
                raise DriverError(self._lost, log=self._log.lines())
            # An owner that listens hears of it; one that did not yet is given another event to hear.
            while not self._heard:
                await self._call("the domain does not start", f"resume {self._uuid}")
                with trio.move_on_after(HEARD_DEADLINE):
                    await self._until(lambda: self._heard)
                    return
                await self._call("the domain does not start", f"suspend {self._uuid}")
            return
        what = "tell that the domain runs" if self._made else "make the domain"
        raise DriverError(f"libvirt does not {what} within {MADE_DEADLINE:g} s", log=self._log.lines())

    @property
    def _heard(self) -> bool:
        """Whether the owner has told of a domain that runs, or that has run."""
        return any(event.event == "Resumed" for event in self._events)

    async def _until(self, holds: Callable[[], bool]) -> None:
        """Raises DriverError when the domain ends before."""
        while not holds():
            if self._gone.is_set():
                assert self._exit is not None
                if self._stopped:
                    raise DriverError(self._exit.reason, log=self._log.lines())
                raise failure("libvirt makes no domain", "\n".join(self._log.lines()), self._uri)
            await self._changed.park()

    async def _call(self, what: str, command: str) -> None:
        done = await call(self._virsh, self._uri, command)
        if done.code is None or (done.code and not self._stopped):
            raise failed(what, done, self._uri)

    async def wait(self) -> Exit:
        await self._gone.wait()
        assert self._exit is not None
        return self._exit

    async def powerdown(self) -> None:
        await self._call("the power button does not work", f"shutdown {self._uuid} --mode acpi")

    async def kill(self) -> None:
        with trio.move_on_after(KILL_DEADLINE, shield=True):
            await self._end()
            return
        await self._end()

    async def _end(self) -> None:
        if not self._gone.is_set():
            try:
                # What is wrong with that, `watch` will see, who tries once more.
                with contextlib.suppress(DriverError):
                    await destroy(self._virsh, self._uri, self._uuid)
                    with trio.move_on_after(TERM_GRACE):
                        await self._gone.wait()
            finally:
                # Whatever became of that: libvirt ends a domain whose owner goes.
                await self._child.end((signal.SIGTERM, TERM_GRACE))
            await self._gone.wait()
        if self._left is not None:
            raise self._left
        if self._volumes and not self._discarded:
            await elsewhere.discard_volumes(self._virsh, self._uri, self._pool, self._volumes)
            self._discarded = True

    def console(self) -> AsyncIterator[bytes]:
        return _Late(self._console, lambda: self._stream)

    async def port_closed(self) -> None:
        # QEMU tells of a port once a second at the most, and then of its last state only: what it told
        # before is no longer sure.
        before = self._closings
        while self._closings == before:
            await self._changed.park()


class LibvirtDriver:
    """Runs machines with libvirt's QEMU driver, by any URI: on this host, or on the one that it leads to."""

    name: ClassVar[str] = "libvirt"
    options_schema: ClassVar[JsonObject] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Options of the driver libvirt",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "uri": {
                "title": "Connection URI",
                "description": "Which libvirt. Unless given, $LIBVIRT_DEFAULT_URI, "
                "or qemu:///system for root and qemu:///session for others; a daemon that does not run is "
                "then not started, and another host not taken.",
                "type": "string",
                "pattern": "^qemu(\\+[a-z0-9]+)?://",
                "examples": ["qemu:///session", "qemu:///system", "qemu+ssh://root@other/system"],
            },
            "pool": {
                "title": "Storage pool",
                "description": "Where the image and the disks go if the URI leads to another host: a pool of "
                "files there. Not used on this host.",
                "type": "string",
                "pattern": "^[A-Za-z0-9][A-Za-z0-9_.+-]*$",
                "default": "default",
                "examples": ["scratch"],
            },
            "accel": {
                "title": "Accelerator",
                "description": "How the guest's processor is run. `auto` takes KVM where it has been seen to "
                "run a guest, and says so when it takes `tcg`.",
                "enum": ["auto", "kvm", "tcg"],
                "default": "auto",
                "examples": ["tcg"],
            },
        },
    }

    async def probe(self, arch: str, options: JsonObject) -> Capabilities:
        return await probe.probe(arch, options)

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        capabilities = request.capabilities
        if "facts" not in capabilities.data:
            raise capabilities.refusal("libvirt")
        facts = Facts.from_json(capabilities.data["facts"])
        mark = request.mark or request.session
        uuid = uuid_of(mark)
        owner = (
            "create --file /dev/stdin --validate --paused --autodestroy; "
            f"domname {uuid}; event --domain {uuid} --all --loop"
        )
        fallback = str(capabilities.data.get("fallback", ""))
        nat = (
            ("network nat: the guest reaches whatever that host reaches",) if request.network == "nat" else ()
        )
        # libvirt has no words for QEMU's one thread for all; see the driver qemu.
        several = capabilities.accelerator == "tcg" and request.cpus > 1 and capabilities.arch == "x86_64"
        hangs = "several emulated processors: Linux may hang while it boots, once in some hundred times"
        made = volumes(request, facts)
        trace: dict[str, object] = {"uri": facts.uri}
        if made:
            trace |= {"pool": facts.pool, "volumes": [volume.name for volume in made]}
        return LaunchPlan(
            driver=self.name,
            argv=(facts.virsh, "-c", facts.uri, "--quiet", owner),
            environment=FIXED | ({MARK: request.mark} if request.mark else {}),
            stdin=build(request, facts),
            notes=((fallback,) if fallback else ())
            + _there(facts, made)
            + nat
            + ((hangs,) if several else ()),
            data={
                "virsh": facts.virsh,
                "uri": facts.uri,
                "name": name_of(mark),
                "uuid": uuid,
                "console": console_path(request),
                "channel": request.channel,
                "vsock": request.transport == "vsock",
                "pool": facts.pool,
                "volumes": [asdict(volume) for volume in made],
                "carried": ["console", "channel"] if facts.elsewhere else [],
                "starts": "uri" in request.options and _is_users_own(facts),
            },
            trace=trace,
        )

    def placed(self, capabilities: Capabilities, digest: str) -> str:
        return placed(Facts.from_json(capabilities.data["facts"]), digest)

    async def place(
        self, capabilities: Capabilities, contents: Sequence[Content], told: elsewhere.Told
    ) -> None:
        await elsewhere.place(Facts.from_json(capabilities.data["facts"]), contents, told)

    @asynccontextmanager
    async def launch(self, plan: LaunchPlan, descriptors: Mapping[str, int]) -> AsyncIterator[LibvirtMachine]:
        made = [Volume(**one) for one in plan.data["volumes"]]
        if plan.data["starts"]:
            await start_daemon(plan.data["virsh"], plan.data["uri"])
        if not made:
            async with self._launched(plan) as here:
                yield here
            return
        virsh, uri, pool = plan.data["virsh"], plan.data["uri"], plan.data["pool"]
        machine: LibvirtMachine | None = None
        try:
            await elsewhere.make_volumes(virsh, uri, pool, made)
            async with self._launched(plan) as machine:
                yield machine
        finally:
            if machine is None:
                # Else its `kill` has done so. Where it fails, `release` will tell.
                with trio.CancelScope(shield=True), contextlib.suppress(DriverError):
                    await elsewhere.discard_volumes(virsh, uri, pool, [volume.name for volume in made])

    @asynccontextmanager
    async def _launched(self, plan: LaunchPlan) -> AsyncIterator[LibvirtMachine]:
        console = Path(plan.data["console"])
        with contextlib.ExitStack() as stack:
            listening = stack.enter_context(_listen(console))
            stack.callback(console.unlink, missing_ok=True)
            with (
                _readable(plan.stdin) as stdin,
                open_pipe() as (output, output_end),
                open_pipe() as (log, log_end),
            ):
                child = spawn(
                    plan.argv,
                    stdin=stdin,
                    stdout=output_end,
                    stderr=log_end,
                    env={**environment(), **plan.environment},
                )
            machine = LibvirtMachine(plan.data, child, listening)
            marked = {**environment(), **plan.environment}
            async with open_background() as background:
                background.start_soon(lambda: machine.follow(output))
                background.start_soon(lambda: machine.read_log(log))
                background.start_soon(lambda: machine.listen(marked))
                background.start_soon(machine.end_with_reboot)
                background.start_soon(machine.watch)
                background.start_soon(machine.take_console)
                for kind in plan.data["carried"]:
                    background.start_soon(partial(machine.carry, kind, plan.data[kind], marked))
                try:
                    if plan.data["vsock"]:
                        await machine.learn_cid()
                    yield machine
                finally:
                    with trio.CancelScope(shield=True):
                        try:
                            await machine.kill()
                        except DriverError:
                            # A host that cannot be reached is no defect: `kill` will tell again.
                            if not plan.data["volumes"]:
                                raise
                        finally:
                            await machine.close()
                            await output.aclose()
                            await log.aclose()

    async def release(self, handle: JsonObject) -> None:
        mark = str(handle.get("mark", ""))
        if "pid" in handle or mark:
            await terminate(handle)
        uri = str(handle.get("uri") or probe.default_uri())
        await destroy("virsh", uri, str(handle.get("uuid") or uuid_of(mark)))
        if volumes := handle.get("volumes"):
            await elsewhere.discard_volumes("virsh", uri, str(handle["pool"]), list(volumes))


def _is_users_own(facts: Facts) -> bool:
    """Whether its daemon is one that libvirt starts on demand, and that ends by itself."""
    return not facts.elsewhere and urlsplit(facts.uri).path == "/session"


def _there(facts: Facts, made: Sequence[Volume]) -> tuple[str, ...]:
    """What is to be said of a machine on another host."""
    if not facts.elsewhere:
        return ()
    names = ", ".join(volume.name for volume in made)
    return (
        f"the machine runs on {facts.elsewhere}: image and build are kept in its storage pool {facts.pool} "
        f"as {PREFIX}SHA256, and {names} are deleted in the end",
    )


def _listen(path: Path) -> socket.socket:
    """Raises DriverError when QEMU could not connect there."""
    listening = unix_socket()
    try:
        listening.bind(str(path))
        path.chmod(0o600)
        listening.listen(1)
    except OSError as error:
        listening.close()
        raise DriverError(f"{path}: cannot listen: {error.strerror}") from error
    return listening


class _Late:
    """A console that QEMU connects when it starts, if it does."""

    def __init__(self, connected: trio.Event, stream: Callable[[], trio.SocketStream | None]) -> None:
        self._connected = connected
        self._stream = stream

    def __aiter__(self) -> _Late:
        return self

    async def __anext__(self) -> bytes:
        await self._connected.wait()
        if (stream := self._stream()) is None:
            raise StopAsyncIteration
        return await anext(Console(stream))


@contextlib.contextmanager
def _readable(text: str) -> Iterator[int]:
    """A descriptor from which that text can be read. A pipe holds all of it: see `domain.LONGEST`."""
    ours, theirs = os.pipe()
    try:
        with os.fdopen(theirs, "w", encoding="utf-8") as file:
            file.write(text)
        yield ours
    finally:
        os.close(ours)
