"""One session, from a prepared spec to nothing left behind: what the command and the service call."""

from __future__ import annotations

import os
import platform
import secrets
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from kenaz_drivers.host import identify
from kenaz_engine import __version__
from kenaz_engine.channel.transports import TransportError
from kenaz_engine.channel.transports.local import LocalListener, listen_local
from kenaz_engine.images.transfer import Watch
from kenaz_engine.journal.opening import open_journal
from kenaz_engine.journal.records import FORMAT
from kenaz_engine.journal.writer import Journal
from kenaz_engine.lifecycle.analysis.bound import SWEEP
from kenaz_engine.lifecycle.machine import Event, Machine
from kenaz_engine.lifecycle.recorded import lifecycle_fields
from kenaz_engine.session.activities import Activities
from kenaz_engine.session.control import serve_control
from kenaz_engine.session.directory import (
    ELSEWHERE,
    DirectoryError,
    SessionDirectory,
    create_directory,
    make_socket_directory,
    socket_directory,
    state_home,
)
from kenaz_engine.session.guest import Layout
from kenaz_engine.session.ledger import AcquireTimeout, Ledger, Made
from kenaz_engine.session.prepared import Prepared
from kenaz_engine.session.recorder import LOST, Observer, Recorder, RecordLost
from kenaz_engine.session.reserve import Reserve
from kenaz_engine.session.resources import BY_INTENT, made_directory, made_file
from kenaz_engine.session.runner import Outcome, Runner
from kenaz_engine.session.seams import Connect, Show, unwatched
from kenaz_engine.session.vocabulary import VOCABULARY
from kenaz_engine.shortage import what_to_do
from kenaz_engine.spec.resolve import describe

_RUNTIME_ELSEWHERE = "set XDG_RUNTIME_DIR to another directory"


@dataclass(frozen=True, slots=True)
class Result:
    """What a session came to. `console` are the last lines that the guest printed; `tracebacks` are of
    defects, for `--debug`. `exit_code` is that of the guest's command, where one was run to its end."""

    outcome: Outcome
    directory: Path
    console: tuple[str, ...]
    tracebacks: tuple[str, ...]
    exit_code: int | None = None

    @property
    def journal(self) -> Path:
        """The session's journal."""
        return self.directory / "journal.jsonl"


class Session:
    """A session of a prepared spec. `run` it once."""

    def __init__(
        self,
        prepared: Prepared,
        connect: Connect,
        show: Show,
        observers: tuple[Observer, ...] = (),
        watch: Watch = unwatched,
    ) -> None:
        self._prepared = prepared
        self._connect = connect
        self._show = show
        self._observers = observers
        self._watch = watch
        self._runner: Runner | None = None
        self._early: list[Event] = []

    def request(self, kind: str, by: str) -> None:
        """Asks the session to `end`, or to `abort`."""
        put = self._runner.inbox.put if self._runner else self._early.append
        put(Event(kind, {"by": by}))

    async def run(self) -> Result:
        """Runs to the end. Raises DirectoryError when the session could not even begin."""
        session = self._prepared.resolved.id
        sockets = socket_directory(state_home() / "sessions" / session)
        with closing(_keep_reserve()) as reserve:
            directory = await create_directory(session)
            try:
                layout = Layout(directory.path, sockets, _mark(session))
                return await self._run_in(directory, layout, reserve)
            except DirectoryError:
                reserve.close()
                directory.discard()
                raise
            finally:
                directory.close()

    async def _run_in(self, directory: SessionDirectory, layout: Layout, reserve: Reserve) -> Result:
        journal = _open_journal(directory)
        try:
            recorder = Recorder(journal, self._observers)
            recorder.append("header", _header(self._prepared, layout))
            if recorder.cause:
                raise _cannot_begin(f"{directory.path} cannot be made: {LOST}", recorder.cause)
            by_intent = {**BY_INTENT, "machine": self._prepared.driver.release}
            ledger = Ledger(recorder, by_intent, helps=reserve.helps)
            activities = Activities(
                self._prepared, layout, recorder, self._connect, self._failed, self._show, self._watch
            )
            machine = Machine(self._prepared.lifecycle, VOCABULARY)
            self._runner = Runner(machine, activities.table(), ledger, recorder)
            for event in self._early:
                self._runner.inbox.put(event)
            # A cancel is heard by the runner, which then gives all back and writes the last record.
            with trio.CancelScope(shield=True):
                listener = await _open_control(ledger, layout)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve_control, listener, self._asked, activities.photograph)
                outcome = await self._runner.run()
                nursery.cancel_scope.cancel()
            return Result(
                outcome,
                directory.path,
                activities.console_tail(),
                tuple(self._runner.tracebacks),
                activities.exit_code,
            )
        finally:
            journal.close()

    def _failed(self) -> bool:
        return self._runner is not None and bool(self._runner.snapshot.verdict)

    def _asked(self, command: str) -> None:
        self.request(command, "control")


