"""Guests for the checks: a few bytes of machine code, or a few lines of Python, that do one thing each.

Every guest prints a line `up` on its console and then behaves as it is told: see `Behaviour`. None ends at
once, for of a machine that ends before it is ready `Machine.ready` raises.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from kenaz_drivers.contract import Disk, LaunchRequest

Behaviour = Literal["waits", "obeys", "powers off", "crashes", "floods", "broken"]
"""`waits` does nothing more and is deaf to the power button. `obeys` powers off when it is pressed. `powers
off` and `crashes` end by themselves. `floods` prints without an end. `broken` cannot be started, though it
can be planned."""

UP = b"up"

Guests = Callable[[LaunchRequest, Behaviour], LaunchRequest]
"""Makes of a request one whose guest behaves like that. The files that it needs go to `request.directory`."""

# --- x86_64: a boot sector ----------------------------------------------------------------------------------

_X86 = {
    "waits": "fa f4 ebfd",
    # Enables the power button in PM1_EN of q35, waits for it in PM1_STS, and powers off.
    "obeys": "ba0206 b80001 ef ba0006 ed f6c401 74fa ba0406 b80020 ef f4 ebfd",
    # SLP_EN of S5 in PM1a_CNT.
    "powers off": "ba0406 b80020 ef f4 ebfd",
    # An empty interrupt table and an interrupt: triple fault, which is a reset. si points at six zero bytes.
    "crashes": "2e0f011c cc f4 ebfd",
    "floods": "baf803 b078 ee ebfd",
}


def x86_sector(behaviour: Behaviour) -> bytes:
    """A boot sector for q35: position-independent, prints on COM1, then acts."""
    act = bytes.fromhex(_X86[behaviour])
    # cld; call next; next: pop si; add si, text - next; mov dx, 0x3f8
    # more: lodsb cs:[si]; test al, al; jz act; out dx, al; jmp more
    head = bytes.fromhex("fc e80000 5e 81c6 0000 baf803 2eac 84c0 7403 ee ebf7")
    distance = len(head) + len(act) - 4
    head = head.replace(b"\x81\xc6\0\0", b"\x81\xc6" + distance.to_bytes(2, "little"))
    return (head + act + UP + b"\n" + bytes(7)).ljust(510, b"\0") + b"\x55\xaa"


# --- aarch64: a kernel --------------------------------------------------------------------------------------

# w1 is the UART's address (PL011 of QEMU's machine virt), x5 the GPIO's (PL061, whose line 3 is the button).
_PSCI_OFF = (0x52800100, 0x72B08000, 0xD4000002)  # mov w0, #8; movk w0, #0x8400, lsl #16; hvc #0
_PSCI_RESET = (0x52800120, 0x72B08000, 0xD4000002)  # mov w0, #9; ...
# movz w3, #0x400, lsl #16; 1: subs w3, w3, #1; b.ne 1b. Of a guest that ends before the hypervisor was asked
# whether it runs nobody knows how it ended.
_PAUSE = (0x52A08003, 0x71000463, 0x54FFFFE1)
_STAY = (0x14000000,)  # b .
_ARM: dict[str, tuple[int, ...]] = {
    "waits": _STAY,
    # movz x5, #0x0903, lsl #16; 1: ldr w6, [x5, #0x20]; cbz w6, 1b; power off
    "obeys": (0xD2A12065, 0xB94020A6, 0x34FFFFE6, *_PSCI_OFF, *_STAY),
    "powers off": (*_PAUSE, *_PSCI_OFF, *_STAY),
    "crashes": (*_PAUSE, *_PSCI_RESET, *_STAY),
    # mov w2, #'x'; 1: str w2, [x1]; b 1b
    "floods": (0x52800F02, 0xB9000022, 0x17FFFFFF),
}


def arm_kernel(behaviour: Behaviour) -> bytes:
    """A flat kernel image for QEMU's machine virt, as Linux's booting.rst has its header."""
    # movz x1, #0x0900, lsl #16; then for each byte: mov w2, #byte; str w2, [x1]
    code = [0xD2A12001]
    for byte in UP + b"\n":
        code += [0x52800002 | byte << 5, 0xB9000022]
    code += _ARM[behaviour]
    header = struct.pack("<IIQQQQQQ4sI", 0x14000010, 0, 0x80000, 1 << 16, 0, 0, 0, 0, b"ARM\x64", 0)
    return (header + struct.pack(f"<{len(code)}I", *code)).ljust(1 << 16, b"\0")


def machine_guests(request: LaunchRequest, behaviour: Behaviour) -> LaunchRequest:
    """Guests for drivers that boot images."""
    directory = Path(request.directory)
    directory.mkdir(exist_ok=True)
    disk, config = directory / "root.raw", directory / "config.raw"
    arm = request.capabilities.arch == "aarch64"
    code = b"" if arm or behaviour == "broken" else x86_sector(behaviour)
    disk.write_bytes(code.ljust(1 << 20, b"\0"))
    config.write_bytes(bytes(1 << 16))
    if arm:
        kernel = directory / "kernel"
        kernel.write_bytes(arm_kernel("waits" if behaviour == "broken" else behaviour))
        request = replace(request, kernel=str(kernel))
    if behaviour == "broken":
        disk.unlink()
    disks = (Disk("root", str(disk), "raw"), Disk("config", str(config), "raw", readonly=True))
    return replace(request, disks=disks)


# --- where no machine is run --------------------------------------------------------------------------------

AGENT = """
import os, signal, socket, sys, time
behaviour, channel = sys.argv[1:]
signal.signal(signal.SIGTERM, (lambda *_: os._exit(0)) if behaviour == "obeys" else signal.SIG_IGN)
dialled = socket.socket(socket.AF_UNIX)
if os.path.exists(channel):
    dialled.connect(channel)
