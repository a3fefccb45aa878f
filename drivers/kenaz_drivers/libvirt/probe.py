"""What the libvirt behind a connection URI can do."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from urllib.parse import urlsplit

from kenaz_drivers._common.accelerator import (
    TCG_SCALE,
    ProbeCache,
    Verdict,
    host_arch,
    open_device,
    run_guest,
)
from kenaz_drivers.contract import Capabilities, DriverError, JsonObject, Reason
from kenaz_drivers.libvirt.domain import Facts, machine_of
from kenaz_drivers.libvirt.elsewhere import find_pool, is_here, require_library
from kenaz_drivers.libvirt.virsh import call, failed

PROBE_DEADLINE = 12.0
"""Seconds for all that is asked: 0.06, or 9 of a daemon that has just started and looks at its QEMU."""

_CLIENT = "apt install libvirt-clients"
_DAEMON = "apt install libvirt-daemon-system"


async def probe(arch: str, options: JsonObject) -> Capabilities:
    """What can be had for guests of that architecture, with `driverOptions.libvirt` as given.

    Asks a daemon that runs; has one started only where `uri` asks for `qemu:///session`, which libvirt starts
    on demand and which ends by itself. Never raises for what is wrong: that is a Reason.
    """
    try:
        return await _probe(arch, options)
    except DriverError as error:
        return Capabilities(usable=False, reasons=(Reason(False, str(error), error.hint),), arch=arch)


async def _probe(arch: str, options: JsonObject) -> Capabilities:
    if os.name != "posix":
        raise DriverError("this driver needs UNIX sockets for console and channel", hint="driver: hyperv")
    virsh = shutil.which("virsh")
    if virsh is None:
        raise DriverError("virsh is not installed", hint=_CLIENT)
    uri = str(options.get("uri", "")) or default_uri()
    machine = machine_of(arch)
    questions = "; ".join(
        ["hostname", "version --daemon"]
        + [f"domcapabilities --virttype {kind} --arch {arch} --machine {machine}" for kind in ("qemu", "kvm")]
    )
    more = {"LIBVIRT_AUTOSTART": "1"} if options.get("uri") else {}
    answer = await call(virsh, uri, questions, deadline=PROBE_DEADLINE, more=more)
    known = "Using API" in answer.text or "Running against daemon" in answer.text
    if answer.code is None or not known:
        raise failed(f"libvirt at {uri} does not answer", answer, uri, PROBE_DEADLINE)
    version = re.search(r"Running against daemon: (\S+)", answer.text)
    facts = Facts(virsh, uri, version[1] if version else "", _owner(uri))
    host = answer.text.splitlines()[0].strip()
    emulators = dict(_emulators(answer.text))
    reasons = [Reason(True, f"libvirt {facts.version} at {uri}")]
    here = await is_here(virsh, uri, host)
    if here:
        kvm = await _kvm(arch, emulators, options)
        # libvirt opens it for QEMU. Its `domcapabilities` tell of the QEMU only, not of the host's device.
        vsock = open_device("/dev/vhost-vsock", "vhost_vsock")
        if vsock.works:
            reasons.append(Reason(True, "/dev/vhost-vsock opens"))
        else:
            reasons.append(Reason(False, f"{vsock.text}: the channel goes over virtio-serial", vsock.mend))
    else:
        if not options.get("uri"):
            raise DriverError(
                f"{uri} is on {host}, where sessions are placed only by name",
                hint=f"driverOptions.libvirt.uri: {uri}",
            )
        await require_library()
        pool = str(options.get("pool", "default"))
        target, room = await find_pool(virsh, uri, host, pool)
        facts = replace(facts, owner=None, elsewhere=host, pool=pool, target=target)
        reasons.append(Reason(True, f"machines run on {host}; its storage pool {pool} has {room}"))
        kvm = None if options.get("accel") == "tcg" else _kvm_elsewhere(emulators, host)
    accelerator, chosen = _choose(str(options.get("accel", "auto")), emulators, kvm)
    fallback = "; ".join(reason.text for reason in chosen if not reason.ok)
    return Capabilities(
        usable=bool(accelerator),
        reasons=(reasons[0], *chosen, *reasons[1:]),
        arch=arch,
        accelerator=accelerator or "none",
        deadline_scale=TCG_SCALE if accelerator == "tcg" else 1.0,
        transports=("vsock", "virtio-serial") if here and vsock.works else ("virtio-serial",),
        disk_formats=("qcow2", "raw") if here else ("volume",),
        assigns_cid=True,
        elsewhere=facts.elsewhere,
        data={"facts": json.loads(json.dumps(asdict(facts))), "fallback": fallback},
    )


def default_uri() -> str:
    """The URI where none is given: that of libvirt's own tools, but for their configuration files."""
    root = sys.platform != "win32" and os.geteuid() == 0
    return os.environ.get("LIBVIRT_DEFAULT_URI") or ("qemu:///system" if root else "qemu:///session")


