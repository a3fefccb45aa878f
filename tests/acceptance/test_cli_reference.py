"""docs/reference/cli.md says what `--help` says."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from kenaz_engine.cli.main import COMMANDS

REFERENCE = Path(__file__).parents[2] / "docs/reference/cli.md"


def sections() -> dict[str, str]:
    """The text below each heading of the second level, by the command that it names."""
    _, *parts = re.split(r"^## ", REFERENCE.read_text("utf-8"), flags=re.MULTILINE)
    return {part.split("\n", 1)[0].strip("`"): part for part in parts}


def parsers(name: str) -> Iterator[argparse.ArgumentParser]:
    """The command's parser, or those of its actions."""
    parser = argparse.ArgumentParser(prog=f"kenaz-launcher {name}")
    import_module(f"kenaz_engine.cli.{name}").configure(parser)
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    yield from actions[0].choices.values() if actions else [parser]


def row(action: argparse.Action) -> str:
    """An argument as a row of a table: how it is written, and its help."""
    value = ""
    if action.nargs != 0:
        value = str(action.metavar or "\\|".join(action.choices or ()))
        value = {"?": f"[{value}]", "+": f"{value}...", "*": f"[{value}...]"}.get(str(action.nargs), value)
    words = " ".join(part for part in (", ".join(action.option_strings), value) if part)
    return f"| `{words}` | {action.help} |"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_has_every_argument_as_its_help_has_it(name: str) -> None:
    section = sections()[name]
    assert f"{COMMANDS[name][:1].upper()}{COMMANDS[name][1:]}." in section
    actions = [action for parser in parsers(name) for action in parser._actions if action.dest != "help"]
    tables = re.findall(r"^\| argument \| meaning \|\n\| --- \| --- \|\n((?:\|.*\n)*)", section, re.MULTILINE)
    assert "".join(tables).splitlines() == [row(action) for action in actions]


def test_the_reference_has_no_command_that_does_not_exist() -> None:
    assert [name for name in sections() if name.islower()] == list(COMMANDS)
