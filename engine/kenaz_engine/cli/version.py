"""`kenaz-launcher version`."""

from __future__ import annotations

import argparse

from kenaz_engine import __version__


def configure(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(arguments: argparse.Namespace) -> int:
    """Prints the version."""
    print(f"kenaz-launcher {__version__}")
    return 0
