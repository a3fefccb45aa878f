"""The whole interface between the engine and a driver: what a driver is asked, and what it answers.

A driver knows how one platform runs a machine. It decides nothing about a session: the lifecycle does.
Its life in a session is: `probe` (look at the host), `plan` (pure), `launch` (make the machine), and
`release` (from any process, with nothing but the handle that `launch` gave, or the mark that it was given).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

JsonObject = Mapping[str, Any]
"""A JSON object: string keys; values are None, bool, int, float, str, lists and objects of these."""

VIRTIO_SERIAL_PORT = "dev.kenaz.channel"
"""Name of the virtio-serial port that carries the channel: `/dev/virtio-ports/<name>` in the guest."""

MARK = "KENAZ_MARK"
"""The environment variable that holds `LaunchRequest.mark`, for all children of a session."""


class DriverError(Exception):
    """The driver could not do what it was asked.

    `hint` is what the user can do about it. `transient` says that the same call may succeed later.
    `log` holds the last lines that the hypervisor printed, where there were any.
    """

    def __init__(
        self, message: str, *, hint: str = "", transient: bool = False, log: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.hint = hint
        self.transient = transient
        self.log = log


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that `probe` looked at: whether it is as it should be, and the mend where it is not.

    `transport` names the one that needs it, where nothing else does: what is wrong with that bothers only who
    asks for that transport.
    """

    ok: bool
    text: str
    mend: str = ""
    transport: str = ""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a driver can do on this host, for guests of one architecture.

    `transports` and `disk_formats` are in the driver's order of preference. `deadline_scale` is what the
    deadlines of states that wait for the guest are multiplied by (5.0 under emulation). `isolates` is False
    where the "guest" is not kept from the host. `boots_image` is False where no disk image is needed, and
    `boots_kernels` where it must be a disk that the firmware boots.
    `assigns_cid` is True where the hypervisor chooses the CID of a guest itself: `LaunchRequest.cid` is then
    None, and `Machine.handle` has it as `cid`. `elsewhere` is the name of the host that machines run on,
    where that is another one, which does not see this one's files: the driver is `Placing` then.
    `data` is plain JSON that the driver's own `plan` needs of what `probe` saw.
    """

    usable: bool
    reasons: tuple[Reason, ...]
    arch: str
    accelerator: str = "none"
    deadline_scale: float = 1.0
    transports: tuple[str, ...] = ()
    disk_formats: tuple[str, ...] = ()
    boots_image: bool = True
    boots_kernels: bool = True
    isolates: bool = True
    assigns_cid: bool = False
    elsewhere: str = ""
    data: JsonObject = field(default_factory=dict)

    def refusal(self, name: str) -> DriverError:
        """Why `plan` can make nothing of this: what is not as it should be, or that nobody has looked."""
        reasons = "; ".join(reason.text for reason in self.reasons if not reason.ok)
        return DriverError(f"{name} cannot be planned for: {reasons or 'this host was not probed'}")


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk to attach. `role` is `root`, `config` (label KENAZMETA) or `workbench` (label KENAZWB).

    `format` is one of `qcow2`, `raw`, `vhdx`, `iso`, or `directory` for drivers that run no machine. `base`
    is what a disk begins as that the driver makes itself, in `launch` (`vhdx`, and `volume`, of which `path`
    is empty), with `size` bytes; else it is there already. The base of a `volume` is of `base_format`.
    """

    role: str
    path: str
    format: str
    readonly: bool = False
    base: str = ""
    base_format: str = ""
    size: int = 0


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """Everything `plan` may depend on. Paths are absolute; `memory` is in bytes.

    `channel` is the path of the UNIX socket on which the launcher listens, or on Windows of the file that
    stands for one (`kenaz_drivers.host.dial_local`), and `ADDRESS:PORT` for `virtio-serial`; empty for
    AF_VSOCK, where `cid` says where the guest will dial from, and for `tcp`. For `vhost-user-vsock` it ends
    in `_PORT`, the number that the guest will dial. `runtime` is a short directory for the driver's own
    sockets; `directory` is the session's state directory. `agent` is the command that *is* the guest for
    drivers that run no machine. `transport` is one of `virtio-serial`, `vsock`, `vhost-user-vsock`,
    `vfkit`, `hyperv` (where the handle has the machine's id, as `vm`, before `ready`), `unix`, `tcp`. For
    `tcp` the driver forwards `forward`, a port of 127.0.0.1 and of no other address, to `port` of the
    guest; it is 0 where it is not known yet. `display` is `none`, `window`, or `vnc`, for which `runtime`
    has a directory `screen`, where the socket `vnc` is to be made. `mark` is a name that nothing else ever
    has: whatever `launch` makes must be found by it, also when nobody saw it made.
    """

    session: str
    directory: str
    runtime: str
    cpus: int
    memory: int
    transport: str
    channel: str
    port: int
    capabilities: Capabilities
    kernel: str = ""
    initrd: str = ""
    cmdline: str = ""
    disks: tuple[Disk, ...] = ()
    display: str = "none"
    network: str = "none"
    cid: int | None = None
    forward: int = 0
    agent: tuple[str, ...] = ()
    mark: str = ""
    options: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Helper:
    """A process that a machine cannot do without. The launcher starts it before the machine and ends it
    after; where it ends by itself, the machine is ended too.

    It is ready when each of `sockets`, which are paths in `LaunchRequest.runtime`, is there. `environment` is
    all that it gets of one.
    """

    name: str
    argv: tuple[str, ...]
    sockets: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """What `launch` will do, exactly, and fit to be printed.

    `argv` is the command to the letter; descriptors that it names are passed under those numbers, and
    `descriptors` maps each such number to its purpose (`qmp`, `console`, `vhost-vsock`). `helpers` run before
    it is carried out, in their order. `stdin` is what the command reads there. `notes` are for the user:
    every fall-back and every risk. `data` is plain JSON that the driver's own `launch` needs besides, and
    `trace` what `Driver.release` needs besides the mark, to find what came of a launch whose end nobody saw.
    """

    driver: str
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    descriptors: Mapping[int, str] = field(default_factory=dict)
    helpers: tuple[Helper, ...] = ()
    stdin: str = ""
    notes: tuple[str, ...] = ()
    data: JsonObject = field(default_factory=dict)
    trace: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Exit:
    """How a machine ended. `clean` means: the guest shut itself down; no signal, no panic, no power cut."""

    clean: bool
    reason: str
    code: int | None = None


