"""The command line of QEMU for one machine: pure, and nothing in it is secret.

Facts: qemu(1) of 7.2, and QEMU's own parser. A comma inside a value is doubled; a descriptor that is named is
one that the launcher passes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from kenaz_drivers.contract import VIRTIO_SERIAL_PORT, Disk, DriverError, Helper, JsonObject, LaunchRequest

QMP_FD, CONSOLE_FD, VSOCK_FD = 3, 4, 5

MIB = 1 << 20

SUN_PATH = {"linux": 107, "darwin": 103}
"""Longest path of a UNIX socket, in bytes, without its final NUL (unix(7); <sys/un.h> on macOS)."""

LOOPBACK = re.compile(r"127\.0\.0\.1:[1-9]\d{0,4}")
"""What a channel is where Python has no UNIX sockets: a port on which the launcher listens. Anybody on the
host could dial it; the session's token keeps them out."""

PORT_ID = CHARDEV_ID = "channel"
"""What the virtio-serial port and the socket behind it are called in QEMU's monitor."""

VSOCK_DAEMON = "vhost-device-vsock"
"""The program that is the device of `vhost-user-vsock`; in `Capabilities.data` the path of it."""

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

# What a guest's CPU is: the host's own where it runs directly, and all that emulation has otherwise.
# WHPX knows neither of these names; Nehalem is the first with all of x86-64-v2.
_CPUS = {"kvm": "host", "hvf": "host", "whpx": "Nehalem", "tcg": "max"}

# WHPX's own interrupt controller hangs guests on Windows 10.
_ACCELERATORS = {"whpx": "whpx,kernel-irqchip=off"}

# With a thread for each of several processors of x86, a kernel that patches itself on one of them may never
# get past the breakpoint that it has put there for the others. Of 353 boots of Debian's kernel on QEMU 7.2,
# on two busy cores, one hung so, at a static key; with one thread for all, what was translated goes at once.
# It costs a boot with two processors two fifths more time (14.3 s instead of 10).
_ONE_THREAD = "tcg,thread=single"

# To the letter, the signing of pointers takes three quarters of an emulated aarch64 guest's boot (18.7 s of
# kernel against 4.9 s); QEMU 5.2 and later know a cheap one, which is as good inside of one machine.
_EMULATED_CPUS = {"aarch64": "max,pauth-impdef=on"}

_SERIALS = {"root": "root", "config": "KENAZMETA", "workbench": "KENAZWB"}

_MACHINES = {"x86_64": ("microvm", "q35"), "aarch64": ("virt",)}


