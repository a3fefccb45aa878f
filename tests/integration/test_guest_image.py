"""The demo image, built from real packages and booted by a plain QEMU command line."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from kenaz_engine.channel.framing import MARK
from kenaz_engine.guest.build import build
from kenaz_engine.images.catalog import Image, default_cache, find_image, load_image, verify_image
from kenaz_engine.images.config_disk import environment_file, write_config_disk
from kenaz_engine.images.disks import create_disk

Message = dict[str, Any]
GIB = 1 << 30
SECONDS = 180.0
LAUNCHER = str(Path(sys.executable).with_name("kenaz-launcher"))

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-system-x86_64") is None or shutil.which("apt-get") is None,
    reason="needs QEMU and a Debian host",
)


@pytest.fixture(scope="module")
def image() -> Image:
    build("x86_64")
    return find_image("demo", "x86_64", default_cache())


class Guest:
    """A running QEMU, and the launcher's end of its channel."""

    def __init__(self, directory: Path, image: Image, *words: str, build: Path | None = None) -> None:
        self.console = directory / "console.log"
        self.console.touch()
        self._qmp = directory / "qmp"
        variables = {
            "KENAZ_SESSION_ID": "s-1",
            "HARNESS_VM_TOKEN": "canary-token",
            "KENAZ_CHANNEL": "virtio-serial:dev.kenaz.channel",
            "KENAZ_WORKBENCH_ARGS": json.dumps(words),
        }
        if build is not None:
            variables["KENAZ_WORKBENCH_BUILD"] = "2026.11"
            digest = hashlib.sha256(build.read_bytes()).hexdigest()
            variables["KENAZ_WORKBENCH_DIGEST"] = f"sha256:{digest}"
        config = directory / "config.iso"
        write_config_disk(config, {"kenaz.env": environment_file(variables)})
        overlay = directory / "root.qcow2"
        trio.run(make_overlay, overlay, image)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(directory / "channel"))
            listener.listen()
            listener.settimeout(SECONDS)
            self.process = subprocess.Popen(
                self._command(image, directory, overlay, config) + (attached(build) if build else [])
            )
            self._connection, _ = listener.accept()
        self._connection.settimeout(SECONDS)
        self._stream = self._connection.makefile("rwb")

    def _command(self, image: Image, directory: Path, overlay: Path, config: Path) -> list[str]:
        # fmt: off
        return [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-M", "q35,accel=tcg", "-m", "256",
            "-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", image.cmdline,
            # The config disk comes first, to show that the guest goes by name and not by order.
            "-drive", f"if=none,id=config,format=raw,readonly=on,file={config}",
            "-device", "virtio-blk-pci,drive=config,serial=KENAZMETA",
            "-drive", f"if=none,id=root,format=qcow2,cache=unsafe,file={overlay}",
            "-device", "virtio-blk-pci,drive=root,serial=KENAZROOT",
            "-device", "virtio-serial-pci", "-chardev", f"socket,id=channel,path={directory / 'channel'}",
            "-device", "virtserialport,chardev=channel,name=dev.kenaz.channel",
            "-serial", f"file:{self.console}", "-qmp", f"unix:{self._qmp},server=on,wait=off",
        ]
        # fmt: on

    def receive(self) -> Message | None:
        while (header := self._stream.read(4)) == MARK:
            pass
        if len(header) < 4:
            return None
        message = json.loads(self._stream.read(int.from_bytes(header, "big")))
        assert isinstance(message, dict)
        return message

    def send(self, **message: Any) -> None:
        body = json.dumps(message).encode()
        self._stream.write(len(body).to_bytes(4, "big") + body)
        self._stream.flush()

    def welcome(self) -> Message:
        hello = self.receive()
        assert hello is not None
        self._stream.write(MARK)
        self.send(kind="welcome", protocol=1, session="s-1", capabilities=[], limits={}, tools={})
        return hello

    def answer_prompt(self) -> str:
        """The text of the next message, a prompt, once it has been answered."""
        prompt = self.receive()
        assert prompt is not None
        self.send(kind="prompt.result", id=prompt["id"], text="")
        text = prompt["text"]
        assert isinstance(text, str)
        return text

    def drain(self) -> None:
        self.send(kind="drain", deadline=10)
        assert self.receive() == {"kind": "bye", "reason": "drained"}
        assert self.process.wait(SECONDS) == 0

    def press_power_button(self) -> None:
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(str(self._qmp))
            with monitor.makefile("rwb") as stream:
                for command in ("qmp_capabilities", "system_powerdown"):
                    stream.readline()
                    stream.write(json.dumps({"execute": command}).encode() + b"\n")
                    stream.flush()
                stream.readline()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._stream.close()
        self._connection.close()


