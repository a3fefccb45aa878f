"""What the machine's side of a session and its channel's side share. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from kenaz_engine.images.transfer import Notice, Progress

if TYPE_CHECKING:
    from kenaz_engine.channel.harness import HarnessLink

EXIT_GRACE = 1.0
"""Seconds to wait for the machine's exit before a broken stream counts for itself. A process that ends closes
its streams first, and on a busy host takes its time to be gone."""

Connect = Callable[[], Awaitable["HarnessLink"]]
"""How the session reaches its harness, once the guest is there."""

Show = Callable[[str, str], None]
"""Gets what the guest's command wrote: `stdout` or `stderr`, and the text. It may not wait."""


def unwatched(seen: Progress | Notice) -> None:
    """A fetch that nobody watches."""


async def unless_exiting(machine_exited: trio.Event, grace: float = EXIT_GRACE) -> None:
    """The streams of a machine that ends break first. Its end is what happened, and is put elsewhere: then
    this never returns."""
    with trio.move_on_after(grace):
        await machine_exited.wait()
    if machine_exited.is_set():
        await trio.sleep_forever()
