"""The command line of vfkit for one machine: pure, and nothing in it is secret.

Facts: vfkit 0.6.4, pkg/cmdline, pkg/config and pkg/vf. A device is split at every comma, and nothing quotes
one. The kernel, its first disk and its command line are taken as they stand, all three or none. `stdio` is
the one console that is neither a file that grows nor a terminal to be found, and wants a terminal on stdin.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote

from kenaz_drivers.contract import Disk, DriverError, LaunchRequest

MIB = 1 << 20

SUN_PATH = 103
"""Longest path of a UNIX socket on macOS, in bytes, without its final NUL (<sys/un.h>)."""

TRANSPORT = "vfkit"

CONSOLE = "hvc0"
"""What the guest's console is called: virtio is the only one that there is."""

QUOTE = '"'

_SERIALS = {"root": "root", "config": "KENAZMETA", "workbench": "KENAZWB"}

_OTHER_CONSOLE = re.compile(r"(?<!\S)console=(?!hvc\d)\S+")


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The argv; the socket that vfkit makes, and the file for EFI's variables, empty where it needs none."""

    argv: tuple[str, ...]
    rest: str
    variables: str = ""
    notes: tuple[str, ...] = ()


def build(request: LaunchRequest, binary: str) -> CommandLine:
    """The command line for that machine. Raises DriverError for what vfkit or its grammar cannot do."""
    _check(request)
    rest = f"{request.runtime}/rest.sock"
    _check_socket(rest)
    argv = [binary, "--cpus", str(request.cpus), "--memory", str(-(-request.memory // MIB))]
    variables = ""
    if request.kernel:
        if not request.initrd or not request.cmdline:
            raise DriverError(
                "vfkit boots a kernel only with an initrd and a command line", hint="use an image with both"
            )
        argv += ["--kernel", request.kernel, "--initrd", request.initrd]
        argv += ["--kernel-cmdline", on_virtio(request.cmdline)]
    else:
        variables = f"{request.directory}/efi-variables"
        argv += ["--bootloader", f"efi,variable-store={_word(variables, QUOTE)},create"]
    devices = ["virtio-rng", "virtio-serial,stdio", *map(_disk, request.disks)]
    devices.append(f"virtio-vsock,port={request.port},socketURL={request.channel},listen")
    notes: tuple[str, ...] = ()
    if request.network == "nat":
        devices.append("virtio-net,nat")
        notes = ("network nat: the guest reaches whatever this host reaches",)
    for device in devices:
        argv += ["--device", device]
    # The path is taken out of a URI, so that what means something there is written as %XX.
    argv += ["--restful-uri", f"unix://{quote(rest)}"]
    return CommandLine(tuple(argv), rest, variables, notes)


def on_virtio(cmdline: str) -> str:
    """The kernel's command line with its consoles on what the machine has; images name a serial port."""
    words = _OTHER_CONSOLE.sub(f"console={CONSOLE}", cmdline).split(" ")
    seen = [n for n, word in enumerate(words) if word == f"console={CONSOLE}"]
    return " ".join(word for n, word in enumerate(words) if n not in seen[1:])


def _disk(disk: Disk) -> str:
    device = f"virtio-blk,path={_word(disk.path)}"
    return f"{device}{',readonly' if disk.readonly else ''},deviceId={_SERIALS[disk.role]}"


def _word(text: str, also: str = "") -> str:
    """A value inside of an option. There are characters that no writing gets through vfkit's grammar."""
    for bad in (",", *also):
        if bad in text:
            raise DriverError(f"vfkit takes no path with {bad!r}: {text}", hint="use another directory")
    return text


def _check(request: LaunchRequest) -> None:
    paths = [request.kernel, request.initrd, request.channel, *(disk.path for disk in request.disks)]
    if any("\0" in text for text in (*paths, request.cmdline, request.directory, request.runtime)):
        raise DriverError("a NUL character cannot stand in a command line", hint="rename the file")
    if request.display != "none":
        raise DriverError(f"display {request.display!r}: this driver shows no screen", hint="display: none")
    if request.network not in {"none", "nat"}:
        raise DriverError(f"network {request.network!r} is unknown to this driver", hint="none or nat")
    for disk in request.disks:
        if disk.role not in _SERIALS or disk.format != "raw":
            raise DriverError(f"vfkit is given no disk of role {disk.role!r} and format {disk.format!r}")
    if request.transport != TRANSPORT:
        raise DriverError(f"vfkit has no transport {request.transport!r}", hint=TRANSPORT)
    _check_socket(request.channel)
    # It goes through url.Parse: these end the path, begin something that is decoded, or are refused. A space
    # stays as it is; macOS's place for state has one, "Library/Application Support".
    if bad := re.search(r"[%?#\x00-\x1f\x7f]|//", _word(request.channel)):
        own = request.channel.startswith(f"{request.directory}/")
        raise DriverError(
            f"vfkit takes no socket with {bad[0]!r} in its path: {request.channel}",
            hint=f"set {'KENAZ_STATE_DIR' if own else 'XDG_RUNTIME_DIR'} to another directory",
        )


def _check_socket(path: str) -> None:
    length = len(path.encode("utf-8", "surrogateescape"))
    if not path.startswith("/") or length > SUN_PATH:
        raise DriverError(
            f"the path of a socket has {length} bytes and must have at most {SUN_PATH}: {path}",
            hint="set XDG_RUNTIME_DIR to a shorter directory",
        )
