"""The domain that libvirt is given for one machine: pure, and nothing in it is secret.

Facts: libvirt's formatdomain.html and domain.rng of 9.0. The domain is transient: libvirt forgets it when it
ends. Its UUID follows from the session's mark, so that whoever knows the mark finds the domain, also when
nobody saw it made.
"""

from __future__ import annotations

import re
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, replace

from kenaz_drivers.contract import VIRTIO_SERIAL_PORT, Disk, DriverError, JsonObject, LaunchRequest

NAMESPACE = uuid.UUID("5f1d8c0e-3f0b-4c39-9f5e-6b1f0f6f3a51")
"""Drawn once, for the UUIDs of our domains."""

METADATA = "https://kenaz.dev/libvirt/1"
"""The XML namespace of what we say of a domain in its metadata."""

CONSOLE = "console.sock"
"""The socket in `LaunchRequest.runtime` to which the guest's console is connected."""

SUN_PATH = 107
"""Longest path of a UNIX socket on Linux, in bytes, without its final NUL (unix(7))."""

LONGEST = 60_000
"""Bytes that a domain's XML may have: virsh reads it from a pipe, which is filled before it is read."""

KIB, MIB = 1 << 10, 1 << 20

PREFIX = "kenaz-"
"""What the names of our domains and volumes begin with."""

_OWN = ("root", "config")
"""The roles of disks that are a session's own."""

_MACHINES = {"x86_64": "q35", "aarch64": "virt"}
_CPUS = {"kvm": "host-passthrough", "tcg": "maximum"}
_SERIALS = {"root": "root", "config": "KENAZMETA", "workbench": "KENAZWB"}

# As libvirt writes it (virDomainVsockDefFormat).
_CID = re.compile(r"""<cid auto=['"]yes['"] address=['"](\d+)['"]""")

# What XML 1.0 cannot hold, not even escaped (production 2 of its grammar).
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class Facts:
    """What `probe` found out about the libvirt behind `uri`, and a domain depends on.

    `owner` are the user and group that QEMU shall run as where libvirt could choose others; else None.
    `elsewhere` is the name of its host where that is another one; `pool` is the storage pool for disks there,
    and `target` the directory in which its volumes are. All are empty where it is this host.
    """

    virsh: str
    uri: str
    version: str = ""
    owner: tuple[int, int] | None = None
    elsewhere: str = ""
    pool: str = ""
    target: str = ""

    @classmethod
    def from_json(cls, data: JsonObject) -> Facts:
        """The facts as they went into JSON. Raises TypeError or LookupError when they are none."""
        owner = data["owner"]
        return cls(**{**data, "owner": None if owner is None else (owner[0], owner[1])})


def machine_of(arch: str) -> str:
    """libvirt's machine type for that architecture. Raises DriverError where this driver knows none."""
    if arch not in _MACHINES:
        raise DriverError(f"the driver libvirt knows no machine for {arch}", hint="x86_64 or aarch64")
    return _MACHINES[arch]


def uuid_of(mark: str) -> str:
    """The UUID of the domain that carries that mark."""
    return str(uuid.uuid5(NAMESPACE, mark))


def name_of(mark: str) -> str:
    """The name of that domain."""
    return f"{PREFIX}{mark}"


def placed(facts: Facts, digest: str) -> str:
    """The path, on the host of the machine, of the file with that content."""
    return f"{facts.target}/{PREFIX}{digest or 'SHA256'}"


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume that a machine on another host has for itself, as long as it is there.

    An overlay of `size` bytes over `base`, which is of `base_format`; or a copy of the file `source`.
    """

    name: str
    size: int = 0
    base: str = ""
    base_format: str = ""
    source: str = ""


def volumes(request: LaunchRequest, facts: Facts) -> tuple[Volume, ...]:
    """What is made there for this machine alone: all disks but those that are there for all."""
    mark = request.mark or request.session
    return tuple(
        Volume(_own(mark, disk), disk.size, disk.base, disk.base_format)
        if disk.format == "volume"
        else Volume(_own(mark, disk), source=disk.path)
        for disk in request.disks
        if facts.elsewhere and disk.role in _OWN
    )


def _own(mark: str, disk: Disk) -> str:
    return f"{name_of(mark)}-{disk.role}"


def console_path(request: LaunchRequest) -> str:
    """Where the console is connected to."""
    return f"{request.runtime}/{CONSOLE}"


def cid_of(text: str) -> int | None:
    """The guest's CID in the XML of a domain that has been made; None where it has none."""
    found = _CID.search(text)
    return int(found[1]) if found else None


