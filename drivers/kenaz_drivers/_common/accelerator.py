"""Whether an accelerator runs guests: it is believed only after it has run one.

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
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import trio

from kenaz_drivers._common.identity import boot_id
from kenaz_drivers._common.probe_guest import PROBE_GUESTS
from kenaz_drivers._common.process import capture
from kenaz_drivers.contract import JsonObject

GUEST_DEADLINE = 2.0
"""Seconds that the tiny guest may take. It needs 0.1 on hardware, 0.2 under TCG."""

TCG_SCALE = 5.0
"""Deadlines that wait for a guest are multiplied by this under emulation."""

_CACHE_VERSION = 3
_ARCHES = {"amd64": "x86_64", "arm64": "aarch64"}


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


def open_device(path: str, module: str) -> Verdict:
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


async def run_guest(
    binary: str, arch: str, accelerator: str, cpu: str, deadline: float = GUEST_DEADLINE
) -> Verdict:
    """Runs a guest that should end by itself within `deadline` seconds, and kills it then."""
    guest = PROBE_GUESTS.get(arch)
    if guest is None:
        return Verdict(False, f"{accelerator.upper()} cannot be tried for {arch}")
    name = accelerator.partition(",")[0].upper()
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

    return Path(platformdirs.user_cache_dir("kenaz", appauthor=False))


class ProbeCache:
    """What was found out about one binary in this boot. A file that cannot be used is as good as none."""

    def __init__(self, arch: str, binary: str) -> None:
        status = Path(binary).stat()
        identity = [_CACHE_VERSION, binary, status.st_mtime_ns, status.st_size, boot_id()]
        self._key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self._file = cache_directory() / "probe" / f"qemu-{arch}.json"
        self._verdicts: dict[str, Verdict] = {}
        self.facts: JsonObject = {}
        try:
            saved = json.loads(self._file.read_text(encoding="utf-8"))
            if saved["key"] == self._key:
                self.facts = saved["facts"]
                self._verdicts = {name: Verdict(**v) for name, v in saved["verdicts"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            self.facts, self._verdicts = {}, {}
        self._before = self._content()

    def forget(self) -> None:
        """For facts that nobody can read: what stands beside them is believed no more than they are."""
        self.facts, self._verdicts = {}, {}

    def verdict(self, accelerator: str) -> Verdict | None:
        return self._verdicts.get(accelerator)

    def keep(self, accelerator: str, verdict: Verdict) -> None:
        # Where nothing tells one boot from the next, the mend for a "no" may have been a reboot.
        if verdict.works or boot_id():
            self._verdicts[accelerator] = verdict

    def _content(self) -> dict[str, Any]:
        verdicts = {name: asdict(verdict) for name, verdict in self._verdicts.items()}
        return {"key": self._key, "facts": dict(self.facts), "verdicts": verdicts}

    def save(self) -> None:
        """Writes the file in one step, when there is something new; a full or read-only disk is no error."""
        content = self._content()
        if content == self._before:
            return
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._file.parent)
            new = Path(name)
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump(content, file)
                new.replace(self._file)  # closed, for Windows moves and removes no file that is open
            except OSError:
                new.unlink()
                raise
