"""`run` with real machines: what the guest says and does, and how each end is told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kenaz_engine.images.catalog import default_cache, find_image
from kenaz_engine.images.errors import ImageError

ROOT = Path(__file__).parents[2]
LAUNCHER = str(Path(sys.executable).with_name("kenaz-launcher"))
BOUND = 300


def _ready() -> bool:
    try:
        find_image("demo", "x86_64", default_cache())
    except ImageError:
        return False
    return shutil.which("qemu-system-x86_64") is not None


pytestmark = pytest.mark.skipif(not _ready(), reason="needs QEMU and the demo image (`make image`)")


class Session:
    """A session of the demo image in a state directory of its own."""

    def __init__(self, base: Path, *words: str, options: tuple[str, ...] = ()) -> None:
        overrides = ["spec.driver=qemu", f"spec.workbench.args={json.dumps(words)}", *options]
        sets = [word for override in overrides for word in ("--set", override)]
        spec = str(ROOT / "specs/sessions/hello.yaml")
        self.command = [LAUNCHER, "run", spec, "--session-id", "s1", *sets]
        self.environment = {**os.environ, "KENAZ_STATE_DIR": str(base / "s"), "NO_COLOR": "1"}
        self.directory = base / "s/sessions/s1"

    def run(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command, capture_output=True, text=True, timeout=BOUND, env=self.environment, check=False
        )

    def records(self) -> list[dict[str, Any]]:
        lines = (self.directory / "journal.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def path(self) -> list[str]:
        return [record["state"] for record in self.records() if record["kind"] == "entered"]

    def machine(self) -> int:
        """The process id of QEMU, once it is known."""
        deadline = time.monotonic() + BOUND
        while time.monotonic() < deadline:
            try:
                made = [r for r in self.records() if r["kind"] == "acquired" and r["resource"] == "vm"]
            except (OSError, ValueError):
                made = []
            if made:
                return int(made[0]["handle"]["pid"])
            time.sleep(0.02)
        raise AssertionError("no machine was started")

    def left(self) -> set[str]:
        return {path.name for path in self.directory.iterdir()} - {"journal.jsonl", "console.log"}


def test_what_a_guest_writes_is_gone_in_the_next_session(tmp_path: Path) -> None:
    for words, says in (
        (("write:/root/canary", "read:/root/canary"), "/root/canary exists"),
        (("read:/root/canary", "read:/root/canary"), "/root/canary does not exist"),
    ):
        session = Session(tmp_path, *words)
        done = session.run()
        assert (done.returncode, done.stderr) == (0, "")
        assert f"guest says: {says}" in done.stdout
        assert session.path()[-4:] == ["running", "draining", "stopping", "releasing"]
        assert session.left() == set()


def test_a_panic_fails_within_a_second_of_its_line(tmp_path: Path) -> None:
    session = Session(tmp_path, "panic")
    done = session.run()
    assert done.returncode == 1
    assert "failed: guest panicked: " in done.stdout
    assert "Kernel panic - not syncing" in done.stdout
    records = session.records()
    [alarm] = [r for r in records if r["kind"] == "event" and r["type"] == "guest.panic"]
    assert alarm["data"]["pattern"] == "guest.panic"
    killing = next(r for r in records if r["kind"] == "entered" and r["state"] == "killing")
    assert killing["t"] - alarm["t"] < 1
    assert session.left() == set()


def test_a_machine_that_is_killed_while_it_boots_is_named_as_such(tmp_path: Path) -> None:
    session = Session(tmp_path, "idle")
    with subprocess.Popen(
        session.command, stdout=subprocess.PIPE, text=True, env=session.environment
    ) as running:
        pid = session.machine()
        while "connecting" not in session.path():
            time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        out, _ = running.communicate(timeout=BOUND)
    assert running.returncode == 1
    assert "failed: VM exited before it dialled: SIGKILL killed QEMU" in out
    assert session.left() == set()


def test_a_qemu_that_refuses_an_option_is_quoted(tmp_path: Path) -> None:
    wrapper = tmp_path / "qemu"
    wrapper.write_text(
        "#!/bin/sh\n"
        'case "$*" in *KENAZMETA*|*config*) set -- "$@" -bogus ;; esac\n'
        f'exec {shutil.which("qemu-system-x86_64")} "$@"\n'
    )
    wrapper.chmod(0o755)
    done = Session(tmp_path, "idle", options=(f"spec.driverOptions.qemu.binary={wrapper}",)).run()
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("failed: VM did not start")]
    assert "-bogus: invalid option" in line


def test_without_qemu_the_mend_is_told(tmp_path: Path) -> None:
    session = Session(tmp_path, "idle")
    session.environment["PATH"] = str(tmp_path)
    done = session.run()
    assert done.returncode == 3
    assert "the driver qemu cannot run" in done.stderr
    assert done.stderr.count("\n") == 1
