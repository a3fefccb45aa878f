"""`kenaz-launcher end`: asks a session to end."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import trio

from kenaz_engine.cli.failures import FAILED, SUCCESS, CommandError
from kenaz_engine.cli.sessions import find_directory
from kenaz_engine.session.control import ControlError, ask
from kenaz_engine.session.directory import is_alive, see, socket_directory
from kenaz_engine.spec.units import format_duration, parse_duration

WAIT = 300.0
"""Seconds that a bare `--wait` waits: more than the shipped lifecycles take under emulation."""

_POLL = 0.05


def configure(parser: argparse.ArgumentParser) -> None:
    """Which session, how hard, and whether to wait for it."""
    parser.add_argument("id", metavar="ID", help="the session's id, or the beginning of it")
    parser.add_argument("--abort", action="store_true", help="cut it short: do not wait for the guest")
    parser.add_argument(
        "--wait",
        nargs="?",
        type=_patience,
        const=WAIT,
        metavar="SECONDS",
        help=f"return when it has ended, or fail after SECONDS (default: {WAIT:.0f})",
    )


def run(arguments: argparse.Namespace) -> int:
    """Asks over the session's control socket."""
    directory = find_directory(arguments.id, living=True)
    command = "abort" if arguments.abort else "end"
    if not is_alive(directory):
        raise _not_running(directory)
    try:
        trio.run(ask, socket_directory(directory) / "control.sock", command)
    except ControlError as error:
        if not is_alive(directory):
            raise _not_running(directory) from error
        raise CommandError(f"session {directory.name} cannot be asked to {command}: {error}") from error
    if arguments.wait is None:
        print(f"{directory.name}: asked to {command}")
        return SUCCESS
    return _await_end(directory, arguments.wait)


def _await_end(directory: Path, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while is_alive(directory):
        if time.monotonic() >= deadline:
            raise CommandError(
                f"session {directory.name} has not ended within {format_duration(seconds)}",
                f"`kenaz-launcher logs {directory.name}` shows what it waits for; --abort cuts it short",
            )
        time.sleep(_POLL)
    recording = see(directory).recording
    end = recording.end if recording else None
    if end is None:
        raise _not_running(directory)
    why = end.get("verdict") or end.get("internal") or "something was left behind"
    print(f"{directory.name}: {'succeeded' if end.get('success') else f'failed: {why}'}")
    return SUCCESS


def _not_running(directory: Path) -> CommandError:
    if see(directory).status == "dead":
        hint = f"`kenaz-launcher logs {directory.name}` shows how far it came"
        return CommandError(f"session {directory.name} is dead: its launcher is gone", hint, FAILED)
    return CommandError(f"session {directory.name} has ended already", "", FAILED)


def _patience(text: str) -> float:
    """Seconds, as a number or a duration."""
    try:
        return float(text) if text.replace(".", "", 1).isdecimal() else parse_duration(text)
    except ValueError:
        message = f"{text!r} is no time; write --wait=60 or --wait=2m, or put the id before --wait"
        raise argparse.ArgumentTypeError(message) from None
