"""Which tools a session may use."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_PATTERN = re.compile(r"[A-Za-z0-9._:/*-]{1,128}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """`pattern` is the one that decided; empty when none allowed the tool."""

    allowed: bool
    pattern: str


class ToolPolicy:
    """Patterns of tool names. `*` stands for any run of characters, dots included: `fs.*` allows `fs.read`
    and `fs.dir.list`, not `fs`. A deny pattern wins over every allow pattern; what nothing allows is denied.

    Raises ValueError for a pattern that is empty, longer than 128, or has characters no tool name has.
    """

    def __init__(self, allow: Iterable[str] = (), deny: Iterable[str] = ()) -> None:
        self.allow = tuple(allow)
        self.deny = tuple(deny)
        for pattern in self.allow + self.deny:
            if not _PATTERN.fullmatch(pattern):
                raise ValueError(f"{pattern!r} is not a pattern of tool names (letters, digits, . _ : / - *)")

    def decide(self, tool: str) -> Verdict:
        """Whether the tool of that name may be used, and by which pattern."""
        for allowed, patterns in ((False, self.deny), (True, self.allow)):
            for pattern in patterns:
                if matches(pattern, tool):
                    return Verdict(allowed, pattern)
        return Verdict(False, "")


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` covers the whole of `name`. Linear, whatever the pattern: names come from the
    guest."""
    first, *parts = pattern.split("*")
    if not parts:
        return first == name
    *middle, last = parts
    if not name.startswith(first) or not name.endswith(last):
        return False
    at, end = len(first), len(name) - len(last)
    for part in middle:
        found = name.find(part, at, end) if at <= end else -1
        if found < 0:
            return False
        at = found + len(part)
    return at <= end
