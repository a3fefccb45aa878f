"""What the demo image is made of. Data only; `build` has the code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FILES = Path(__file__).parent / "files"
AGENT = Path(__file__).parent / "agent.py"

HOST_PACKAGES = ("apt", "dpkg", "e2fsprogs", "kmod", "lz4", "python3.11")
"""Debian packages whose tools the builder runs on the host."""

GUEST_PACKAGES = (
    "busybox-static",
    "libc6",
    "libexpat1",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "python3.11-minimal",
    "zlib1g",
)
"""Debian packages that the image is unpacked from, beside the kernel."""

MODULES: Mapping[str, tuple[str, ...]] = {
    "bus": ("virtio",),
    "pci": ("virtio_pci",),
    "mmio": ("virtio_mmio",),
    "block": ("virtio_blk",),
    "console": ("virtio_console",),
    "net": ("virtio_net",),
    "vsock": ("vmw_vsock_virtio_transport",),
    "config": ("isofs",),
}
"""Modules in the initrd by the group that its init loads: `bus` always and first, others where needed."""

LATE_MODULES = ("button", "gpio_keys", "evdev")
"""Modules on the root disk, loaded after the agent's start; one that the kernel does not have is left out."""

WORKBENCH_MODULES = ("erofs", "squashfs")
"""Modules on the root disk, loaded only where a workbench's build is attached: what builds are packed as."""

STDLIB = ("json/*.py", "lib-dynload/_json.*.so")
"""What is taken from libpython3.11-stdlib, below usr/lib/python3.11; libpython3.11-minimal comes whole."""

OS_RELEASE = """\
NAME="SigilOS demo"
ID=sigilos-demo
ID_LIKE=debian
VERSION_ID={version}
PRETTY_NAME="SigilOS demo {version}"
"""

COMMON_CMDLINE = (
    "quiet",
    "panic=-1",  # reboot at once, which the launcher takes for the end of the machine
    "mitigations=off",  # one tenant, thrown away afterwards: nothing in there to keep apart
    "cryptomgr.notests",
    "random.trust_cpu=on",
)

CONSOLE_PATTERNS = (
    ("guest.panic", r"Kernel panic - not syncing: .*"),
    ("guest.emergency", r"kenaz: emergency: .*"),
    ("guest.emergency", r"You are in (emergency|rescue) mode.*"),
    ("guest.emergency", r"Entering emergency mode.*"),
    ("guest.emergency", r"^\(initramfs\)"),
    ("firmware.shell", r"^grub(-rescue)?>"),
    ("firmware.shell", r"^(UEFI Interactive Shell|Shell>)"),
    ("firmware.shell", r"No bootable device"),
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one architecture differs. `debian` is Debian's name of it; `kernel` the meta package to resolve."""

    name: str
    debian: str
    kernel: str
    console: str
    cmdline: tuple[str, ...]


ARCHITECTURES = {
    arch.name: arch
    for arch in (
        Architecture(
            "x86_64",
            "amd64",
            "linux-image-cloud-amd64",
            "ttyS0",
            ("console=ttyS0", *COMMON_CMDLINE, "reboot=t", "tsc=reliable", "no_timer_check"),
        ),
        Architecture(
            "aarch64", "arm64", "linux-image-cloud-arm64", "ttyAMA0", ("console=ttyAMA0", *COMMON_CMDLINE)
        ),
    )
}