@dataclass(frozen=True, slots=True)
class Facts:
    """What `probe` found out about the QEMU of this host, and `build` depends on. `platform` is Python's name
    of the system; `firmware` is the path of UEFI, where a machine has none of its own."""

    binary: str
    version: str = ""
    machines: tuple[str, ...] = ()
    accelerators: tuple[str, ...] = ()
    sandbox: bool = False
    platform: str = "linux"
    firmware: str = ""

    @classmethod
    def from_json(cls, data: JsonObject) -> Facts:
        """The facts as they went into JSON. Raises TypeError or LookupError when they are none."""
        lists = {name: tuple(data[name]) for name in ("machines", "accelerators")}
        return cls(**{**data, **lists})


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The argv, the descriptors that it names, who must run before, and what the user should know."""

    argv: tuple[str, ...]
    descriptors: Mapping[int, str] = field(default_factory=dict)
    helpers: tuple[Helper, ...] = ()
    notes: tuple[str, ...] = ()


def escape(value: str) -> str:
    """A value inside an option with keys."""
    return value.replace(",", ",,")


def accelerator_option(name: str) -> str:
    """What `-accel` is given for an accelerator."""
    return _ACCELERATORS.get(name, name)


def cpu_option(accelerator: str) -> str:
    """The processor that a guest gets of an accelerator that runs it directly."""
    return _CPUS[accelerator]


def choose_machine(request: LaunchRequest, facts: Facts) -> str:
    """The machine type. microvm boots a kernel of ours fastest, but boots no disk, and is KVM's.

    Under TCG it is taken only when asked for: it has neither HPET nor PM timer, so that Linux can learn the
    speed of its clock from the PIT alone, and hangs for ever without a word where a busy host spoils that.
    """
    arch = request.capabilities.arch
    possible = [name for name in _MACHINES.get(arch, ()) if name in facts.machines]
    wanted = str(request.options.get("machine", "auto"))
    if wanted != "auto":
        if wanted not in possible:
            raise DriverError(
                f"{facts.binary} has no machine {wanted!r} for {arch}",
                hint=f"driverOptions.qemu.machine: {' or '.join(possible) or 'none'}",
            )
        if wanted == "microvm" and not request.kernel:
            raise DriverError("microvm boots no disk", hint="use an image with a kernel, or machine: q35")
        return wanted
    if not request.kernel or request.capabilities.accelerator != "kvm":
        possible = [name for name in possible if name != "microvm"]
    if not possible:
        raise DriverError(f"{facts.binary} has no machine for {arch} that this image could boot on")
    return possible[0]


def _emulated(request: LaunchRequest) -> bool:
    return request.capabilities.accelerator == "tcg"


def build(request: LaunchRequest, facts: Facts) -> CommandLine:
    """The command line for that machine. Raises DriverError for what QEMU or this driver cannot do."""
    _check(request, facts)
    machine = choose_machine(request, facts)
    bus = "device" if machine == "microvm" else "pci"
    accelerator = request.capabilities.accelerator
    notes: list[str] = []
    if machine == "microvm" and _emulated(request):
        notes.append("microvm under TCG: on a busy host Linux may hang while it measures its clock")
    descriptors: dict[int, str] = {}
    helpers: tuple[Helper, ...] = ()

    argv = [facts.binary, "-nodefaults", "-no-user-config", *_display(request, facts.platform), "-no-reboot"]
    argv += ["-name", f"guest=kenaz-{escape(request.session)}"]
    shared = request.transport == "vhost-user-vsock"
    memory = f"{-(-request.memory // MIB)}M"
    machine = "microvm,acpi=on,rtc=on" if machine == "microvm" else machine
    if shared:
        # The device is in another process, which has to see what the guest's queues point to.
        argv += ["-object", f"memory-backend-memfd,id=ram,size={memory},share=on"]
    argv += ["-machine", f"{machine},memory-backend=ram" if shared else machine]
    one_thread = _emulated(request) and request.capabilities.arch == "x86_64" and request.cpus > 1
    argv += ["-accel", _ONE_THREAD if one_thread else accelerator_option(accelerator)]
    if accelerator in _CPUS:
        emulated = _EMULATED_CPUS if accelerator == "tcg" else {}
        argv += ["-cpu", emulated.get(request.capabilities.arch, _CPUS[accelerator])]
    argv += ["-m", memory, "-smp", str(request.cpus)]
    if facts.sandbox:
        argv += ["-sandbox", SANDBOX]
    else:
        notes.append("this QEMU has no seccomp sandbox: a guest that breaks out of it has all your rights")
    if request.kernel:
        argv += ["-kernel", request.kernel]
        argv += ["-initrd", request.initrd] if request.initrd else []
        argv += ["-append", request.cmdline] if request.cmdline else []
    elif request.capabilities.arch == "aarch64":
        argv += ["-bios", _firmware(facts)]

    if facts.platform == "win32":
        # No descriptors can be passed there. QEMU makes the pipe, and waits for who reads it.
        argv += ["-chardev", "stdio,id=qmp,signal=off", "-mon", "chardev=qmp,mode=control"]
        argv += ["-chardev", f"pipe,id=console,path={escape(console_pipe(request))}"]
    else:
        descriptors |= {QMP_FD: "qmp", CONSOLE_FD: "console"}
        argv += ["-chardev", f"socket,id=qmp,fd={QMP_FD}", "-mon", "chardev=qmp,mode=control"]
        argv += ["-chardev", f"socket,id=console,fd={CONSOLE_FD}"]
    argv += ["-serial", "chardev:console"]
    argv += ["-device", f"virtio-rng-{bus}"]
    if request.display != "none":
        argv += ["-device", f"virtio-gpu-{bus}", "-device", f"virtio-keyboard-{bus}"]
        argv += ["-device", f"virtio-tablet-{bus}"]
    for disk in request.disks:
        # With a kernel of ours, QEMU's loader has the first place already.
        argv += _disk(disk, bus, boots=disk.role == "root" and not request.kernel)
    if request.transport == "virtio-serial":
        argv += ["-device", f"virtio-serial-{bus}"]
        argv += ["-chardev", f"socket,id={CHARDEV_ID},{_where(request, facts)}"]
        argv += ["-device", f"virtserialport,id={PORT_ID},chardev={CHARDEV_ID},name={VIRTIO_SERIAL_PORT}"]
    elif shared:
        helpers = (vsock_daemon(request),)
        argv += ["-chardev", f"socket,id=vsock,path={escape(helpers[0].sockets[0])}"]
        argv += ["-device", f"vhost-user-vsock-{bus},chardev=vsock"]
    elif request.transport == "vsock":
        argv += ["-device", f"vhost-vsock-{bus},guest-cid={request.cid},vhostfd={VSOCK_FD}"]
        descriptors[VSOCK_FD] = "vhost-vsock"
    if request.network == "nat":
        rom = "" if bus == "device" else ",romfile="
        forward = ""
        if request.transport == "tcp":
            forward = f",hostfwd=tcp:127.0.0.1:{request.forward}-:{request.port}"
        argv += ["-netdev", f"user,id=nat{forward}", "-device", f"virtio-net-{bus},netdev=nat{rom}"]
        notes.append("network nat: the guest reaches whatever this host reaches")
    return CommandLine(tuple(argv), descriptors, helpers, tuple(notes))


def console_pipe(request: LaunchRequest) -> str:
    r"""The name of the guest's console on Windows, `\\.\pipe\NAME`, by the session's mark: no other's."""
    return f"kenaz-{request.mark or request.session}-console"


