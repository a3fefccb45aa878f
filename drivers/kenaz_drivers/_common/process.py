"""Child processes that cannot outlive the launcher.

trio's own `open_process` starts children from a worker thread. The kernel's parent-death signal is sent when
the *thread* that forked ends, and trio ends an idle worker after ten seconds; so children are started here,
on the calling thread, which must be the one that runs trio.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import trio

from kenaz_drivers._common.identity import identify
from kenaz_drivers._common.terminate import undead
from kenaz_drivers.contract import MARK, DriverError, JsonObject

if sys.platform == "win32":
    from kenaz_drivers._common import windows
    from kenaz_drivers._common.winpipes import output_pipe

GUARD = Path(__file__).with_name("guard.py")

_Stdio = int | IO[bytes]


class ChildProcess:
    """A child of ours, leader of its own process group. It must be waited for."""

    def __init__(self, popen: subprocess.Popen[bytes], pidfd: int | None, mark: str = "") -> None:
        self._popen = popen
        self._pidfd = pidfd
        self._waiting = trio.Lock()
        self._ended = False
        self.handle: JsonObject = identify(popen.pid) | ({"mark": mark} if mark else {})

    @property
    def pid(self) -> int:
        return self._popen.pid

    async def wait(self) -> int:
        """Returns the exit code, negative for a signal; kills what is left of the group. For any task."""
        async with self._waiting:
            if not self._ended:
                if self._pidfd is not None:
                    await trio.lowlevel.wait_readable(self._pidfd)
                else:
                    await trio.to_thread.run_sync(self._popen.wait, abandon_on_cancel=True)
                # With a pidfd this comes before the child is reaped: until then its number is its own.
                self.kill_group()
                self._popen.wait()
                self._ended = True
                if self._pidfd is not None:
                    os.close(self._pidfd)
        return self._popen.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Signals the child alone; does nothing when it is gone."""
        if not self._ended:
            self._popen.send_signal(number)

    def kill_group(self) -> None:
        """Kills the child and every process of its group; does nothing when it is gone."""
        if self._ended:
            return
        if sys.platform == "win32":
            self._popen.kill()
        else:
            # macOS says EPERM when only zombies are left.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    async def end(self, *graces: tuple[signal.Signals, float], limit: float = 5.0) -> int:
        """Sends each signal and waits its grace, in seconds; then kills the group and waits `limit`.

        Shielded: when it returns, the child is reaped. Raises DriverError when the kernel keeps it.
        """
        with trio.CancelScope(shield=True):
            for number, grace in graces:
                self.send_signal(number)
                with trio.move_on_after(grace):
                    return await self.wait()
            self.kill_group()
            with trio.move_on_after(limit):
                return await self.wait()
        raise undead(self.pid)


if sys.platform == "win32":

    def _pipe() -> tuple[Any, int]:
        return output_pipe()

else:

    def _pipe() -> tuple[Any, int]:
        ours, theirs = os.pipe()
        return trio.lowlevel.FdStream(ours), theirs


@contextlib.contextmanager
def open_pipe() -> Iterator[tuple[trio.abc.ReceiveStream, int]]:
    """A pipe to read a child's output from, and the end to give to `spawn` within the block.

    That end is closed with the block; where the block raises, all of the pipe is.
    """
    ours, theirs = _pipe()
    try:
        yield ours, theirs
    except BaseException:
        ours.close()
        raise
    finally:
        os.close(theirs)


if sys.platform == "win32":

    @functools.cache
    def _job() -> windows.Job:
        """The one of this process, for all its children."""
        return windows.Job(windows.load())

    def _tied(wanted: Mapping[int, int]) -> dict[str, Any]:
        return {"creationflags": windows.CREATE_SUSPENDED | subprocess.CREATE_NO_WINDOW}

else:

    def _tied(wanted: Mapping[int, int]) -> dict[str, Any]:
        """How Popen ties a child to us, the guard besides."""
        return {"pass_fds": tuple(wanted.values()), "start_new_session": True}


