"""Whether vfkit can run machines on this host.

Only a Mac has Virtualization.framework, but the program is all that is asked: whoever names another one with
vfkit's command line and REST interface in `driverOptions.vfkit.binary`, on whatever system, is believed.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from pathlib import Path

from kenaz_drivers._common.process import capture
from kenaz_drivers.contract import Capabilities, DriverError, JsonObject, Reason
from kenaz_drivers.vfkit.argv import TRANSPORT

OLDEST = 14
"""The first macOS that vfkit supports (its doc/supported_platforms.md)."""

_QUESTION_DEADLINE = 30.0  # seconds, as for QEMU: a host may be busy
_PLACES = ("/opt/homebrew/bin/vfkit", "/usr/local/bin/vfkit")
_MEND = "brew install vfkit"


async def probe(arch: str, options: JsonObject) -> Capabilities:
    """What can be had here for guests of that architecture. Never raises for what is wrong with the host."""
    named = str(options.get("binary", ""))
    reasons = [] if named else list(await _system(arch))
    binary = ""
    if named or all(reason.ok for reason in reasons):
        binary, reason = await _program(named)
        reasons.append(reason)
    usable = all(reason.ok for reason in reasons)
    return Capabilities(
        usable=usable,
        reasons=tuple(reasons),
        arch=arch,
        accelerator="vz" if usable else "none",
        transports=(TRANSPORT,) if usable else (),
        disk_formats=("raw",),
        data={"binary": binary} if usable else {},
    )


if sys.platform == "darwin":

    async def _system(arch: str) -> list[Reason]:
        version = platform.mac_ver()[0]
        major = version.partition(".")[0]
        native = {"arm64": "aarch64"}.get(platform.machine(), platform.machine())
        asked = await capture(["/usr/sbin/sysctl", "-n", "kern.hv_support"], deadline=_QUESTION_DEADLINE)
        # Not on a Mac that is a machine itself.
        runs = asked.text.strip() == "1"
        return [
            Reason(
                major.isdigit() and int(major) >= OLDEST,
                f"macOS {version}",
                f"vfkit needs macOS {OLDEST} or later",
            ),
            Reason(arch == native, f"{native} runs guests for {native}", f"use an image for {native}"),
            Reason(
                runs,
                "this processor runs guests" if runs else "this processor runs no guests (kern.hv_support)",
                "use a Mac that is no virtual machine",
            ),
        ]

else:

    async def _system(arch: str) -> list[Reason]:
        return [Reason(False, "vfkit runs on macOS only")]


async def _program(named: str) -> tuple[str, Reason]:
    binary = (
        named or shutil.which("vfkit") or next((path for path in _PLACES if os.access(path, os.X_OK)), "")
    )
    if not binary:
        return "", Reason(False, "vfkit is not installed", _MEND)
    mend = "driverOptions.vfkit.binary: the path of vfkit" if named else _MEND
    if not Path(binary).is_file() or not os.access(binary, os.X_OK):
        return "", Reason(False, f"{binary} is no program", mend)
    try:
        captured = await capture([binary, "--version"], deadline=_QUESTION_DEADLINE)
    except DriverError as error:
        return "", Reason(False, str(error), error.hint)
    if captured.code is None:
        return "", Reason(False, f"{binary} --version is not done after {_QUESTION_DEADLINE:g} s", mend)
    version = re.search(r"version: v?(\S+)", captured.text)
    if captured.code != 0 or version is None:
        return "", Reason(False, f"{binary} does not say its version like vfkit", mend)
    return binary, Reason(True, f"vfkit {version[1]} at {binary}")
