"""Whole sessions that are cancelled from outside, at one step after the other: nothing may be left."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from kenaz_engine.journal.reader import read_journal
from kenaz_engine.session.launch import Session
from kenaz_engine.session.leftovers import leftovers
from kenaz_engine.session.prepare import prepare
from kenaz_engine.spec.resolve import load_session

SPEC = """
    apiVersion: kenaz.dev/v1
    kind: Session
    metadata: {name: cancelled, id: s1}
    spec:
      driver: simulated
      driverOptions: {simulated: {script: {ready: 0, dial: 0, powerdown: 0}}}
"""


class QuickHarness:
    """Ends the session at once."""

    async def run(self) -> None:
        await trio.lowlevel.checkpoint()

    def open(self, session: str, build: str, capabilities: Sequence[str]) -> None:
        """Takes note of nothing."""

    @property
    def has_room(self) -> bool:
        return False

    @property
    def resumable(self) -> bool:
        return False

    def put(self, payload: bytes) -> None:
        raise AssertionError("there is no room")

    def push(self) -> None: ...

    def took(self, size: int) -> None: ...

    async def send(self, payload: bytes) -> None:
        await trio.lowlevel.checkpoint()

    async def receive(self) -> bytes | None:
        await trio.lowlevel.checkpoint()
        return None

    async def aclose(self, outcome: str) -> None:
        await trio.lowlevel.checkpoint()


class CancelAt(trio.abc.Instrument):
    """Cancels a scope when so many steps of tasks have been made."""

    def __init__(self, scope: trio.CancelScope, step: int) -> None:
        self.steps = 0
        self._scope = scope
        self._step = step

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += 1
        if self.steps == self._step:
            self._scope.cancel()


async def run_cancelled_at(step: int) -> tuple[int, Any]:
    """Steps that were made, and what the session returned, if it did."""
    resolved = load_session(textwrap.dedent(SPEC), "spec.yaml", environment={})
    prepared = await prepare(resolved)

    async def connect() -> QuickHarness:
        await trio.lowlevel.checkpoint()
        return QuickHarness()

    result = None
    with trio.CancelScope() as scope:
        instrument = CancelAt(scope, step)
        trio.lowlevel.add_instrument(instrument)
        try:
            with trio.fail_after(30):
                result = await Session(prepared, connect, lambda stream, text: None).run()
        finally:
            trio.lowlevel.remove_instrument(instrument)
    return instrument.steps, result


def test_a_session_that_is_cancelled_at_any_step_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(os, "fsync", lambda file: None)
    state = tmp_path / "whole"
    monkeypatch.setenv("KENAZ_STATE_DIR", str(state))
    steps, result = trio.run(run_cancelled_at, 0)
    assert result is not None
    assert result.outcome.success
    ways = set()
    for step in range(1, steps, 3):
        state = tmp_path / str(step)
        monkeypatch.setenv("KENAZ_STATE_DIR", str(state))
        trio.run(run_cancelled_at, step)
        directory = state / "sessions/s1"
        if not directory.exists():
            continue
        assert {path.name for path in directory.iterdir()} <= {"journal.jsonl", "console.log"}, step
        recording = read_journal(directory / "journal.jsonl")
        assert recording.end is not None, step
        assert recording.end["left"] == [], step
        assert leftovers(directory / "journal.jsonl") == [], step
        ways.add(tuple(r["state"] for r in recording.records if r["kind"] == "entered"))
    # The cancels hit states all along the way.
    assert len(ways) >= 5
