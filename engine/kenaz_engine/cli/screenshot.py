"""`kenaz-launcher screenshot`: what a guest's screen shows, as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

import trio

from kenaz_engine.cli.end import ask_to
from kenaz_engine.cli.failures import SUCCESS, CommandError
from kenaz_engine.cli.sessions import find_directory


def configure(parser: argparse.ArgumentParser) -> None:
    """Which session, and where to."""
    parser.add_argument("id", metavar="ID", help="a session's id, or the beginning of it")
    parser.add_argument("file", metavar="FILE", help="where to put the picture (PNG)")


def run(arguments: argparse.Namespace) -> int:
    """The picture appears whole or not at all."""
    directory = find_directory(arguments.id, living=True)
    target = Path(arguments.file).absolute()
    # The hypervisor writes it, and knows neither our directory nor how to replace a file in one step.
    part = target.with_name(f".{target.name}.part")
    try:
        trio.run(lambda: ask_to(directory, "screenshot", path=str(part)))
        part.replace(target)
    except OSError as error:
        raise CommandError(f"{target}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    print(target)
    return SUCCESS
