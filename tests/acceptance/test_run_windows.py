"""The launcher on Windows, as far as Wine is Windows: sessions run, ended, killed, reaped, and a real QEMU.

Needs what `python -m tests.wine` prepares.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import wine

from kenaz_engine.images.catalog import default_cache

ROOT = Path(__file__).parents[2]
BOUND = 300

pytestmark = pytest.mark.only_where(wine.is_ready())


class Windows:
    """A launcher's state on drive Z, and its commands. All streams are pipes: Python takes no others."""

    def __init__(self, place: Path) -> None:
        self.place = place
        # The images of all; not what is known of their QEMU, which would be forgotten for this one.
        cache = place / "cache"
        cache.mkdir()
        (cache / "images").symlink_to(default_cache() / "images")
        self.environment = {
            **wine.environment(),
            "KENAZ_STATE_DIR": wine.windows(place / "s"),
            "KENAZ_CACHE_DIR": wine.windows(cache),
            "NO_COLOR": "1",
        }
        self.started: list[subprocess.Popen[str]] = []

    def start(self, command: list[str], **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
            start_new_session=True,
            **options,
        )
        self.started.append(process)
        return process

    def __call__(self, *words: str, code: int = 0) -> str:
        """What a command of the launcher prints; its exit code must be that one."""
        process = self.start(wine.launcher(*words))
        said, _ = process.communicate(timeout=BOUND)
        assert process.returncode == code, said
        return said

    def session(self, name: str = "hello", **options: Any) -> list[str]:
        """The words of a run; options are values of the spec."""
        values = {"driver": "process", **options}
        sets = [w for key, value in values.items() for w in ("--set", f"spec.{key}={value}")]
        return ["run", wine.windows(ROOT / f"specs/sessions/{name}.yaml"), *sets]

    def records(self, session: str) -> list[dict[str, Any]]:
        """The session's journal so far."""
        journal = self.place / "s/sessions" / session / "journal.jsonl"
        lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
        return [json.loads(line) for line in lines]

    def until(self, session: str, state: str) -> None:
        """Waits until the session has entered it."""
        deadline = time.monotonic() + BOUND / 2
        while not any(r["kind"] == "entered" and r["state"] == state for r in self.records(session)):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def files(self, session: str) -> set[str]:
        """What there is of it."""
        return {path.name for path in (self.place / "s/sessions" / session).iterdir()}


@pytest.fixture
def windows(tmp_path: Path) -> Iterator[Windows]:
    windows = Windows(tmp_path)
    yield windows
    for process in windows.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def agents(mark: str) -> list[int]:
    """The processes of this host that are that session's agent, as Wine runs them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"agent.py" in command and mark.encode() in command:
                found.append(int(entry.name))
    return found


def test_a_session_runs_from_its_spec_to_nothing_left(windows: Windows) -> None:
    said = windows(*windows.session(), "--session-id", "w")
    assert "guest says: hello from SigilOS demo, kernel Windows" in said
    assert "tool fs.delete: denied by the session's policy" in said
    assert "nothing left behind" in said
    assert windows.files("w") == {"journal.jsonl", "console.log"}
    records = windows.records("w")
    assert records[0]["platform"].startswith("Windows")
    assert records[-1]["success"]
    assert b"\r" not in (windows.place / "s/sessions/w/journal.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("panic", "guest panicked while booting: Kernel panic"),
        ("exit:3", "the agent ended with code 3"),
        ("hang", "guest did not power off"),
    ],
)
def test_what_goes_wrong_is_told_and_leaves_nothing(windows: Windows, word: str, told: str) -> None:
    words = windows.session(
        **{"workbench.args": f"[{word}]", "timeouts.draining": "1s", "timeouts.stopping": "2s"}
    )
    process = windows.start(wine.launcher(*words))
    said, _ = process.communicate(timeout=BOUND)
    assert told in said
    assert "nothing left behind" in said


HARNESS = """
import sys, trio
from kenaz_engine.channel.transports.loopback import listen_loopback
async def main():
    listener = listen_loopback(sys.argv[1])
    async with (await listener.accept()).stream as stream:
        print("accepted", flush=True)
        async for data in stream:
            pass
    await listener.aclose()
