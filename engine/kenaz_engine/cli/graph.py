"""`kenaz-launcher graph`: a picture of a lifecycle, and of the way that a session took through it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kenaz_engine.cli.failures import ENVIRONMENT, SUCCESS, USAGE, CommandError
from kenaz_engine.cli.journals import damaged, open_journal
from kenaz_engine.cli.lifecycles import open_lifecycle
from kenaz_engine.cli.output import Paint, columns
from kenaz_engine.journal.records import Damaged
from kenaz_engine.lifecycle.diagram import dot, mermaid
from kenaz_engine.lifecycle.diagram import text as drawn
from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.lifecycle.visits import Visit, visits

WIDTH = 100
"""Columns of a drawing that goes to no terminal."""

DRAWING = 30.0
"""Seconds that Graphviz may take."""


def configure(parser: argparse.ArgumentParser) -> None:
    """What to draw, and how."""
    parser.add_argument(
        "what",
        metavar="WHAT",
        nargs="?",
        help="a shipped lifecycle's name, the file of a lifecycle or session, or - for stdin",
    )
    parser.add_argument(
        "--journal",
        metavar="JOURNAL",
        help="instead: the lifecycle of a journal (a file, or a session's id) and the way taken, with times",
    )
    parser.add_argument(
        "--format",
        choices=("text", "mermaid", "dot", "svg"),
        default="text",
        help="text for a terminal, mermaid for Markdown, dot for Graphviz, svg drawn by it (default: text)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Draws the lifecycle, also one that analysis would refuse."""
    if (arguments.what is None) == (arguments.journal is None):
        raise CommandError("what is to be drawn?", "name a lifecycle, or a journal with --journal", USAGE)
    lifecycle, path = (
        _recorded(arguments.journal) if arguments.journal else (open_lifecycle(arguments.what), ())
    )
    match arguments.format:
        case "mermaid":
            picture = mermaid(lifecycle, path)
        case "dot":
            picture = dot(lifecycle, path)
        case "svg":
            picture = _svg(dot(lifecycle, path))
        case _:
            picture = drawn(lifecycle, path, width=columns() or WIDTH, colour=Paint(sys.stdout).on)
    print(picture, end="")
    return SUCCESS


def _recorded(word: str) -> tuple[Lifecycle, Sequence[Visit]]:
    from kenaz_engine.replay.replayer import MISSHAPEN, check_shape, recorded_lifecycle

    recording = open_journal(word)
    try:
        lifecycle = recorded_lifecycle(recording)
        try:
            return lifecycle, visits(recording.records)
        except MISSHAPEN:
            for record in recording.records:
                check_shape(record)
            raise
    except Damaged as damage:
        raise damaged(recording.path, damage) from None


def _svg(source: str) -> str:
    import shutil
    import subprocess

    program = shutil.which("dot")
    if program is None:
        hint = "install the package graphviz, or take --format dot and draw it elsewhere"
        raise CommandError("svg is drawn by Graphviz, which is not installed", hint, ENVIRONMENT)
    try:
        done = subprocess.run(
            [program, "-Tsvg"], input=source, capture_output=True, text=True, timeout=DRAWING, check=True
        )
    except subprocess.SubprocessError as failure:
        raise CommandError(f"Graphviz could not draw it: {failure}", "", ENVIRONMENT) from None
    return done.stdout
