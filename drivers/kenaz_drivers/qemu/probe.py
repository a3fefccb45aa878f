"""What the QEMU of this host can do."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import trio

from kenaz_drivers._common.accelerator import (
    TCG_SCALE,
    ProbeCache,
    Verdict,
    cache_directory,
    host_arch,
    open_device,
    run_guest,
)
from kenaz_drivers._common.process import capture
from kenaz_drivers._common.windows import needed_environment
from kenaz_drivers.contract import Capabilities, DriverError, JsonObject, Reason
from kenaz_drivers.qemu.argv import VSOCK_DAEMON, Facts, accelerator_option, cpu_option

_QUESTION_DEADLINE = 30.0  # seconds for `-version` and the like: 0.03, or 5 on a host that is emulated
_DAEMON_PLACE = f"tools/bin/{VSOCK_DAEMON}"
_DAEMON_MEND = f"cargo install --locked --version 0.3.0 {VSOCK_DAEMON}"
_PACKAGES = {"x86_64": "qemu-system-x86", "aarch64": "qemu-system-arm"}
_MACHINES = frozenset({"microvm", "q35", "virt"})
_DESKTOP = ("DISPLAY", "WAYLAND_DISPLAY", "XAUTHORITY", "XDG_RUNTIME_DIR")
"""Variables by which a program finds the desktop that it is to open a window on."""


async def probe(arch: str, options: JsonObject) -> Capabilities:
    """What can be had here for guests of that architecture, with `driverOptions.qemu` as given.

    Takes well under 3 s, and starts no QEMU at all when the answer is in the cache. Never raises for what is
    wrong with the host: that is a Reason.
    """
    try:
        binary = find_binary(arch, str(options.get("binary", "")))
        facts, verdicts = await _study(binary, arch, str(options.get("accel", "auto")))
    except DriverError as error:
        return Capabilities(usable=False, reasons=(Reason(False, str(error), error.hint),), arch=arch)
    reasons = [Reason(True, f"QEMU {facts.version} at {facts.binary}")]
    accelerator, chosen = _choose(str(options.get("accel", "auto")), facts, verdicts)
    reasons += chosen
    vsock = Verdict(False, "")
    if sys.platform == "linux":  # nowhere else is there a device, or anything to mend
        vsock = open_device("/dev/vhost-vsock", "vhost_vsock")
        without = "" if vsock.works else ": the channel goes over virtio-serial"
        reasons.append(Reason(vsock.works, f"{vsock.text}{without}", vsock.mend))
    daemon, daemon_reason = find_vsock_daemon(str(options.get("vsockDaemon", "")))
    reasons += [daemon_reason] if sys.platform == "linux" else []
    transports = {"vsock": vsock.works, "virtio-serial": True, "vhost-user-vsock": bool(daemon), "tcp": True}
    fallback = "; ".join(reason.text for reason in chosen if not reason.ok)
    return Capabilities(
        usable=bool(accelerator),
        reasons=tuple(reasons),
        arch=arch,
        accelerator=accelerator or "none",
        deadline_scale=TCG_SCALE if accelerator == "tcg" else 1.0,
        transports=tuple(name for name, there in transports.items() if there),
        disk_formats=("qcow2", "raw"),
        data={
            "facts": json.loads(json.dumps(asdict(facts))),
            "fallback": fallback,
            **_desktop(),
            **({"environment": needed} if (needed := needed_environment()) else {}),
            **({VSOCK_DAEMON: daemon} if daemon else {}),
        },
    )


def _choose(wanted: str, facts: Facts, verdicts: Mapping[str, Verdict]) -> tuple[str, list[Reason]]:
    """The accelerator, empty when there is none, and why. A wish is never quietly replaced by another."""
    if wanted == "tcg" or (wanted == "auto" and not any(v.works for v in verdicts.values())):
        tried = [
            Reason(False, f"{verdict.text}: using TCG (slow)", verdict.mend) for verdict in verdicts.values()
        ]
        if "tcg" not in facts.accelerators:
            return "", [*tried, Reason(False, f"{facts.binary} has no TCG", "install a QEMU that has it")]
        return "tcg", [*tried, Reason(True, "TCG emulates the guest's processor")]
    for name, verdict in verdicts.items():
        if verdict.works:
            return name, [Reason(True, verdict.text)]
    verdict = verdicts.get(wanted) or Verdict(
        False, f"accelerator {wanted} does not exist here", "accel: auto"
    )
    return "", [Reason(False, verdict.text, verdict.mend or "accel: auto")]


def find_binary(arch: str, wanted: str = "") -> str:
    """The path of QEMU for that architecture. Raises DriverError."""
    if wanted:
        if not os.access(wanted, os.X_OK) or not Path(wanted).is_file():
            raise DriverError(f"{wanted} is no program", hint="driverOptions.qemu.binary: the path of QEMU")
        return wanted
    if found := shutil.which(f"qemu-system-{arch}", path=search_path()):
        return found
    # Where Fedora and its kin keep it.
    if arch == host_arch() and os.access("/usr/libexec/qemu-kvm", os.X_OK):
        return "/usr/libexec/qemu-kvm"
    debian = f"apt install {_PACKAGES.get(arch, 'qemu-system')}"
    mends = {"darwin": "brew install qemu", "win32": "winget install SoftwareFreedomConservancy.QEMU"}
    raise DriverError(f"qemu-system-{arch} is not installed", hint=mends.get(sys.platform, debian))


def search_path() -> str | None:
    """Where QEMU is looked for: the usual path, and on Windows besides where its installer puts it."""
    if sys.platform == "win32":
        installed = Path(os.environ.get("PROGRAMFILES", "C:\\Program Files")) / "qemu"
        return os.pathsep.join([os.environ.get("PATH", ""), str(installed)])
    else:  # noqa: RET505  # so that each system's types are checked
        return None


def firmware_places(binary: str, platform: str) -> tuple[str, ...]:
    """Where UEFI for aarch64 may be, the likeliest first: QEMU's own, which Homebrew and the installer for
    Windows have, beside its program; and those of distributions (Debian, Fedora and their kin)."""
    directory = Path(binary).parent
    own = "edk2-aarch64-code.fd"
    match platform:
        case "win32":
            return (str(directory / "share" / own),)
        case "darwin":
            brewed = (directory.parent, Path("/opt/homebrew"), Path("/usr/local"))
            return tuple(str(prefix / "share/qemu" / own) for prefix in brewed)
        case _:
            return (
                "/usr/share/qemu-efi-aarch64/QEMU_EFI.fd",
                "/usr/share/edk2/aarch64/QEMU_EFI.fd",
                f"/usr/share/qemu/{own}",
            )


def find_vsock_daemon(wanted: str = "") -> tuple[str, Reason]:
    """The path of vhost-device-vsock, empty where there is none, and what was seen: the one that is asked
    for, else that of the search path, else the one that `make test` puts into the cache. Linux only: it needs
    memory that is shared by a descriptor."""
    transport = "vhost-user-vsock"
    places = (
        [wanted] if wanted else [shutil.which(VSOCK_DAEMON) or "", str(cache_directory() / _DAEMON_PLACE)]
    )
    for path in places if sys.platform == "linux" else []:
        if path and os.access(path, os.X_OK) and Path(path).is_file():
            return path, Reason(True, f"{VSOCK_DAEMON} at {path}", transport=transport)
    said = f"{wanted} is no program" if wanted else f"{VSOCK_DAEMON} is not installed"
    return "", Reason(False, f"{said}: no transport {transport}", _DAEMON_MEND, transport)


def _desktop() -> dict[str, Any]:
    """How a window is opened here, and the variables that it takes; nothing without a desktop."""
    found = {name: os.environ[name] for name in _DESKTOP if name in os.environ}
    windows = {"darwin": "cocoa", "linux": "gtk" if {"DISPLAY", "WAYLAND_DISPLAY"} & found.keys() else ""}
    window = windows.get(sys.platform, "")
    # GTK would have another program start the bus of accessibility; QEMU's sandbox kills who starts any.
    return {"window": window, "desktop": {**found, "NO_AT_BRIDGE": "1"}} if window else {}


async def _study(binary: str, arch: str, accel: str) -> tuple[Facts, dict[str, Verdict]]:
    """The facts of the binary and the verdict on each accelerator that `accel` lets us use."""
    cache = ProbeCache(arch, binary)
    try:
        facts = Facts.from_json(cache.facts)
    except (LookupError, TypeError):
        cache.forget()
        facts = await _ask(binary)
        if facts.machines and facts.accelerators:  # else some question was not answered, this time
            cache.facts = json.loads(json.dumps(asdict(facts)))
    verdicts: dict[str, Verdict] = {}
    if arch == host_arch():
        for name, device in (("kvm", "/dev/kvm"), ("hvf", ""), ("whpx", "")):
            if name not in facts.accelerators or accel not in {"auto", name}:
                continue
            opened = open_device(device, "kvm") if device else Verdict(True, "")
            # Rights change within a boot; whether the processor runs guests does not.
            if opened.works:
                opened = cache.verdict(name) or await run_guest(
                    binary, arch, accelerator_option(name), cpu_option(name)
                )
                cache.keep(name, opened)
            verdicts[name] = opened
    cache.save()
    return facts, verdicts


async def _ask(binary: str) -> Facts:
    """Asks QEMU about itself. Raises DriverError when it does not answer like QEMU."""
    answers = dict.fromkeys(("-version", "-help", "-machine", "-accel"), "")

    async def ask(*question: str) -> None:
        try:
            captured = await capture([binary, *question], deadline=_QUESTION_DEADLINE)
        except DriverError:  # no process could be made: as good as no answer
            return
        answers[question[0]] = captured.text if captured.code == 0 else ""

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, "-version")
        nursery.start_soon(ask, "-help")
        nursery.start_soon(ask, "-machine", "help")
        nursery.start_soon(ask, "-accel", "help")
    version = re.search(r"QEMU emulator version (\S+)", answers["-version"])
    if version is None:
        raise DriverError(f"{binary} does not say its version like QEMU", hint="reinstall QEMU")
    machines = {line.split()[0] for line in answers["-machine"].splitlines() if line.strip()}
    accelerators = {line.strip() for line in answers["-accel"].splitlines()}
    return Facts(
        binary=binary,
        version=version[1],
        machines=tuple(sorted(machines & _MACHINES)),
        accelerators=tuple(sorted(accelerators & {"kvm", "hvf", "whpx", "tcg"})),
        # It is Linux's; the help names it everywhere.
        sandbox=sys.platform == "linux" and "\n-sandbox " in answers["-help"],
        platform=sys.platform,
        firmware=next((path for path in firmware_places(binary, sys.platform) if Path(path).is_file()), ""),
    )
