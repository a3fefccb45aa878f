"""Lifecycles as a person names them: by a shipped name, or by a file."""

from __future__ import annotations

from pathlib import Path

from kenaz_engine.cli.failures import USAGE, CommandError
from kenaz_engine.cli.specfiles import kind_of, load_anywhere
from kenaz_engine.lifecycle.deadlines import with_deadlines
from kenaz_engine.lifecycle.loader import load_lifecycle
from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.session.lifecycles import find_lifecycle, is_path, shipped_lifecycle, shipped_lifecycles
from kenaz_engine.session.vocabulary import VOCABULARY
from kenaz_engine.spec.files import read
from kenaz_engine.spec.schema import suggestion


def open_lifecycle(what: str) -> Lifecycle:
    """The lifecycle that `what` names: a shipped one, a lifecycle's file, a session's, or `-` for stdin.

    A session's lifecycle comes with the session's own deadlines. Raises CommandError and InvalidFile.
    """
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