def build(request: LaunchRequest, facts: Facts) -> str:
    """The domain's XML. Raises DriverError for what libvirt or this driver cannot do."""
    _check(request, facts)
    arch, accelerator = request.capabilities.arch, request.capabilities.accelerator
    mark = request.mark or request.session
    domain = ET.Element("domain", type="kvm" if accelerator == "kvm" else "qemu")
    _text(domain, "name", name_of(mark))
    _text(domain, "uuid", uuid_of(mark))
    ET.register_namespace("kenaz", METADATA)
    _text(ET.SubElement(domain, "metadata"), f"{{{METADATA}}}mark", mark)
    _text(domain, "memory", str(-(-request.memory // MIB) * MIB // KIB), unit="KiB")
    _text(domain, "vcpu", str(request.cpus))
    _boot(domain, request)
    ET.SubElement(ET.SubElement(domain, "features"), "acpi")
    ET.SubElement(domain, "cpu", mode=_CPUS[accelerator])
    _text(domain, "on_poweroff", "destroy")
    # Were it `destroy`, libvirt would tell a reboot from a power-off no more: so the driver ends it.
    _text(domain, "on_reboot", "restart")
    _text(domain, "on_crash", "destroy")
    devices = ET.SubElement(domain, "devices")
    for index, disk in enumerate(_disks(request, facts)):
        _disk(devices, disk, f"vd{'abcdefgh'[index]}", boots=disk.role == "root" and not request.kernel)
    ET.SubElement(devices, "controller", type="usb", model="none")
    if facts.elsewhere:
        # Both reach us through libvirt itself: it listens where it likes, and streams them.
        ET.SubElement(devices, "serial", type="pty")
    else:
        serial = ET.SubElement(devices, "serial", type="unix")
        ET.SubElement(serial, "source", mode="connect", path=console_path(request))
    if request.transport == "vsock":
        ET.SubElement(ET.SubElement(devices, "vsock", model="virtio"), "cid", auto="yes")
    else:
        channel = ET.SubElement(devices, "channel", type="unix")
        source = {"mode": "bind"} if facts.elsewhere else {"mode": "connect", "path": request.channel}
        ET.SubElement(channel, "source", source)
        ET.SubElement(channel, "target", type="virtio", name=VIRTIO_SERIAL_PORT)
    if request.network == "nat":
        interface = ET.SubElement(devices, "interface", type="user")
        ET.SubElement(interface, "model", type="virtio")
    ET.SubElement(devices, "memballoon", model="none")
    _text(ET.SubElement(devices, "rng", model="virtio"), "backend", "/dev/urandom", model="random")
    if arch == "x86_64":
        ET.SubElement(devices, "panic", model="isa")
    if facts.owner is not None:
        label = ET.SubElement(domain, "seclabel", type="static", model="dac", relabel="no")
        _text(label, "label", "+{}:+{}".format(*facts.owner))
    ET.indent(domain)
    text = ET.tostring(domain, encoding="unicode") + "\n"
    if len(text.encode()) > LONGEST:
        raise DriverError("the domain's description is too long", hint="give the kernel a shorter cmdline")
    return text


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text


def _boot(domain: ET.Element, request: LaunchRequest) -> None:
    arch = request.capabilities.arch
    firmware = {} if request.kernel or arch == "x86_64" else {"firmware": "efi"}
    os = ET.SubElement(domain, "os", firmware)
    _text(os, "type", "hvm", arch=arch, machine=machine_of(arch))
    for tag, value in (("kernel", request.kernel), ("initrd", request.initrd), ("cmdline", request.cmdline)):
        if request.kernel and value:
            _text(os, tag, value)


def _disks(request: LaunchRequest, facts: Facts) -> Iterator[Disk]:
    """The disks as the machine's host has them."""
    for disk in request.disks:
        if facts.elsewhere and disk.role in _OWN:
            there = f"{facts.target}/{_own(request.mark or request.session, disk)}"
            disk = replace(disk, path=there, format="qcow2" if disk.format == "volume" else disk.format)
        yield disk


def _disk(devices: ET.Element, disk: Disk, target: str, *, boots: bool) -> None:
    element = ET.SubElement(devices, "disk", type="file", device="disk")
    # A throw-away disk needs to survive nothing, so the host may keep what the guest flushes.
    options = {} if disk.readonly else {"cache": "unsafe", "discard": "unmap", "error_policy": "report"}
    ET.SubElement(element, "driver", {"name": "qemu", "type": disk.format, **options})
    ET.SubElement(element, "source", file=disk.path)
    ET.SubElement(element, "target", dev=target, bus="virtio")
    if disk.readonly:
        ET.SubElement(element, "readonly")
    _text(element, "serial", _SERIALS[disk.role])
    if boots:
        ET.SubElement(element, "boot", order="1")


def _check(request: LaunchRequest, facts: Facts) -> None:
    paths = [request.kernel, request.initrd, request.channel, *(disk.path for disk in request.disks)]
    for text in (*paths, request.runtime, request.cmdline, request.session, request.mark):
        if _NOT_XML.search(text):
            raise DriverError(f"{text!r} cannot stand in XML", hint="rename the file")
    if request.capabilities.accelerator not in _CPUS:
        raise DriverError(
            f"libvirt has no accelerator {request.capabilities.accelerator!r}", hint="kvm or tcg"
        )
    if request.display != "none":
        raise DriverError(f"display {request.display!r}: this driver shows no screen", hint="display: none")
    if request.network not in {"none", "nat"}:
        raise DriverError(f"network {request.network!r} is unknown to this driver", hint="none or nat")
    for disk in _disks(request, facts):
        if disk.role not in _SERIALS or disk.format not in {"qcow2", "raw"}:
            raise DriverError(f"libvirt is given no disk of role {disk.role!r} and format {disk.format!r}")
    transports = ("virtio-serial",) if facts.elsewhere else ("virtio-serial", "vsock")
    if request.transport not in transports:
        raise DriverError(
            f"the driver libvirt has no transport {request.transport!r}", hint=" or ".join(transports)
        )
    for path in (console_path(request), *([] if request.transport == "vsock" else [request.channel])):
        length = len(path.encode("utf-8", "surrogateescape"))
        if not 0 < length <= SUN_PATH:
            raise DriverError(
                f"the path of the socket {path} has {length} bytes and must have 1 to {SUN_PATH}",
                hint="set XDG_RUNTIME_DIR to a shorter directory",
            )
