"""What a guest sees of its host, looked for from inside by root, and what it cannot change."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kenaz_engine.images.catalog import default_cache

EXEC = str(Path(__file__).parents[2] / "specs/sessions/exec.yaml")

INSIDE = r"""
import errno, fcntl, glob, json, os, sys

def text(path):
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20)
    except OSError:
        return b""

# The words come backwards, for they would be found where they were handed in.
words = [word[::-1].encode() for word in sys.argv[1:]]
places = ["/proc/cmdline", "/proc/mounts", "/proc/1/environ", "/proc/1/cmdline", "/proc/bus/input/devices"]
for root in ("/sys/firmware", "/sys/devices/virtual/dmi"):
    places += [folder + "/" + name for folder, _, names in os.walk(root) for name in names]
places += glob.glob("/sys/class/virtio-ports/*/name") + glob.glob("/sys/block/vd*/serial")
disks = {}
for disk in glob.glob("/dev/vd?"):
    with open(disk, "rb") as file:
        head = file.read(64 << 10)
    if b"KENAZMETA" in head:
        disks["config"] = disk
        places.append(disk)
log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
lines = []
while True:
    try:
        lines.append(os.read(log, 8192))
    except BlockingIOError:
        break
    except BrokenPipeError:
        pass
texts = {place: text(place) for place in places}
texts["kmsg"] = b"".join(lines)

config = disks["config"]
BLKROSET = 0x125D
fd = os.open(config, os.O_RDWR)
fcntl.ioctl(fd, BLKROSET, (0).to_bytes(4, "little"))
try:
    os.pwrite(fd, bytes(512), 0)
    os.fsync(fd)
    written = ""
except OSError as error:
    written = errno.errorcode[error.errno]

print(json.dumps({
    "looked at": sum(map(bool, texts.values())),
    "seen": sorted({place for place, data in texts.items() for word in words if word in data}),
    "networks": sorted(os.listdir("/sys/class/net")),
    "devices": [text(path).decode().strip() for path in glob.glob("/sys/bus/virtio/devices/*/device")],
    "file systems": sorted({line.split()[2] for line in text("/proc/mounts").decode().splitlines()}),
    "command line": text("/proc/cmdline").decode(),
    "written": written,
    "root": os.geteuid() == 0,
}))
"""


def modes_of(world: Any, path: Path) -> set[int]:
    """How the machine's process has that file open."""
    records = world.records("s1")
    [pid] = [r["handle"]["pid"] for r in records if r["kind"] == "acquired" and r["resource"] == "vm"]
    modes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if fd.readlink() == path:
                [flags] = re.findall(
                    r"^flags:\s*(\d+)", (fd.parents[1] / "fdinfo" / fd.name).read_text(), re.MULTILINE
                )
                modes.add(int(flags, 8) & os.O_ACCMODE)
    return modes


VIRTIO = {"0x0002": "disk", "0x0003": "console", "0x0004": "random numbers", "0x0013": "vsock"}
"""Virtio 1.2, chapter 5. A network card would be 1, shared directories 9 and 26."""


@pytest.mark.usefixtures("qemu")
@pytest.mark.parametrize("transport", ["virtio-serial", "vhost-user-vsock"])
def test_root_in_the_guest_finds_nothing_of_the_host_and_writes_on_no_disk_but_its_own(
    world: Any, tmp_path: Path, transport: str
) -> None:
    about_here = [str(tmp_path), str(world.runtime), str(default_cache())]
    words = ["python3.11", "-c", INSIDE, *(word[::-1] for word in about_here)]
    options = {"workbench.args": json.dumps(words), "channel.transport": transport, "driver": "qemu"}
    running = world.start("--session-id", "s1", spec=EXEC, **options)
    config = world.directory("s1") / "config.raw"
    world.until(config.exists)
    with config.open("rb") as kept:  # it is read through its inode once its name is gone
        world.until(lambda: "connecting" in world.path("s1"))
        before = os.pread(kept.fileno(), 1 << 20, 0)
        opened = modes_of(world, config)
        out, err = running.communicate(timeout=300)
        after = os.pread(kept.fileno(), 1 << 20, 0)
    assert running.returncode == 0, out + err
    [line] = [line for line in out.splitlines() if '"looked at"' in line]
    found = json.loads(line[line.index("{") :])
    assert found["root"]
    assert found["looked at"] > 20
    assert found["seen"] == []
    assert found["networks"] == ["lo"]
    assert set(found["devices"]) <= VIRTIO.keys()
    assert not {"9p", "virtiofs", "nfs", "fuse"} & set(found["file systems"])
    token = before.split(b'HARNESS_VM_TOKEN="')[1].split(b'"')[0].decode()
    assert token not in found["command line"]
    assert found["written"] == "EPERM"
    assert opened == {os.O_RDONLY}  # so a guest with a kernel of its own cannot either
    assert after == before
    assert not config.exists()
