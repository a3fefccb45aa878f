"""Sessions as a person names them: by an id, or by the beginning of one."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

from kenaz_engine.cli.failures import USAGE, CommandError
from kenaz_engine.session.directory import is_alive, session_directories, sessions_home

_ASIDE = "~"
"""In the name of a directory that was set aside for a new session of the same id."""


def configure_ids(parser: argparse.ArgumentParser) -> None:
    """Which of the sessions that live."""
    parser.add_argument("id", metavar="ID", nargs="*", help="a session's id, or the beginning of it")
    parser.add_argument("--all", action="store_true", help="every session of yours that runs")


def living_directories(arguments: argparse.Namespace) -> list[Path]:
    """What `configure_ids` was given, as directories, each once. With `--all` there may be none.

    Raises CommandError for a word that names none or several, before anything is done to any.
    """
    if bool(arguments.id) == arguments.all:
        raise CommandError("say which sessions, or --all", "`kenaz-launcher ps` lists those that run", USAGE)
    if arguments.all:
        return [path for path in session_directories() if is_alive(path)]
    return list(dict.fromkeys(find_directory(word, living=True) for word in arguments.id))


def find_directory(word: str, *, living: bool = False) -> Path:
    """The directory of the session that `word` names. With `living`, one that runs goes before others.

    A word that is the beginning of several ids is refused; CommandError lists them.
    """
    home = sessions_home()
    names = [path.name for path in session_directories()]
    if word in names:
        return home / word
    matches = [name for name in names if word and name.startswith(word) and _ASIDE not in name]
    if living and len(matches) > 1:
        matches = [name for name in matches if is_alive(home / name)] or matches
    if len(matches) == 1:
        return home / matches[0]
    if matches:
        raise CommandError(
            f"{word!r} is the beginning of several sessions", f"which one: {_listed(matches)}?"
        )
    near = difflib.get_close_matches(word, names, 3)
    hint = f"did you mean {_listed(near)}?" if near else "`kenaz-launcher ps --all` lists all there are"
    raise CommandError(f"there is no session {word!r}", hint)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
