"""Files of the user's, of whichever kind they are. Imports little."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from kenaz_engine.session.check import telling_all
from kenaz_engine.spec.faults import Fault, InvalidFile
from kenaz_engine.spec.resolve import ResolvedSession, load_session
from kenaz_engine.spec.schema import suggestion
from kenaz_engine.spec.yamlfile import dotted, parse, shorten

KINDS = ("Session", "Lifecycle", "Scenario", "Catalog")


def kind_of(text: str, file: str) -> str:
    """Which of KINDS the text is. Raises InvalidFile."""
    document = parse(text, file)
    data = document.data
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind in KINDS:
        return str(kind)
    if kind is None:
        fault = Fault(
            document.place(), "", "`kind` is missing", " or ".join(f"add `kind: {k}`" for k in KINDS)
        )
    else:
        message = f"must be {', '.join(KINDS[:-1])} or {KINDS[-1]}, not `{shorten(str(kind))}`"
        hint = suggestion(str(kind).capitalize(), KINDS)
        fault = Fault(document.place(("kind",)), dotted(("kind",)), message, hint)
    raise InvalidFile([fault])


def load_anywhere(text: str, file: str) -> tuple[ResolvedSession, list[Fault]]:
    """A session that need not be run here: a variable that is not set is a warning. Raises InvalidFile."""
    environment = _Environment()
    with telling_all():
        resolved = load_session(text, file, environment=environment)
    return resolved, list(_unset(resolved, environment.unset))


class _Environment(dict[str, str]):
    """Our environment, with every variable set: a file is not wrong because of where it is looked at."""

    def __init__(self) -> None:
        super().__init__(os.environ)
        self.unset: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self.unset.add(name)
        return super().get(name, "")


def _unset(resolved: ResolvedSession, names: set[str]) -> Iterator[Fault]:
    for key in resolved.workbench.env if names else ():
        path = ("spec", "workbench", "env", key)
        origin = resolved.origins.get(dotted(path), "")
        for name in origin.removeprefix("environment ").split(", "):
            if name in names:
                message, hint = f"the variable `{name}` is not set here", "export it before the run"
                yield Fault(resolved.place(*path), dotted(path), message, hint, level="warning")
