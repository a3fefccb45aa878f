"""The lines of a child that tells one thing a line."""

from __future__ import annotations

from collections import deque

import trio

from kenaz_drivers._common.output import Console


class Lines:
    """What a child prints, line by line, until it ends. No line of it is long."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._chunks = Console(stream)
        self._lines: deque[bytes] = deque()
        self._rest = b""

    def __aiter__(self) -> Lines:
        return self

    async def __anext__(self) -> str:
        while not self._lines:
            *lines, self._rest = (self._rest + await anext(self._chunks)).split(b"\n")
            self._lines.extend(lines)
        return self._lines.popleft().decode("utf-8", "replace").strip()
