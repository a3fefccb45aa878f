"""Tiny guests that end by themselves, to see whether an accelerator really runs guests.

What they do and why is in probe_guest.S. The aarch64 one only counts to ten million and asks PSCI for power
off; it has not met a broken accelerator yet.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_X86_64 = bytes.fromhex(
    "fafc2e660f011690010f20c00c010f22c066ea1900ffff080066b810008ed88ec08ed0bc00700000bf0010000031c0b9"
    "00140000f3abc7050010000003200000c7050020000003300000c7051820000003400000c7050030000083000000c705"
    "b84f00008300e0fec705f84f00008300e0ff0f20e083c8200f22e0b8001000000f22d8b9800000c00f320d000100000f"
    "300f20c00d000000800f22c0eaa300ffff1800bf0080000031c0b900040000f3abb850010000bfe0800000e87a000000"
    "b861010000bf00820000e86b0000000f011dc0000000be00003000c70678563412b011e620b020e621b004e621b001e6"
    "21b0fee621b034e643b0a9e640b004e640bf0000e0fec787f0000000ff010000c787500300000007000031dbfbf4fa83"
    "fb0372f8b980969800ffc975fcb81000000066baf400eff4ebfd66890766c74702180066c74704008e66c74706ffffc3"
    "c7042508300000830020004883c40848cfffc350b020e6205848cf8db40000900000000000000000ffff0000009bcf00"
    "ffff00000093cf00ffff0000009baf001f007001ffffff0f0080"
)

_AARCH64 = (
    0x5292D000,  # mov  w0, #0x9680
    0x72A01300,  # movk w0, #0x98, lsl #16
    0x71000400,  # 1: subs w0, w0, #1
    0x54FFFFE1,  # b.ne 1b
    0x52800100,  # mov  w0, #0x0008
    0x72B08000,  # movk w0, #0x8400, lsl #16    SYSTEM_OFF of PSCI 0.2
    0xD4000002,  # hvc  #0
    0x14000000,  # b    .
)


@dataclass(frozen=True, slots=True)
class ProbeGuest:
    """The firmware image to start with `-bios`, what QEMU needs besides, and its exit code on success."""

    firmware: bytes
    arguments: tuple[str, ...]
    code: int


def _x86_64() -> ProbeGuest:
    reset = bytes.fromhex("e90d00")  # the processor starts 16 bytes below the end, and jumps to the beginning
    firmware = _X86_64.ljust(0xFFF0, b"\0") + reset.ljust(16, b"\0")
    return ProbeGuest(firmware, ("-machine", "q35", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"), 33)


def _aarch64() -> ProbeGuest:
    return ProbeGuest(struct.pack(f"<{len(_AARCH64)}I", *_AARCH64), ("-machine", "virt"), 0)


PROBE_GUESTS = {"x86_64": _x86_64(), "aarch64": _aarch64()}