def attached(build: Path) -> list[str]:
    drive = f"if=none,id=build,format=raw,readonly=on,file={build}"
    return ["-drive", drive, "-device", "virtio-blk-pci,drive=build,serial=KENAZWB"]


async def make_overlay(path: Path, image: Image) -> None:
    await create_disk(path, "qcow2", base=image.root, base_format=image.root_format, size=GIB)


class Boots:
    """Starts guests, each in a directory of its own, and ends what still runs."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._guests: list[tuple[Guest, Path]] = []

    def __call__(self, *words: str, build: Path | None = None) -> Guest:
        # Short, because a socket's path has 107 bytes at most.
        directory = Path(tempfile.mkdtemp(prefix="kenaz-"))
        guest = Guest(directory, self._image, *words, build=build)
        self._guests.append((guest, directory))
        return guest

    def close(self) -> None:
        for guest, directory in self._guests:
            guest.close()
            shutil.rmtree(directory)


@pytest.fixture
def boot(image: Image) -> Iterator[Boots]:
    boots = Boots(image)
    yield boots
    boots.close()


def test_the_guest_boots_works_and_is_gone(boot: Boots) -> None:
    guest = boot()
    hello = guest.welcome()
    assert (hello["session"], hello["token"]) == ("s-1", "canary-token")
    clock = hello["clock"]
    assert 0 < clock["init"] < clock["agent"] < clock["hello"]
    assert guest.answer_prompt().startswith("hello from SigilOS demo, kernel Linux 6.")
    for tool in ("fs.read", "fs.delete"):
        invocation = guest.receive()
        assert invocation is not None
        assert invocation["tool"] == tool
        guest.send(kind="tool.result", id=invocation["id"], result={})
    assert guest.answer_prompt() == "fs.read answered; fs.delete answered"
    guest.drain()
    assert "canary-token" not in guest.console.read_text()


def test_the_disk_is_as_large_as_asked_and_what_was_written_is_gone_next_time(
    boot: Boots, image: Image
) -> None:
    first = boot("disk", "read:/var/marker", "write:/var/marker", "read:/var/marker")
    first.welcome()
    found = re.fullmatch(r"root file system has (\d+) bytes", first.answer_prompt())
    assert found is not None
    assert image.root.stat().st_size < 0.9 * GIB < int(found[1]) < GIB
    assert first.answer_prompt() == "/var/marker does not exist"
    assert first.answer_prompt() == "wrote /var/marker"
    assert first.answer_prompt() == "/var/marker exists"
    first.drain()
    second = boot("read:/var/marker")
    second.welcome()
    assert second.answer_prompt() == "/var/marker does not exist"
    second.drain()
    verify_image(image)


def test_the_power_button_ends_the_guest(boot: Boots) -> None:
    guest = boot("idle")
    guest.welcome()
    # Until its driver is loaded nobody hears the button; the launcher presses it again, too.
    for _ in range(90):
        with contextlib.suppress(OSError):  # it may be ending in this very moment
            guest.press_power_button()
        try:
            assert guest.process.wait(1) == 0
            break
        except subprocess.TimeoutExpired:
            continue
    assert guest.process.poll() == 0


def test_a_crashed_agent_is_started_again(boot: Boots) -> None:
    guest = boot("exit:7")
    guest.welcome()
    assert (guest.receive() or {})["kind"] == "hello"
    assert "kenaz: agent ended with status 7; starting it again" in guest.console.read_text()


@pytest.mark.parametrize(
    ("word", "event"),
    [("panic", "guest.panic"), ("early:panic", "guest.panic"), ("emergency", "guest.emergency")],
)
def test_what_the_console_says_matches_a_pattern(boot: Boots, image: Image, word: str, event: str) -> None:
    guest = boot(word)
    if not word.startswith("early:"):
        guest.welcome()
    patterns = [re.compile(pattern) for name, pattern in image.console_patterns if name == event]
    deadline = time.monotonic() + SECONDS
    while not any(p.search(line) for p in patterns for line in guest.console.read_text().splitlines()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("word", ["poweroff", "reboot"])
def test_the_guest_may_end_by_itself(boot: Boots, word: str) -> None:
    guest = boot(word)
    guest.welcome()
    assert guest.process.wait(SECONDS) == 0
    assert {"poweroff": "Power down", "reboot": "Restarting system"}[word] in guest.console.read_text()


def test_a_build_elsewhere_on_another_day_gives_the_same_bytes(image: Image) -> None:
    """In memory instead of on a disk, three days later, in Tokyo, with a strict umask, on a host of another
    name: only the packages' versions are the same."""
    here = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="kenaz-", dir=here) as elsewhere:
        command = ["faketime", "-f", "+3d", LAUNCHER, "image", "build", "--output", f"{elsewhere}/image"]
        if os.geteuid() == 0:
            command = ["unshare", "--uts", "sh", "-c", 'hostname elsewhere && exec "$@"', "sh", *command]
        strange = {"TZ": "Asia/Tokyo", "LC_ALL": "tr_TR.UTF-8", "LANG": "de_DE.UTF-8", "PYTHONHASHSEED": "7"}
        strange |= {"HOME": "/nonexistent", "TMPDIR": elsewhere}
        said = subprocess.run(
            command, check=True, capture_output=True, cwd="/", umask=0o077, env={**os.environ, **strange}
        )
        again = load_image(Path(elsewhere, "image", "image.json"))
        verify_image(again)
    assert said.stdout.startswith(b"building the demo image for x86_64")
    assert {name: part.sha256 for name, part in again.parts.items()} == {
        name: part.sha256 for name, part in image.parts.items()
    }
    assert again.digest == image.digest


