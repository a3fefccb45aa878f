"""A machine in a window: on a real X server, which shows it to nobody."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.usefixtures("qemu"),
    pytest.mark.skipif(
        not (all(map(shutil.which, ("Xvfb", "xwininfo"))) and any(Path("/usr/lib").glob("*/qemu/ui-gtk.so"))),
        reason="needs apt-get install xvfb x11-utils qemu-system-gui",
    ),
]


@pytest.fixture
def desktop() -> Iterator[str]:
    """The name of a display of its own."""
    reading, writing = os.pipe()
    command = ["Xvfb", "-displayfd", str(writing), "-screen", "0", "1024x768x24", "-nolisten", "tcp"]
    with subprocess.Popen(command, pass_fds=[writing], stderr=subprocess.DEVNULL) as server:
        os.close(writing)
        with os.fdopen(reading) as told:
            yield f":{told.readline().strip()}"
        server.terminate()


def windows(display: str) -> str:
    """What is on that display."""
    command = ["xwininfo", "-display", display, "-root", "-tree"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_window_is_opened_and_gone_with_the_session(
    world: Any, desktop: str, harness: Callable[..., Any]
) -> None:
    peer = harness(lambda message: [])
    world.environment["DISPLAY"] = desktop
    options = {"driver": "qemu", "machine.display": "window", "behaviour": "idle"}
    running = world.start("--session-id", "s1", "--harness", peer.address, **options)
    world.until(lambda: running.poll() is not None or "QEMU (kenaz-s1)" in windows(desktop))
    world.wait_for("s1", "running")
    picture = world.state / "s1.png"
    assert world.call("screenshot", "s1", str(picture)).returncode == 0
    assert world.call("end", "s1").returncode == 0
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, out + err
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    assert "QEMU" not in windows(desktop)


def test_a_desktop_that_is_not_there_is_told_in_one_line(world: Any) -> None:
    world.environment["DISPLAY"] = ":9999"
    done = world.run("--session-id", "s1", driver="qemu", **{"machine.display": "window"})
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("failed: ")]
    assert "VM did not start: QEMU ended with code 1: gtk initialization failed" in line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"driver": "process"}, "the driver process makes no pictures of screens"),
        ({"driver": "qemu"}, "this machine has no screen (machine.display: vnc or window)"),
    ],
)
def test_where_there_is_no_picture_to_be_had_it_is_said(
    world: Any, harness: Callable[..., Any], options: dict[str, str], says: str
) -> None:
    peer = harness(lambda message: [])
    running = world.start("--session-id", "s1", "--harness", peer.address, behaviour="idle", **options)
    world.wait_for("s1", "running")
    asked = world.call("screenshot", "s1", str(world.state / "s1.png"))
    assert (asked.returncode, asked.stdout) == (1, "")
    assert says in asked.stderr
    assert not (world.state / "s1.png").exists()
    assert world.call("end", "s1").returncode == 0
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, out + err