trio.run(main)
"""


def test_another_terminal_sees_a_session_and_ends_it_and_a_harness_takes_part(windows: Windows) -> None:
    file = windows.place / "harness"
    harness = windows.start(wine.python("-c", HARNESS, wine.windows(file)))
    while not file.exists() or not file.read_bytes():
        time.sleep(0.05)
    words = [*windows.session(**{"workbench.args": "[idle]"}), "--session-id", "x"]
    session = windows.start(wine.launcher(*words, "--harness", f"loopback:{wine.windows(file)}"))
    windows.until("x", "running")
    assert re.search(r"^x +running +running +process", windows("ps"), re.MULTILINE)
    assert "entered running" in windows("logs", "x")
    assert windows("end", "x", "--wait") == "x: succeeded\n"
    assert "nothing left behind" in session.communicate(timeout=BOUND)[0]
    assert harness.communicate(timeout=BOUND)[0] == "accepted\n"
    assert re.search(r"^x +ended +ended", windows("ps", "--all"), re.MULTILINE)
    assert not file.exists()


def test_a_killed_launcher_takes_its_guest_along_and_is_reaped(windows: Windows) -> None:
    words = [*windows.session(**{"workbench.args": "[mute]"}), "--session-id", "dead"]
    session = windows.start(wine.launcher(*words))
    windows.until("dead", "connecting")
    mark = r"sessions\dead"
    wait_until(lambda: bool(agents(mark)))
    os.kill(session.pid, signal.SIGKILL)
    session.communicate(timeout=BOUND)
    wait_until(lambda: not agents(mark))  # the job was its last handle
    assert re.search(r"^dead +dead, to be reaped", windows("ps"), re.MULTILINE)
    assert "dead: reaped: gave back vm, config, socket, disk, control" in windows("reap")
    assert windows.files("dead") == {"journal.jsonl", "console.log"}


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOUND / 2
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_real_qemu_of_windows_boots_the_demo_image(windows: Windows) -> None:
    options = {
        "driver": "qemu",
        "driverOptions.qemu.binary": wine.QEMU_BINARY,
        "driverOptions.qemu.accel": "tcg",
    }
    said = windows(*windows.session(**options), "--session-id", "q")
    assert "guest says: hello from SigilOS demo, kernel Linux" in said
    assert "guest says: fs.read answered; fs.delete refused (denied)" in said
    assert "nothing left behind" in said
    assert windows.files("q") == {"journal.jsonl", "console.log"}
    records = windows.records("q")
    [peer] = [r["handle"]["peer"] for r in records if r["kind"] == "acquired" and r["resource"] == "channel"]
    [machine] = [r["handle"] for r in records if r["kind"] == "acquired" and r["resource"] == "vm"]
    assert peer == f"process {machine['pid']}"  # known by whose connection it was
    [ended] = [r for r in records if r["kind"] == "event" and r["type"] == "vm.exited"]
    assert ended["data"]["clean"], ended


OVERLAYS = """
import subprocess, sys, trio
from pathlib import Path
from kenaz_engine.images.disks import DiskError, create_disk
place, qemu_img = Path(sys.argv[1]), sys.argv[2]
for number, name in enumerate(["Jos\\xe9", "\\u0416"]):
    base, disk = place / name / "base", place / f"{number}.qcow2"
    base.parent.mkdir()
    base.write_bytes(b"x" * 512)
    try:
        trio.run(lambda: create_disk(disk, "qcow2", base=base, base_format="raw", size=512))
    except DiskError as error:
        print(ascii(error))
    else:
        read = place / f"{number}.raw"
        subprocess.run([qemu_img, "convert", "-f", "qcow2", "-O", "raw", disk, read], check=True)
        print(read.read_bytes() == base.read_bytes())
"""


def test_qemu_finds_the_base_of_a_user_whose_name_is_not_ascii(windows: Windows) -> None:
    windows.environment["LC_ALL"] = "C.UTF-8"  # of Wine, which finds no such file else; its code page is 1252
    command = wine.python("-c", OVERLAYS, wine.windows(windows.place), wine.QEMU_IMG)
    process = windows.start(command)
    read, refused = process.communicate(timeout=BOUND)[0].splitlines()
    assert read == "True"
    assert "cp1252 has not all of its characters" in refused
