"""A client in Go, written from docs/reference/vsock-protocol.md alone: over the conformance vectors, and as
each of the launcher's two peers in a session."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SPEC = Path(__file__).parents[2] / "specs/sessions/hello.yaml"
SECONDS = 60

DRIVER = '''\
"""Runs another program in the agent's place."""
import os
from dataclasses import replace

from kenaz_drivers.process.driver import ProcessDriver


class OtherGuest(ProcessDriver):
    name = "otherguest"

    def plan(self, request):
        return super().plan(replace(request, agent=(os.environ["OTHER_GUEST"], *request.agent[1:])))
'''


def launch(directory: Path, driver: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    program = [
        sys.executable,
        "-m",
        "kenaz_engine.cli.main",
        "run",
        str(SPEC),
        "--set",
        f"spec.driver={driver}",
    ]
    environment = {**os.environ, "XDG_STATE_HOME": str(directory), **variables}
    return subprocess.run(
        [*program, "--session-id", "go", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def reported(directory: Path) -> list[tuple[str, str, str]]:
    text = (directory / "kenaz/sessions/go/journal.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    channel = [record for record in records if record["kind"] == "channel"]
    return [(r["direction"], r["message"], r["outcome"]) for r in channel]


def test_the_vectors_hold_for_it(go: Callable[[str, str], None]) -> None:
    go("go_client", "vet .")
    go("go_client", "test -count=1 .")


def test_it_is_the_harness_of_a_session(go_program: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "h"
    with subprocess.Popen(
        [str(go_program("go_client")), "harness", str(path)], stdout=subprocess.PIPE, text=True
    ) as harness:
        while not path.exists():
            assert harness.poll() is None
        done = launch(tmp_path, "process", "--harness", f"unix:{path}")
        said, _ = harness.communicate(timeout=SECONDS)
    assert (harness.returncode, done.returncode, done.stderr) == (0, 0, ""), said + done.stdout
    lines = said.splitlines()
    assert lines[0] == "session.open go 2026.11 [prompts tools]"
    assert [line.split()[0] for line in lines] == [
        *("session.open", "prompt", "tool.invoke", "prompt", "session.close")
    ]
    assert "fs.read answered; fs.delete refused (denied)" in lines[3]
    assert lines[-1].endswith("success")
    assert "nothing left behind" in done.stdout


def test_it_is_the_guest_of_a_session(go_program: Callable[[str], Path], tmp_path: Path) -> None:
    plugin = tmp_path / "otherguest-1.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: otherguest\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text("[kenaz.drivers]\notherguest = otherguest:OtherGuest\n")
    (tmp_path / "otherguest.py").write_text(DRIVER)
    guest = str(go_program("go_client"))
    done = launch(tmp_path, "otherguest", PYTHONPATH=str(tmp_path), OTHER_GUEST=guest)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "guest says: two" in done.stdout
    assert reported(tmp_path) == [
        ("from-guest", "hello", "taken"),
        ("to-guest", "welcome", "sent"),
        ("from-guest", "ping", "taken"),
        ("to-guest", "pong", "sent"),
        ("from-guest", "tool.invoke", "denied"),
        ("to-guest", "tool.error", "sent"),
        ("from-guest", "tool.invoke", "relayed"),
        ("from-harness", "tool.result", "relayed"),
        ("from-guest", "prompt", "relayed"),
        ("from-harness", "prompt.result", "relayed"),
        ("from-guest", "prompt", "relayed"),
        ("from-harness", "prompt.result", "relayed"),
        ("to-guest", "drain", "sent"),
        ("from-guest", "bye", "taken"),
    ]
    console = (tmp_path / "kenaz/sessions/go/console.log").read_text()
    assert "go_client: welcome <nil> [prompts tools]" in console
    assert "go_client: tool.error denied <nil>" in console
    assert "go_client: tool.result" in console
