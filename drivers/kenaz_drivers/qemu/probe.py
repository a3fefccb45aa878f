"""What the QEMU of this host can do. An accelerator is believed only after it has run a guest.

A device node, an API version and a created VM prove nothing: there are nested hosts whose `/dev/kvm` answers
everything and then emulates each instruction, a thousand times slower than the processor and ten times slower
than TCG. The verdict is kept for this boot and this binary, because it costs up to GUEST_DEADLINE seconds.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import trio

from kenaz_drivers._common.identity import boot_id
from kenaz_drivers._common.process import capture
from kenaz_drivers.contract import Capabilities, DriverError, JsonObject, Reason
from kenaz_drivers.qemu.argv import VSOCK_DAEMON, Facts
from kenaz_drivers.qemu.probe_guest import PROBE_GUESTS

GUEST_DEADLINE = 2.0
"""Seconds that the tiny guest may take. It needs 0.1 on hardware, 0.2 under TCG."""

TCG_SCALE = 5.0
"""Deadlines that wait for a guest are multiplied by this under emulation."""

_QUESTION_DEADLINE = 30.0  # seconds for `-version` and the like: 0.03, or 5 on a host that is emulated
_DAEMON_PLACE = f"tools/bin/{VSOCK_DAEMON}"
_DAEMON_MEND = f"cargo install --locked --version 0.3.0 {VSOCK_DAEMON}"
_CACHE_VERSION = 1
_PACKAGES = {"x86_64": "qemu-system-x86", "aarch64": "qemu-system-arm"}
_ARCHES = {"amd64": "x86_64", "arm64": "aarch64"}
_MACHINES = frozenset({"microvm", "q35", "virt"})


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an accelerator runs guests, and in words what was seen."""

    works: bool
    text: str
    mend: str = ""


def host_arch() -> str:
    """This host's architecture in the words of `uname -m` on Linux."""
    name = platform.machine().lower()
    return _ARCHES.get(name, name)


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
    vsock = _open_device("/dev/vhost-vsock", "vhost_vsock")
    if vsock.works:
        reasons.append(Reason(True, "/dev/vhost-vsock opens"))
    else:
        reasons.append(Reason(False, f"{vsock.text}: the channel goes over virtio-serial", vsock.mend))
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
    if os.name == "nt":
        raise DriverError(
            "this driver passes open files to QEMU, which Windows cannot", hint="driver: hyperv"
        )
    if wanted:
        if not os.access(wanted, os.X_OK) or not Path(wanted).is_file():
            raise DriverError(f"{wanted} is no program", hint="driverOptions.qemu.binary: the path of QEMU")
        return wanted
    if found := shutil.which(f"qemu-system-{arch}"):
        return found
    # Where Fedora and its kin keep it.
    if arch == host_arch() and os.access("/usr/libexec/qemu-kvm", os.X_OK):
        return "/usr/libexec/qemu-kvm"
    mend = (
        "brew install qemu"
        if sys.platform == "darwin"
        else f"apt install {_PACKAGES.get(arch, 'qemu-system')}"
    )
    raise DriverError(f"qemu-system-{arch} is not installed", hint=mend)


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


def _open_device(path: str, module: str) -> Verdict:
    """Opens a device for reading and writing: access(2) has been seen to say yes where open(2) says no."""
    try:
        os.close(os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0)))
    except OSError as error:
        if error.errno in {errno.EACCES, errno.EPERM}:
            return Verdict(False, f"{path} may not be opened", "join the group that owns it, usually kvm")
        if error.errno in {errno.ENOENT, errno.ENODEV, errno.ENXIO}:
            return Verdict(False, f"there is no {path}", f"load the module {module}, where the host has it")
        return Verdict(False, f"{path}: {error.strerror}")
    return Verdict(True, f"{path} opens")


