"""The control socket: what is asked, what is answered, and who cannot hurt it."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from kenaz_drivers.contract import DriverError
from kenaz_engine.channel.transports import TransportError
from kenaz_engine.channel.transports.unix import listen_unix
from kenaz_engine.session.control import ControlError, ask, serve_control

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="UNIX sockets")


async def photograph(path: str) -> None:
    if not path:
        raise DriverError("this machine has no screen", hint="machine.display: vnc")
    Path(path).write_bytes(b"PNG")


@asynccontextmanager
async def served(directory: Path) -> AsyncIterator[tuple[Path, list[str]]]:
    directory.chmod(0o700)
    path, asked = directory / "control.sock", list[str]()
    async with trio.open_nursery() as nursery:
        listener = listen_unix(path)
        nursery.start_soon(serve_control, listener, asked.append, photograph)
        yield path, asked
        await listener.aclose()


async def test_a_picture_is_made_where_it_is_asked_for_or_the_mend_is_told(tmp_path: Path) -> None:
    async with served(tmp_path) as (path, asked):
        await ask(path, "screenshot", path=str(tmp_path / "out.png"))
        assert (tmp_path / "out.png").read_bytes() == b"PNG"
        with pytest.raises(ControlError, match=r"no screen \(machine.display: vnc\)"):
            await ask(path, "screenshot", path="")
        assert asked == []


async def test_a_session_is_asked_to_end_and_to_abort(tmp_path: Path) -> None:
    async with served(tmp_path) as (path, asked):
        await ask(path, "end")
        await ask(path, "abort")
        assert asked == ["end", "abort"]


async def test_an_unknown_command_is_refused_by_name(tmp_path: Path) -> None:
    async with served(tmp_path) as (path, asked):
        with pytest.raises(ControlError, match="unknown command; known are end, abort"):
            await ask(path, "destroy")
        assert asked == []


@pytest.mark.parametrize("said", [b"nonsense\n", b"[]\n", b"[" * 4096, b"\xff\n"])
async def test_nonsense_is_answered_and_survived(tmp_path: Path, said: bytes) -> None:
    async with served(tmp_path) as (path, asked):
        async with await trio.open_unix_socket(str(path)) as stream:
            await stream.send_all(said)
            assert json.loads(await stream.receive_some(4096))["ok"] is False
        await ask(path, "end")
        assert asked == ["end"]


async def test_a_session_that_is_gone_does_not_answer(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="does not answer"):
        await ask(tmp_path / "none.sock", "end")


class Exhausted:
    """A listener that is out of descriptors once, and is closed after."""

    def __init__(self) -> None:
        self.calls: list[float] = []

    async def accept(self) -> Any:
        self.calls.append(trio.current_time())
        if len(self.calls) == 1:
            raise TransportError("out of descriptors")
        raise trio.ClosedResourceError


async def test_a_lack_of_descriptors_is_waited_out(autojump_clock: Any) -> None:
    listener: Any = Exhausted()
    await serve_control(listener, lambda command: None, photograph)
    assert listener.calls[1] - listener.calls[0] == pytest.approx(1)


async def test_a_session_that_says_nothing_is_not_waited_for_long(
    tmp_path: Path, autojump_clock: Any
) -> None:
    listener = listen_unix(tmp_path / "c")
    with pytest.raises(ControlError, match="did not answer within 5 s"):
        await ask(tmp_path / "c", "end")
    await listener.aclose()


DIAL = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
link = socket.socket(socket.AF_UNIX)
link.settimeout(10)
link.connect(sys.argv[1])
try:
    link.sendall(b'{"command": "abort"}\\n')
    print(len(link.recv(100)))
except ConnectionError:
    print(0)
"""


@pytest.mark.only_where(sys.platform == "linux" and os.geteuid() == 0)
async def test_another_user_is_not_heard_even_where_all_may_dial() -> None:
    directory = Path(tempfile.mkdtemp(prefix="kc-"))  # a place that others can enter
    try:
        async with served(directory) as (path, asked):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            directory.chmod(0o755)
            path.chmod(0o666)
            command = [shutil.which("python3") or sys.executable, "-c", DIAL, str(path)]
            done = await trio.run_process(command, capture_stdout=True, cwd="/")
            assert done.stdout == b"0\n"
            assert asked == []
            await ask(path, "end")
            assert asked == ["end"]
    finally:
        shutil.rmtree(directory)
