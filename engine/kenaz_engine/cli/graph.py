"""`kenaz-launcher graph`: a picture of a lifecycle."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kenaz_engine.cli.failures import SUCCESS, USAGE, CommandError
from kenaz_engine.cli.output import Paint, columns
from kenaz_engine.cli.specfiles import kind_of, load_anywhere
from kenaz_engine.lifecycle.deadlines import with_deadlines
from kenaz_engine.lifecycle.diagram import dot, mermaid
from kenaz_engine.lifecycle.diagram import text as drawn
from kenaz_engine.lifecycle.loader import load_lifecycle
from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.session.lifecycles import find_lifecycle, is_path, shipped_lifecycle, shipped_lifecycles
from kenaz_engine.session.vocabulary import VOCABULARY
from kenaz_engine.spec.files import read
from kenaz_engine.spec.schema import suggestion

WIDTH = 100
"""Columns of a drawing that goes to no terminal."""


def configure(parser: argparse.ArgumentParser) -> None:
    """What to draw, and how."""
    parser.add_argument(
        "what",
        metavar="WHAT",
        help="a shipped lifecycle's name, the file of a lifecycle or session, or - for stdin",
    )
    parser.add_argument(
        "--format",
        choices=("text", "mermaid", "dot"),
        default="text",
        help="text for a terminal, mermaid for Markdown, dot for Graphviz (default: text)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Draws the lifecycle, also one that analysis would refuse."""
    lifecycle = _lifecycle(arguments.what)
    match arguments.format:
        case "mermaid":
            picture = mermaid(lifecycle)
        case "dot":
            picture = dot(lifecycle)
        case _:
            picture = drawn(lifecycle, width=columns() or WIDTH, colour=Paint(sys.stdout).on)
    print(picture, end="" if picture.endswith("\n") else "\n")
    return SUCCESS


def _lifecycle(what: str) -> Lifecycle:
    """A session's lifecycle comes with the session's own deadlines."""
    if what in shipped_lifecycles():
        return shipped_lifecycle(what)
    if what != "-" and not is_path(what) and not Path(what).exists():
        known = shipped_lifecycles()
        hint = suggestion(what, known) or f"shipped are {', '.join(known)}"
        raise CommandError(f"there is no lifecycle and no file {what!r}", hint, USAGE)
    text, file = read(what)
    if kind_of(text, file) == "Lifecycle":
        return load_lifecycle(text, file)
    resolved, _ = load_anywhere(text, file)
    return with_deadlines(find_lifecycle(resolved), VOCABULARY, resolved.timeouts, 1.0)
