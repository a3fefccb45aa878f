"""`kenaz-launcher run`: a session from its spec to its end, as a person or a program watches it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import trio

from kenaz_drivers.host import read_secrets
from kenaz_engine.cli.failures import ENVIRONMENT, FAILED, INTERRUPTED, SUCCESS, USAGE, CommandError
from kenaz_engine.cli.live import JsonLines, Live, View
from kenaz_engine.session.check import telling_all
from kenaz_engine.session.directory import DirectoryError
from kenaz_engine.session.launch import Result, Session
from kenaz_engine.session.leftovers import leftovers
from kenaz_engine.session.prepare import prepare
from kenaz_engine.session.prepared import Prepared
from kenaz_engine.session.reap import sweep
from kenaz_engine.session.seams import Connect
from kenaz_engine.spec.files import read
from kenaz_engine.spec.resolve import ResolvedSession, load_session

if TYPE_CHECKING:
    from kenaz_engine.channel.harness import HarnessLink

REAP_BOUND = 5.0
"""Seconds that a session may be kept waiting by dead ones."""


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    parser.add_argument("spec", metavar="SPEC", help="the session's file, or - for standard input")
    parser.add_argument(
        "--set", metavar="PATH=VALUE", action="append", default=[], help="override a value of the spec"
    )
    parser.add_argument("--session-id", metavar="ID", help="the session's id, instead of a random one")
    parser.add_argument(
        "--harness",
        metavar="ADDRESS",
        help="the harness that listens there, unix:PATH or loopback:FILE, answers the guest (without it: a "
        "built-in demo harness)",
    )
    parser.add_argument("--offline", action="store_true", help="fetch nothing: use the image that is here")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of text")


def run(arguments: argparse.Namespace) -> int:
    """Runs the session; see `kenaz_engine.cli.failures` for the exit codes."""
    text, file = read(arguments.spec)
    with telling_all():
        resolved = load_session(
            text, file, overrides=arguments.set, session_id=arguments.session_id, environment=os.environ
        )
    if arguments.harness:
        _check_harness(arguments.harness, resolved)
    return trio.run(_main, resolved, arguments)


async def _main(resolved: ResolvedSession, arguments: argparse.Namespace) -> int:
    prepared = await prepare(resolved, offline=arguments.offline)
    out = _Output(sys.stdout)
    view: View = JsonLines(out, sys.stderr) if arguments.json else Live(out)
    await _reap_others(view)
    view.begin(prepared)
    connect = _connector(arguments.harness, view, prepared)
    session = Session(prepared, connect, view.output, (view.record,), view.progress)
    out.on_loss = lambda: session.request("end", "output")
    signals = _Signals(session)
    result = await _watched(session, signals, view)
    left = leftovers(result.journal, result.outcome.left)
    succeeded = result.outcome.success and not left
    code = INTERRUPTED if signals.seen else SUCCESS if succeeded else FAILED
    view.finish(result, code, left)
    if arguments.debug:
        sys.stderr.writelines(result.tracebacks)
    return code


async def _reap_others(view: View) -> None:
    """Gives back what dead sessions of this user hold. What cannot be done now, another time will do."""
    try:
        swept = await sweep(bound=REAP_BOUND)
    except (OSError, DirectoryError):
        return  # the session itself will say what is wrong with the place
    if swept.sessions:
        view.reaped(swept.sessions)


async def _watched(session: Session, signals: _Signals, view: View) -> Result:
    """Runs the session between signals and view. Raises DirectoryError by itself, not in a group."""
    result: Result | DirectoryError
    async with trio.open_nursery() as nursery:
        await nursery.start(signals.watch)
        nursery.start_soon(view.tick)
        try:
            result = await session.run()
        except DirectoryError as exc:
            result = exc
        nursery.cancel_scope.cancel()
    if isinstance(result, DirectoryError):
        raise result
    return result


def _connector(address: str | None, view: View, prepared: Prepared) -> Connect:
    async def connect() -> HarnessLink:
        from kenaz_engine.channel.harness import DemoHarness, connect_harness
        from kenaz_engine.session.conversation import channel_limits

        if address is None:
            return DemoHarness(view.say, prepared.capabilities.deadline_scale)
        return await connect_harness(address, channel_limits(prepared.resolved))

    return connect


def _check_harness(address: str, resolved: ResolvedSession) -> None:
    """A wrong address is better found now than when the guest is up. A harness that is not there yet may
    come, where the spec gives it time."""
    from kenaz_engine.channel.harness import HARNESSES

    scheme, _, path = address.partition(":")
    if scheme not in HARNESSES or not path:
        raise CommandError(f"--harness {address}: it must be {' or '.join(HARNESSES.values())}", code=USAGE)
    if not Path(path).parent.is_dir():
        hint = f"name a {'socket' if scheme == 'unix' else 'file'} in a directory that exists"
        raise CommandError(f"--harness: {Path(path).parent} is no directory", hint, ENVIRONMENT)
    # A file of secrets is made before they are written to it.
    if not Path(path).exists() or (scheme == "loopback" and not Path(path).stat().st_size):
        if resolved.channel.grace:
            return
        hint = "start the harness first, or give it time by spec.channel.grace"
        raise CommandError(f"--harness: nothing is at {path}", hint, ENVIRONMENT)
    if scheme == "unix" and not Path(path).is_socket():
        raise CommandError(f"--harness: {path} is not a socket", code=USAGE)
    if scheme == "loopback":
        try:
            read_secrets(Path(path))
        except OSError as exc:
            raise CommandError(f"--harness: {path}: {exc.strerror}", code=USAGE) from None


class _Output:
    """A stream whose reader may go (`| head`, a closed terminal) without taking the clean-up with it.

    `on_loss` is called once, when that shows; from then on nothing is written.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lost = False
        self.on_loss: Callable[[], None] = lambda: None

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream.isatty()

    def write(self, text: str) -> None:
        """Writes what will be seen at the next flush."""
        self._guarded(lambda: self._stream.write(text))

    def flush(self) -> None:
        """Shows what was written."""
        self._guarded(self._stream.flush)

    def _guarded(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError:
            # What the stream still holds must not raise again, at the latest when Python ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if not self._lost:
                self._lost = True
                self.on_loss()


class _Signals:
    """The first signal asks the session to end, the next to abort."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.seen = False

    async def watch(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Runs until cancelled."""
        known = [signal.SIGINT, signal.SIGTERM]
        # On Windows Ctrl-Break is all that can be sent to a process group of its own: Ctrl-C is off there.
        for name in ("SIGHUP", "SIGBREAK"):
            number: signal.Signals | None = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # by nohup
                known.append(number)
        with trio.open_signal_receiver(*known) as signals:
            task_status.started()
            async for _ in signals:
                self._session.request("abort" if self.seen else "end", "signal")
                self.seen = True