def spawn(
    argv: Sequence[str],
    *,
    descriptors: Mapping[int, int] | None = None,
    stdin: _Stdio = subprocess.DEVNULL,
    stdout: _Stdio = subprocess.DEVNULL,
    stderr: _Stdio = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    limits: Mapping[str, int] | None = None,
    no_new_privileges: bool = False,
) -> ChildProcess:
    """Starts a program in a session of its own, tied to the calling thread's life where the platform can.

    `descriptors` maps the numbers that the program shall see to open descriptors of ours. `limits` are
    resource limits by lower-case name (`core`, `data`). A MARK in `env` goes into the handle. Raises
    DriverError when no process can be made; a program that cannot be executed shows as exit code 127 with the
    reason on its stderr.
    """
    wanted = dict(descriptors or {})
    if sys.platform == "win32":
        if wanted:
            raise DriverError("descriptors cannot be passed to a child on this platform", hint="use WSL")
        command = list(argv)
    else:
        command = [sys.executable, "-I", "-S", "-E", str(GUARD), "--parent", str(os.getpid())]
        command += [f"--dup={ours}:{theirs}" for theirs, ours in wanted.items()]
        command += [f"--limit={name}:{value}" for name, value in (limits or {}).items()]
        command += ["--no-new-privileges"] if no_new_privileges else []
        command += ["--", *argv]
    try:
        popen = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=None if env is None else dict(env),
            cwd=cwd,
            **_tied(wanted),
        )
    except (OSError, ValueError) as error:
        none_left = isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}
        mend = "raise the limit of open files: ulimit -n" if none_left else ""
        raise DriverError(f"cannot start {argv[0]}: {error}", hint=mend) from error
    pidfd = None
    try:
        if sys.platform == "win32":
            _job().add(popen.pid)
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # before Linux 5.3, or out of descriptors: wait in a thread
                pidfd = os.pidfd_open(popen.pid)
        return ChildProcess(popen, pidfd, (env or {}).get(MARK, ""))
    except BaseException:  # no job for it, or nothing left to run `ps` with: nobody would know of it
        popen.kill()
        popen.wait()
        raise


@dataclass(frozen=True, slots=True)
class Captured:
    """How a short program ended: its exit code, None when it had to be killed, and all that it printed."""

    code: int | None
    text: str


if sys.platform == "win32":
    _REST = 0.5  # seconds for what a program has printed to be read, once it has ended

    async def _collect(process: trio.Process, output: bytearray, limit: int) -> None:
        assert process.stdout is not None
        async for data in process.stdout:
            output += data[: limit - len(output)]

    async def _output(
        argv: Sequence[str], output: bytearray, limit: int, environment: Mapping[str, str] | None
    ) -> int | None:
        """Runs it as its own: trio ends it where this is cancelled."""
        flags = windows.CREATE_SUSPENDED | subprocess.CREATE_NO_WINDOW
        try:
            process = await trio.lowlevel.open_process(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                creationflags=flags,
            )
        except OSError as error:
            raise DriverError(f"cannot start {argv[0]}: {error}") from error
        try:
            _job().add(process.pid)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_collect, process, output, limit)
                code = await process.wait()
                # Another process may have been given its pipe, and keep it open: Wine's conhost has.
                nursery.cancel_scope.deadline = trio.current_time() + _REST
            return code
        finally:
            with trio.CancelScope(shield=True):
                process.kill()
                await process.wait()

else:

    async def _output(
        argv: Sequence[str], output: bytearray, limit: int, environment: Mapping[str, str] | None
    ) -> int | None:
        """Runs it, keeps what it prints, and returns its exit code; whatever happens, no process is left."""
        with open_pipe() as (stream, theirs):
            child = spawn(argv, stdout=theirs, stderr=theirs, env=environment or {"LC_ALL": "C.UTF-8"})
        async with stream:
            try:
                async for data in stream:
                    output += data[: limit - len(output)]
                return await child.wait()
            finally:
                await child.end()


async def capture(
    argv: Sequence[str],
    *,
    deadline: float,
    limit: int = 1 << 20,
    environment: Mapping[str, str] | None = None,
) -> Captured:
    """Runs a program for at most `deadline` seconds and keeps the first `limit` bytes of what it prints.

    `environment` is all that it gets of one; unless given, no more than a neutral language. Whatever happens,
    cancellation included, no process is left. Raises DriverError like `spawn`.
    """
    output = bytearray()
    code: int | None = None
    with trio.move_on_after(deadline):
        code = await _output(argv, output, limit, environment)
    return Captured(code, output.decode("utf-8", "replace"))