def _owner(uri: str) -> tuple[int, int] | None:
    """QEMU runs as whoever starts the session, so that it reads what that user can, and no more."""
    if sys.platform != "win32" and urlsplit(uri).path == "/system":
        return os.geteuid(), os.getegid()
    return None


def _emulators(text: str) -> Iterator[tuple[str, str]]:
    """The path of the emulator by domain type, for each type that libvirt says it can run."""
    for found in re.finditer(r"<path>([^<]*)</path>\s*<domain>([^<]*)</domain>", text):
        yield found[2], found[1]


async def _kvm(arch: str, emulators: dict[str, str], options: JsonObject) -> Verdict | None:
    """Whether KVM runs guests; None where nobody wants to know."""
    if options.get("accel", "auto") == "tcg" or arch != host_arch():
        return None
    if "kvm" not in emulators:
        opened = open_device("/dev/kvm", "kvm")
        return Verdict(False, "libvirt has no KVM" if opened.works else opened.text, opened.mend)
    binary = emulators["kvm"]
    if not Path(binary).is_file():
        return Verdict(False, f"KVM cannot be tried: {binary} is not to be seen from here", "accel: tcg")
    opened = open_device("/dev/kvm", "kvm")
    if not opened.works:
        # libvirt opens it for QEMU; what this user cannot try is believed of libvirt.
        return Verdict(True, f"libvirt has KVM, which was not tried: {opened.text}")
    cache = ProbeCache(arch, binary)
    verdict = cache.verdict("kvm") or await run_guest(binary, arch, "kvm", "host")
    cache.keep("kvm", verdict)
    cache.save()
    return verdict


def _kvm_elsewhere(emulators: dict[str, str], host: str) -> Verdict:
    """Nobody can try it from here."""
    if "kvm" in emulators:
        return Verdict(True, f"libvirt on {host} has KVM for such guests, which was not tried")
    return Verdict(False, f"libvirt on {host} has no KVM for such guests", "accel: tcg")


def _choose(wanted: str, emulators: dict[str, str], kvm: Verdict | None) -> tuple[str, list[Reason]]:
    """The accelerator, empty when there is none, and why. A wish is never quietly replaced by another."""
    if wanted != "tcg" and kvm is not None and kvm.works:
        return "kvm", [Reason(True, kvm.text)]
    if wanted == "kvm":
        text = kvm.text if kvm else "KVM runs guests of this host's own architecture only"
        return "", [Reason(False, text, (kvm.mend if kvm else "") or "accel: auto")]
    tried = [Reason(False, f"{kvm.text}: using TCG (slow)", kvm.mend)] if kvm else []
    if "qemu" not in emulators:
        return "", [*tried, Reason(False, "libvirt has no QEMU for such guests", _DAEMON)]
    return "tcg", [*tried, Reason(True, "TCG emulates the guest's processor")]