def _where(request: LaunchRequest, facts: Facts) -> str:
    if facts.platform != "win32":
        return f"path={escape(request.channel)}"
    host, _, port = request.channel.partition(":")
    return f"host={host},port={port}"


def _firmware(facts: Facts) -> str:
    """Read as one piece, with variables that are gone with the machine: nothing of it has to be kept."""
    if not facts.firmware:
        raise DriverError(
            "a machine of aarch64 boots a disk by UEFI only, and this host has none",
            hint="install it (Debian: qemu-efi-aarch64), or use an image with a kernel",
        )
    return facts.firmware


def vsock_daemon(request: LaunchRequest) -> Helper:
    """The daemon that is this machine's vsock device, one for each machine: its guests could talk to each
    other. Raises DriverError where this host has none.

    Facts: vhost-device-vsock 0.3.0. A guest that dials CID 2 is connected to `<uds-path>_PORT`.
    """
    daemon = str(request.capabilities.data.get(VSOCK_DAEMON, ""))
    uds, underscore, port = request.channel.rpartition("_")
    if not daemon or not underscore or port != str(request.port):
        raise DriverError(
            f"transport vhost-user-vsock: no {VSOCK_DAEMON}, or no socket for port {request.port}"
        )
    socket = f"{request.runtime}/vhost"
    for path in (socket, request.channel):
        _check_socket(path, "linux")
    return Helper(
        VSOCK_DAEMON,
        (daemon, f"--socket={socket}", f"--uds-path={uds}"),
        sockets=(socket, uds),
        environment={"LC_ALL": "C.UTF-8", "RUST_LOG": "error"},
    )


def _display(request: LaunchRequest, platform: str) -> list[str]:
    """VNC is served on a UNIX socket only: it has no password, and a port is everybody's."""
    match request.display:
        case "none":
            return ["-display", "none"]
        case "vnc" if platform == "win32":
            raise DriverError("display vnc: not served on Windows", hint="display: none")
        case "vnc":
            path = f"{request.runtime}/screen/vnc"
            _check_socket(path, platform)
            return ["-display", "none", "-vnc", f"unix:{path}"]
        case "window":
            window = str(request.capabilities.data.get("window", ""))
            if not window:
                raise DriverError("there is no desktop to open a window on", hint="display: vnc")
            return ["-display", window]
    raise DriverError(f"display {request.display!r} is unknown to this driver", hint="none, window or vnc")


def _disk(disk: Disk, bus: str, *, boots: bool) -> list[str]:
    serial = _SERIALS[disk.role]
    drive = f"if=none,id={serial},format={disk.format},file={escape(disk.path)}"
    # A throw-away disk needs to survive nothing, so the host may keep what the guest flushes.
    drive += ",readonly=on" if disk.readonly else ",cache=unsafe,discard=unmap,werror=report"
    device = f"virtio-blk-{bus},drive={serial},serial={serial}"
    device += ",bootindex=0" if boots else ""
    return ["-drive", drive, "-device", device]


def _check(request: LaunchRequest, facts: Facts) -> None:
    paths = [request.kernel, request.initrd, request.channel, *(disk.path for disk in request.disks)]
    if any("\0" in text for text in (*paths, request.cmdline, request.session)):
        raise DriverError("a NUL character cannot stand in a command line", hint="rename the file")
    if request.network not in {"none", "nat"}:
        raise DriverError(f"network {request.network!r} is unknown to this driver", hint="none or nat")
    for disk in request.disks:
        if disk.role not in _SERIALS or disk.format not in {"qcow2", "raw"}:
            raise DriverError(f"QEMU is given no disk of role {disk.role!r} and format {disk.format!r}")
    match request.transport:
        case "virtio-serial" if facts.platform == "win32":
            if not LOOPBACK.fullmatch(request.channel):
                raise DriverError(f"the channel is no port of 127.0.0.1: {request.channel!r}")
        case "virtio-serial":
            _check_socket(request.channel, facts.platform)
        case "vhost-user-vsock":
            pass  # vsock_daemon looks
        case "tcp":
            if request.network != "nat":
                raise DriverError("transport tcp: the guest has no network", hint="network: nat")
        case "vsock" if request.cid is not None:
            pass
        case other:
            raise DriverError(
                f"transport {other!r} is none of virtio-serial, vhost-user-vsock, tcp, and vsock with a cid"
            )


def _check_socket(path: str, platform: str) -> None:
    length, most = len(path.encode("utf-8", "surrogateescape")), SUN_PATH.get(platform, 103)
    if not 0 < length <= most:
        raise DriverError(
            f"the channel's socket path has {length} bytes and must have 1 to {most}",
            hint="set XDG_RUNTIME_DIR to a shorter directory",
        )
