"""How commands fail: one line, what to do, and an exit code."""

from __future__ import annotations

import sys

SUCCESS = 0
FAILED = 1
"""The session, or what the command was to do, failed."""
USAGE = 2
"""The command line or a file is invalid."""
ENVIRONMENT = 3
"""This host cannot run it."""
INTERRUPTED = 130
"""The command's own signal ended it, after clean-up."""


class CommandError(Exception):
    """A command cannot go on. One line for the user, what to do about it, and the exit code."""

    def __init__(self, message: str, hint: str = "", code: int = FAILED) -> None:
        super().__init__(message)
        self.hint = hint
        self.code = code


def complain(message: str, hint: str = "") -> None:
    """One line for a person, on standard error. Names of files and the like cannot steer the terminal."""
    from kenaz_engine.cli.output import plain

    print(plain(f"kenaz-launcher: {message}" + (f" ({hint})" if hint else "")), file=sys.stderr)
