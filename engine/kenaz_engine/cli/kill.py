"""`kenaz-launcher kill`: ends sessions now, also ones that hang, and gives back what they held."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from kenaz_drivers.contract import DriverError
from kenaz_drivers.host import terminate
from kenaz_engine.cli.end import ask_to, has_ended
from kenaz_engine.cli.failures import FAILED, SUCCESS, CommandError, complain
from kenaz_engine.cli.reap import failures, lines
from kenaz_engine.cli.sessions import configure_ids, living_directories
from kenaz_engine.session.directory import holder_of, is_alive, see
from kenaz_engine.session.reap import BOUND, Reaped, reap

GRACE = 10.0
"""Seconds that a session has to abort before its launcher is killed."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Which sessions."""
    configure_ids(parser)


def run(arguments: argparse.Namespace) -> int:
    """Asks each to abort; one that does not is ended by the death of its launcher, and reaped."""
    directories = living_directories(arguments)
    if not directories:
        print("no session runs")
    asked = trio.run(_ask_all, directories)
    deadline = time.monotonic() + GRACE
    failed = False
    for directory in directories:
        try:
            failed |= not _end(directory, deadline if directory in asked else 0.0)
        except CommandError as error:
            failed = True
            complain(str(error), error.hint)
    return FAILED if failed else SUCCESS


async def _ask_all(directories: list[Path]) -> set[Path]:
    """Those that have heard. All are asked at once, so that many that hang take no longer than one."""
    heard: set[Path] = set()

    async def one(directory: Path) -> None:
        with suppress(CommandError):
            await ask_to(directory, "abort")
            heard.add(directory)

    async with trio.open_nursery() as nursery:
        for directory in directories:
            nursery.start_soon(one, directory)
    return heard


def _end(directory: Path, deadline: float) -> bool:
    """Says what came of it. Raises CommandError when it could not be ended."""
    name = directory.name
    if see(directory).status == "ended":
        raise CommandError(f"session {name} has ended already")
    if deadline and has_ended(directory, deadline) and see(directory).status == "ended":
        print(f"{name}: aborted")
        return True
    if is_alive(directory):
        _kill_holder(directory)
    result = trio.run(_reap, directory)
    for line in lines(result):
        print(line)
    return not failures([result])


def _kill_holder(directory: Path) -> None:
    name = directory.name
    holder = holder_of(directory)
    if holder is None:
        raise CommandError(f"session {name} has only just begun", "try again")
    try:
        trio.run(_kill, holder)
    except DriverError as error:
        raise CommandError(f"session {name} cannot be ended: {error}", error.hint) from error
    print(f"{name}: process {holder['pid']}, which held it, did not answer and was killed")


async def _kill(holder: Mapping[str, Any]) -> None:
    await terminate(holder, alone=True)


async def _reap(directory: Path) -> Reaped:
    return await reap(directory, trio.current_time() + BOUND)