def _mark(session: str) -> str:
    """What the children of this session are found by, and of no other, ever."""
    return f"{session}-{secrets.token_hex(8)}"


def _keep_reserve() -> Reserve:
    try:
        return Reserve()
    except OSError as exc:
        raise _cannot_begin("a session cannot be begun", exc) from exc


def _open_journal(directory: SessionDirectory) -> Journal:
    try:
        return open_journal(directory.journal)
    except OSError as exc:
        raise _cannot_begin(f"the journal {directory.journal} cannot be made", exc) from exc


async def _open_control(ledger: Ledger, layout: Layout) -> LocalListener:
    """The first thing acquired, so the last given back: a session can be asked for as long as it holds
    anything. Raises DirectoryError."""

    async def make_directory() -> tuple[Made, None]:
        make_socket_directory(layout.sockets)
        return made_directory(layout.sockets), None

    async def make_socket() -> tuple[Made, LocalListener]:
        listener = listen_local(layout.control)
        return Made(made_file(layout.control).handle, listener.aclose), listener

    try:
        if layout.sockets != layout.directory:
            await ledger.acquire("runtime", "directory", {"path": str(layout.sockets)}, make_directory)
        return await ledger.acquire("control", "socket", {"path": str(layout.control)}, make_socket)
    except (OSError, TransportError, RecordLost, AcquireTimeout) as exc:
        await ledger.release_all(trio.current_time() + SWEEP)
        elsewhere = ELSEWHERE if layout.sockets == layout.directory else _RUNTIME_ELSEWHERE
        raise _cannot_begin(f"the control socket {layout.control} cannot be made", exc, elsewhere) from exc


def _cannot_begin(what: str, exc: Exception, elsewhere: str = ELSEWHERE) -> DirectoryError:
    if isinstance(exc, RecordLost) and isinstance(exc.__cause__, OSError):
        what, exc = f"{what}: {LOST}", exc.__cause__
    why = exc.strerror if isinstance(exc, OSError) else str(exc)
    return DirectoryError(f"{what}: {why or exc}", getattr(exc, "hint", "") or what_to_do(exc, elsewhere))


def _header(prepared: Prepared, layout: Layout) -> dict[str, Any]:
    """What a replay, a reap and a reader need to know of this session."""
    capabilities = prepared.capabilities
    return {
        "format": FORMAT,
        "session": prepared.resolved.id,
        "launcher": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "spec": describe(prepared.resolved),
        **lifecycle_fields(prepared.lifecycle),
        "driver": prepared.driver.name,
        "accelerator": capabilities.accelerator,
        "deadline_scale": capabilities.deadline_scale,
        "transport": prepared.transport,
        "notes": list(prepared.notes),
        "directory": os.path.realpath(layout.directory),
        "process": identify(os.getpid()),
        "mark": layout.mark,
    }
