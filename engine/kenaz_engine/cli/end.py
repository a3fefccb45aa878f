"""`kenaz-launcher end`: asks sessions to end."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import trio

from kenaz_engine.cli.failures import FAILED, SUCCESS, CommandError, complain
from kenaz_engine.cli.sessions import configure_ids, living_directories
from kenaz_engine.session.control import ControlError, ask
from kenaz_engine.session.directory import is_alive, see, socket_directory
from kenaz_engine.spec.units import format_duration, parse_duration

WAIT = 300.0
"""Seconds that a bare `--wait` waits: more than the shipped lifecycles take under emulation."""

_POLL = 0.05


def configure(parser: argparse.ArgumentParser) -> None:
    """Which sessions, how hard, and whether to wait for them."""
    configure_ids(parser)
    parser.add_argument("--abort", action="store_true", help="cut it short: do not wait for the guest")
    parser.add_argument(
        "--wait",
        nargs="?",
        type=patience,
        const=WAIT,
        metavar="SECONDS",
        help=f"return when it has ended, or fail after SECONDS (default: {WAIT:.0f})",
    )


def run(arguments: argparse.Namespace) -> int:
    """Asks each over its control socket, then waits for all. One that cannot be asked stops no other."""
    command = "abort" if arguments.abort else "end"
    directories = living_directories(arguments)
    if not directories:
        print("no session runs")
    failed = False
    asked: list[Path] = []
    for directory in directories:
        try:
            trio.run(ask_to, directory, command)
        except CommandError as error:
            failed = True
            complain(str(error), error.hint)
        else:
            asked.append(directory)
            if arguments.wait is None:
                print(f"{directory.name}: asked to {command}")
    if arguments.wait is not None:
        deadline = time.monotonic() + arguments.wait
        for directory in asked:
            try:
                _await_end(directory, deadline, arguments.wait)
            except CommandError as error:
                failed = True
                complain(str(error), error.hint)
    return FAILED if failed else SUCCESS


async def ask_to(directory: Path, command: str, /, **arguments: str) -> None:
    """Has the session hear the command. Raises CommandError."""
    if not is_alive(directory):
        raise _not_running(directory)
    try:
        await ask(socket_directory(directory) / "control.sock", command, **arguments)
    except ControlError as error:
        if not is_alive(directory):
            raise _not_running(directory) from error
        raise CommandError(
            f"session {directory.name} cannot be asked to {command}: {error}",
            f"`kenaz-launcher kill {directory.name}` ends it all the same",
        ) from error


def has_ended(directory: Path, deadline: float) -> bool:
    """Waits until nobody holds the session's lock, or until `deadline` (time.monotonic)."""
    while is_alive(directory):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL)
    return True


def _await_end(directory: Path, deadline: float, seconds: float) -> None:
    if not has_ended(directory, deadline):
        raise CommandError(
            f"session {directory.name} has not ended within {format_duration(seconds)}",
            f"`kenaz-launcher logs {directory.name}` shows what it waits for; --abort cuts it short",
        )
    recording = see(directory).recording
    end = recording.end if recording else None
    if end is None:
        raise _not_running(directory)
    why = end.get("verdict") or end.get("internal") or "something was left behind"
    print(f"{directory.name}: {'succeeded' if end.get('success') else f'failed: {why}'}")


def _not_running(directory: Path) -> CommandError:
    if see(directory).status in ("dead", "damaged"):
        hint = f"`kenaz-launcher reap {directory.name}` gives back what it held"
        return CommandError(f"session {directory.name} is dead: its launcher is gone", hint, FAILED)
    return CommandError(f"session {directory.name} has ended already", "", FAILED)


def patience(text: str) -> float:
    """Seconds, as a number or a duration."""
    try:
        return float(text) if text.replace(".", "", 1).isdecimal() else parse_duration(text)
    except ValueError:
        message = f"{text!r} is no time; write --wait=60 or --wait=2m, or put the id before --wait"
        raise argparse.ArgumentTypeError(message) from None
