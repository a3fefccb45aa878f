"""Journals as a person names them: by a file, or by a session's id."""

from __future__ import annotations

from pathlib import Path

from kenaz_engine.cli.failures import USAGE, CommandError
from kenaz_engine.cli.sessions import find_directory
from kenaz_engine.journal.reader import Recording, read_journal
from kenaz_engine.journal.records import Damaged


def open_journal(word: str) -> Recording:
    """The journal that `word` names: a file, else the session of that id. Raises CommandError."""
    path = Path(word)
    if "/" not in word and not word.endswith(".jsonl") and not path.exists():
        path = find_directory(word) / "journal.jsonl"
    try:
        return read_journal(path)
    except Damaged as damage:
        raise damaged(path, damage) from None
    except FileNotFoundError:
        raise CommandError(f"{path}: there is no such journal", "is the path right?", USAGE) from None
    except OSError as error:
        raise CommandError(f"{path}: cannot be read: {error.strerror}", "", USAGE) from None


def damaged(path: Path, damage: Damaged) -> CommandError:
    """How a damaged journal is told: by its line."""
    hint = "it was changed after it was written, or is of another version"
    return CommandError(f"{path}:{damage.line}: {damage.message}", hint, USAGE)
