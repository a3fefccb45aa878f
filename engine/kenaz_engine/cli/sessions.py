"""Sessions as a person names them: by an id, or by the beginning of one."""

from __future__ import annotations

import difflib
from pathlib import Path

from kenaz_engine.cli.failures import CommandError
from kenaz_engine.session.directory import is_alive, state_home

_ASIDE = "~"
"""In the name of a directory that was set aside for a new session of the same id."""


def find_directory(word: str, *, living: bool = False) -> Path:
    """The directory of the session that `word` names. With `living`, one that runs goes before others.

    A word that is the beginning of several ids is refused; CommandError lists them.
    """
    home = state_home() / "sessions"
    names = sorted(path.name for path in home.iterdir() if path.is_dir()) if home.is_dir() else []
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
