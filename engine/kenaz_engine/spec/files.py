"""The one place where a file of the user's is read."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import BinaryIO

from kenaz_engine.spec.faults import Fault, InvalidFile, Place
from kenaz_engine.spec.yamlfile import MAX_BYTES, decode

STDIN = "<stdin>"
"""What a file read from stdin is called in messages."""

# As text and at the top level, so that it is seen also where the rest of the file cannot be parsed.
_API_VERSION = re.compile(
    rb"""^(?:\xef\xbb\xbf)?(?:\{[ \t]*)?["']?apiVersion["']?[ \t]*:[ \t]*["']?kenaz\.dev/""", re.MULTILINE
)


def is_ours(path: str) -> bool:
    """False for a file at `path` that can be read and does not say `apiVersion: kenaz.dev/...`."""
    try:
        with Path(path).open("rb") as file:
            return _API_VERSION.search(file.read(MAX_BYTES)) is not None
    except (OSError, ValueError):
        return True


def read(path: str, stdin: BinaryIO | None = None) -> tuple[str, str]:
    """The text of the file at `path`, or of stdin for `-`, and its name for messages.

    Raises InvalidFile when it is not there, cannot be read, is longer than 1 MiB, or is not UTF-8.
    """
    if path == "-":
        stream = sys.stdin.buffer if stdin is None else stdin
        return decode(stream.read(MAX_BYTES + 1), STDIN), STDIN
    try:
        with Path(path).open("rb") as file:
            return decode(file.read(MAX_BYTES + 1), path), path
    except (FileNotFoundError, NotADirectoryError):
        message, hint = "does not exist", "is the path right?"
    except IsADirectoryError:
        message, hint = "is a directory", "name the file in it"
    except PermissionError:
        message, hint = "may not be read", "look at its permissions"
    except OSError as error:
        message, hint = f"cannot be read: {error.strerror}", ""
    except ValueError:  # a NUL in the path
        message, hint = "is not a path", ""
    raise InvalidFile([Fault(Place(path), "", message, hint)])
