"""The points between which the launcher may be killed while it changes the store.

Nothing happens at them, unless a test wants a process to die there.
"""

from __future__ import annotations

from collections.abc import Callable

POINTS = (
    "part opened",
    "part written",
    "validators written",
    "part complete",
    "part checked",
    "part unpacked",
    "blob sealed",
    "blob named",
    "ref written",
    "ref named",
    "blob set aside",
    "blob removed",
)


def _pass(point: str) -> None:
    """Goes on."""


reached: Callable[[str], None] = _pass
"""Called with one of POINTS."""