async def _study(binary: str, arch: str, accel: str) -> tuple[Facts, dict[str, Verdict]]:
    """The facts of the binary and the verdict on each accelerator that `accel` lets us use."""
    cache = _Cache(arch, binary)
    facts = cache.facts() or await _ask(binary)
    verdicts: dict[str, Verdict] = {}
    if arch == host_arch():
        for name, device in (("kvm", "/dev/kvm"), ("hvf", "")):
            if name not in facts.accelerators or accel not in {"auto", name}:
                continue
            opened = _open_device(device, "kvm") if device else Verdict(True, "")
            # Rights change within a boot; whether the processor runs guests does not.
            if opened.works:
                opened = cache.verdict(name) or await run_guest(binary, arch, name, "host")
                cache.keep(name, opened)
            verdicts[name] = opened
    cache.save(facts)
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
        accelerators=tuple(sorted(accelerators & {"kvm", "hvf", "tcg"})),
        sandbox="\n-sandbox " in answers["-help"],
    )


async def run_guest(
    binary: str, arch: str, accelerator: str, cpu: str, deadline: float = GUEST_DEADLINE
) -> Verdict:
    """Runs a guest that should end by itself within `deadline` seconds, and kills it then."""
    guest = PROBE_GUESTS.get(arch)
    if guest is None:
        return Verdict(False, f"{accelerator.upper()} cannot be tried for {arch}")
    name = accelerator.upper()
    with tempfile.TemporaryDirectory(prefix="kenaz-probe-") as directory:
        firmware = trio.Path(directory, "guest.bin")
        await firmware.write_bytes(guest.firmware)
        argv = [binary, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "16M"]
        argv += ["-accel", accelerator, "-cpu", cpu, "-bios", str(firmware), *guest.arguments]
        captured = await capture(argv, deadline=deadline)
    if captured.code == guest.code:
        return Verdict(True, f"{name} runs guests")
    if captured.code is None:
        seen = f"a tiny guest is not done after {deadline:g} s"
    else:
        said = [line for line in captured.text.splitlines() if "error" in line.lower()]
        said = said or captured.text.splitlines()[-1:] or [f"QEMU ended with code {captured.code}"]
        seen = said[0].removeprefix(f"{Path(binary).name}: ")
    return Verdict(False, f"{name} present but does not run guests ({seen})", "accel: tcg")


def cache_directory() -> Path:
    """Where verdicts are kept: `$KENAZ_CACHE_DIR`, or the user's cache directory."""
    if configured := os.environ.get("KENAZ_CACHE_DIR"):
        return Path(configured)
    import platformdirs

    return Path(platformdirs.user_cache_dir("kenaz"))


class _Cache:
    """What was found out about one binary in this boot. A file that cannot be used is as good as none."""

    def __init__(self, arch: str, binary: str) -> None:
        status = Path(binary).stat()
        identity = [_CACHE_VERSION, binary, status.st_mtime_ns, status.st_size, boot_id()]
        self._key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self._file = cache_directory() / "probe" / f"qemu-{arch}.json"
        self._verdicts: dict[str, Verdict] = {}
        self._facts: Facts | None = None
        self._saved: dict[str, Any] = {}
        try:
            self._saved = json.loads(self._file.read_text(encoding="utf-8"))
            if self._saved["key"] == self._key:
                self._facts = Facts.from_json(self._saved["facts"])
                self._verdicts = {name: Verdict(**v) for name, v in self._saved["verdicts"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            self._facts, self._verdicts = None, {}
        self._before = self._content(self._facts) if self._facts else {}

    def facts(self) -> Facts | None:
        return self._facts

    def verdict(self, accelerator: str) -> Verdict | None:
        return self._verdicts.get(accelerator)

    def keep(self, accelerator: str, verdict: Verdict) -> None:
        self._verdicts[accelerator] = verdict

    def _content(self, facts: Facts) -> dict[str, Any]:
        verdicts = {name: asdict(verdict) for name, verdict in self._verdicts.items()}
        return {"key": self._key, "facts": asdict(facts), "verdicts": verdicts}

    def save(self, facts: Facts) -> None:
        """Writes the file in one step, when there is something new; a full or read-only disk is no error."""
        content = self._content(facts)
        if content == self._before:
            return
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._file.parent, delete=False) as file:
                new = Path(file.name)
                try:
                    json.dump(content, file)
                    file.flush()
                    new.replace(self._file)
                except OSError:
                    new.unlink()
                    raise
