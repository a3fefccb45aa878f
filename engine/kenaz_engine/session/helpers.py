"""Processes that a machine cannot do without, as its driver plans them: started before it, ended after it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio

from kenaz_drivers.contract import MARK, DriverError, Helper
from kenaz_drivers.host import ChildProcess, LogTail, describe_end, open_pipe, spawn
from kenaz_engine.session.ledger import Made
from kenaz_engine.session.runner import Work

READY = 10.0
"""Seconds for a helper's sockets to be there. vhost-device-vsock takes 0.02."""

_LOOK = 0.005
"""Seconds between two looks for them: no helper tells when it is ready."""

TERM_GRACE = 0.5
LOG_GRACE = 0.5
"""Seconds for the last lines of a helper that has ended to be read."""


class Supervised:
    """A helper that has been started."""

    def __init__(self, helper: Helper, child: ChildProcess) -> None:
        self.helper = helper
        self.ended = ""
        """How it ended, in words; empty while it runs."""
        self.gone = trio.Event()
        self.child = child
        self._log = LogTail()

    async def own(self, log: trio.abc.ReceiveStream, *, task_status: trio.TaskStatus[None]) -> None:
        """Reads what it says and waits for its end."""
        task_status.started()
        try:
            async with log, trio.open_nursery() as nursery:
                nursery.start_soon(self._log.read, log)
                code = await self.child.wait()
                nursery.cancel_scope.deadline = trio.current_time() + LOG_GRACE
        finally:
            # Also where the session ends around it: then it is ended at its release.
            with trio.CancelScope(shield=True):
                await self.child.end((signal.SIGTERM, TERM_GRACE))
        self.ended = describe_end(self.helper.name, code, self._log.lines())
        self.gone.set()

    async def ready(self) -> None:
        """Returns when all of its sockets are there. Raises DriverError when it ended before, whatever its
        exit code: there are programs that take a wrong option for success."""
        with trio.move_on_after(READY):
            while not all(os.path.lexists(path) for path in self.helper.sockets):
                if self.gone.is_set():
                    raise DriverError(
                        self.ended, hint="`kenaz-launcher plan` prints the command to try by hand"
                    )
                await trio.sleep(_LOOK)
            return
        raise DriverError(f"{self.helper.name} made no socket within {READY:g} s")

    async def release(self) -> None:
        """Ends it, and removes what it leaves."""
        await self.child.end((signal.SIGTERM, TERM_GRACE))
        await self.gone.wait()
        for path in self.helper.sockets:
            Path(path).unlink(missing_ok=True)


async def start_helper(work: Work, helper: Helper, mark: str, died: Callable[[str], None]) -> str:
    """Starts the helper as a resource of the session, waits until it is ready, and returns the resource's
    name. It is found by `mark`, as machines are. `died` is called with a line when it ends while it is still
    needed. Raises DriverError."""
    resource = f"helper.{helper.name}"

    async def make() -> tuple[Made, Supervised]:
        with open_pipe() as (log, theirs):
            child = spawn(
                helper.argv,
                stdout=theirs,
                stderr=theirs,
                env={**helper.environment, MARK: mark},
                no_new_privileges=True,
            )
        supervised = Supervised(helper, child)
        await work.start(partial(supervised.own, log))
        handle = {**child.handle, "sockets": list(helper.sockets)}
        return Made(handle, partial(_release, supervised)), supervised

    releasing = False

    async def _release(supervised: Supervised) -> None:
        nonlocal releasing
        releasing = True
        await supervised.release()

    intent = {"argv": list(helper.argv), "mark": mark, "sockets": list(helper.sockets)}
    supervised = await work.ledger.acquire(resource, "process", intent, make, uses=("socket",))
    await supervised.ready()

    async def watch(*, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        await supervised.gone.wait()
        if not releasing:
            died(supervised.ended)

    await work.start(watch)
    return resource