print("up", flush=True)
while behaviour == "floods":
    os.write(1, b"x" * 4096)
time.sleep(0.2)
if behaviour == "crashes":
    os._exit(3)
while behaviour != "powers off":
    time.sleep(0.02)
"""


def agent_guests(request: LaunchRequest, behaviour: Behaviour) -> LaunchRequest:
    """Guests for drivers that run the agent itself."""
    scratch = Path(request.directory, "gone" if behaviour == "broken" else "root")
    if behaviour != "broken":
        scratch.mkdir(parents=True, exist_ok=True)
    return replace(
        request,
        agent=(sys.executable, "-I", "-S", "-c", AGENT, behaviour, request.channel),
        disks=(Disk("root", str(scratch), "directory"),),
    )


def simulated_guests(request: LaunchRequest, behaviour: Behaviour) -> LaunchRequest:
    """Guests for the driver `simulated`: scripts."""
    config = Path(request.directory, "config")
    config.mkdir(parents=True, exist_ok=True)
    (config / "kenaz.env").write_text('HARNESS_VM_TOKEN="t"\n')
    lines = 5000 if behaviour == "floods" else 1
    script = {
        "ready": 0.01,
        "console": [{"at": 0.01, "line": "up"}, *[{"at": 0.02, "line": "x" * 99}] * (lines - 1)],
        "dial": 0.05 if Path(request.channel).exists() else None,
        "powerdown": 0.05 if behaviour == "obeys" else None,
        "exit": 0.5 if behaviour in ("powers off", "crashes") else None,
        "clean": behaviour != "crashes",
        "refuse": "it is broken" if behaviour == "broken" else "",
    }
    return replace(request, disks=(Disk("config", str(config), "directory"),), options={"script": script})


def guests_for(request: LaunchRequest, driver: str) -> Guests:
    """The guests that such a driver can run."""
    if driver == "simulated":
        return simulated_guests
    return machine_guests if request.capabilities.boots_image else agent_guests
