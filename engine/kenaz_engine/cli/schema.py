"""`kenaz-launcher schema`: what editors complete from."""

from __future__ import annotations

import argparse
import sys
from importlib import resources

from kenaz_engine.cli.failures import SUCCESS

KINDS = ("session", "lifecycle", "scenario", "catalog", "journal")


def configure(parser: argparse.ArgumentParser) -> None:
    """Which one, and in which form."""
    parser.add_argument(
        "kind",
        choices=KINDS,
        metavar="KIND",
        help="session, lifecycle, scenario, catalog, or journal (one record)",
    )
    parser.add_argument("--path", action="store_true", help="print where the schema's file is instead")


def run(arguments: argparse.Namespace) -> int:
    """Prints the schema as it is shipped, or its path."""
    source = resources.files("kenaz_specs") / "schemas" / f"{arguments.kind}.schema.json"
    sys.stdout.write(f"{source}\n" if arguments.path else source.read_text("utf-8"))
    return SUCCESS