def test_the_root_file_system_is_sound(image: Image) -> None:
    check = shutil.which("e2fsck", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert check is not None
    subprocess.run([check, "-fn", image.root], check=True, capture_output=True)


@pytest.fixture
def build_disk(tmp_path: Path) -> Path:
    """A workbench's build, packed as builds are."""
    tree, packed = tmp_path / "tree", tmp_path / "build.erofs"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin/workbench").write_text("#!/bin/sh\n")
    (tree / "README").write_text("a build\n" * 1000)
    subprocess.run(["mkfs.erofs", packed, tree], check=True, capture_output=True)
    return packed


def test_a_workbench_build_is_there_whole_and_cannot_be_changed(boot: Boots, build_disk: Path) -> None:
    digest = hashlib.sha256(build_disk.read_bytes()).hexdigest()
    guest = boot("workbench", build=build_disk)
    guest.welcome()
    assert guest.answer_prompt() == (
        f"build 2026.11: {build_disk.stat().st_size} bytes, sha256:{digest}, as promised, read-only, "
        "holds README, bin/workbench"
    )
    guest.drain()


def test_a_build_that_is_no_file_system_is_still_there(boot: Boots, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(b"build".ljust(4096, b"."))
    guest = boot("workbench", build=raw)
    guest.welcome()
    assert guest.answer_prompt().endswith("as promised, read-only, holds nothing")
    guest.drain()
    assert "holds no file system that is known here" in guest.console.read_text()