class Machine(Protocol):
    """A machine that `launch` made. Any task may call its methods; only `wait` may block for ever."""

    @property
    def handle(self) -> JsonObject:
        """Enough for `Driver.release` in another process, and safe against reuse (pid *and* start time)."""

    async def ready(self) -> None:
        """Returns when the hypervisor has set the machine up and the guest runs.

        Raises DriverError, with the log, when the machine died before that.
        """

    async def wait(self) -> Exit:
        """Returns when the machine is gone. May be called often, also by several tasks."""

    async def powerdown(self) -> None:
        """Presses the power button; returns at once. Raises DriverError when the button cannot be pressed."""

    async def kill(self) -> None:
        """Cuts the power. Idempotent; when it returns, the machine is gone."""

    def console(self) -> AsyncIterator[bytes]:
        """What the guest prints, as it comes, until the machine is gone. To be read once, and always."""

    async def port_closed(self) -> None:
        """Returns when the guest has the channel's virtio-serial port closed, having had it open: true at
        some moment after the call. Never returns where the driver cannot tell."""
        ...


@runtime_checkable
class Screen(Protocol):
    """What a Machine is besides, where its screen can be seen."""

    async def screenshot(self, path: str) -> None:
        """Writes what the screen shows to `path`, as PNG. Raises DriverError."""


@dataclass(frozen=True, slots=True)
class Content:
    """A file that never changes. `digest` is the SHA-256 of it, in hexadecimal."""

    path: str
    digest: str


@runtime_checkable
class Placing(Protocol):
    """What a Driver is besides, whose machines may run on another host (`Capabilities.elsewhere`)."""

    def placed(self, capabilities: Capabilities, digest: str) -> str:
        """The path that the file of that digest has on that host. Pure; also for one that is not there yet,
        and of an empty digest for one that is not known yet."""
        ...

    async def place(
        self,
        capabilities: Capabilities,
        contents: Sequence[Content],
        told: Callable[[Content, int, int, bool], None],
    ) -> None:
        """Sees to it that these files are on that host, and leaves them there for whoever needs them next.

        `told` is told how many bytes of one have gone, of how many, and whether somebody else brings it. May
        take long; a cancel leaves nothing that the next call would take for the file. Raises DriverError.
        """
        ...


class Driver(Protocol):
    """One way of running a machine."""

    name: ClassVar[str]
    options_schema: ClassVar[JsonObject]
    """JSON Schema (2020-12, closed) of `driverOptions.<name>`."""

    async def probe(self, arch: str, options: JsonObject) -> Capabilities:
        """Looks at the host; makes nothing that outlives the call. Bounded to a few seconds."""

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """Pure and stable: the same request gives the same plan. Raises DriverError for what it cannot do."""

    def launch(
        self, plan: LaunchPlan, descriptors: Mapping[str, int]
    ) -> AbstractAsyncContextManager[Machine]:
        """Makes the machine. Entering only starts it and learns its handle; `Machine.ready` waits.

        `descriptors` are open files of the caller by purpose (see `LaunchPlan.descriptors`); the caller
        closes its own copies. Leaving the context kills what still runs, reaps it, and takes a few seconds
        at the most.
        """

    async def release(self, handle: JsonObject) -> None:
        """Ends the machine of that handle, with all that came of it, if any of it still exists.

        Idempotent; never touches what is not ours. `{"mark": ...}`, with the plan's `trace`, is the handle
        of a launch whose end nobody saw. Raises DriverError when something is still there.
        """
