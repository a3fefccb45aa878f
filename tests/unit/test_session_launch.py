"""How a session begins, and how it is refused where it cannot: one line, and nothing left."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio

from kenaz_engine.channel.transports import TransportError
from kenaz_engine.journal.writer import Journal
from kenaz_engine.session import launch
from kenaz_engine.session.control import ask
from kenaz_engine.session.directory import ELSEWHERE, DirectoryError
from kenaz_engine.session.ledger import AcquireTimeout


def nothing_is_left(whole: Any) -> bool:
    return not whole.directory.exists()


def full(*args: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def test_the_header_says_what_is_run(whole: Any) -> None:
    result = await whole.run(await whole.prepare())
    header = whole.records()[0]
    assert (header["kind"], header["session"], header["driver"]) == ("header", "s1", "simulated")
    assert result.journal == whole.directory / "journal.jsonl"
    assert (header["accelerator"], header["transport"]) == ("none", "unix")


async def test_what_was_asked_before_the_begin_is_heard(whole: Any) -> None:
    session = launch.Session(await whole.prepare(), _no_harness, lambda stream, text: None)
    session.request("end", "early")
    with trio.fail_after(10):
        result = await session.run()
    assert result.outcome.verdict == "ended before the guest was ready"
    [event] = [r for r in whole.records() if r["kind"] == "event" and r["type"] == "end"]
    assert event["data"] == {"by": "early"}


async def test_a_session_is_ended_through_its_control_socket(whole: Any) -> None:
    whole.stays()

    def running(record: Mapping[str, Any]) -> None:
        if record["kind"] == "entered" and record["state"] == "connecting":
            nursery.start_soon(ask, whole.directory / "control.sock", "end")

    session = launch.Session(await whole.prepare(dial=None), _no_harness, lambda s, t: None, (running,))
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            result = await session.run()
    assert result.outcome.verdict == "ended before the guest was ready"
    [event] = [r for r in whole.records() if r["kind"] == "event" and r["type"] == "end"]
    assert event["data"] == {"by": "control"}


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory that leaves a socket's path its 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="k-", dir="/tmp") as directory:
        yield Path(directory)


async def test_sockets_go_elsewhere_where_the_path_is_long(
    whole: Any, monkeypatch: pytest.MonkeyPatch, short: Path
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    whole.home = whole.home / ("a" * 110)
    monkeypatch.setenv("KENAZ_STATE_DIR", str(whole.home))
    result = await whole.run(await whole.prepare())
    assert result.outcome.success
    made = {r["resource"]: r["handle"] for r in whole.records() if r["kind"] == "acquired"}
    assert made["runtime"]["path"].startswith(f"{short}/kenaz/s1-")
    assert not Path(made["runtime"]["path"]).exists()


@pytest.mark.parametrize(
    ("part", "fails", "says"),
    [
        ("open_journal", full, "the journal {}/journal.jsonl cannot be made: No space left on device"),
        ("listen_local", full, "the control socket {}/control.sock cannot be made: No space left on device"),
    ],
)
async def test_a_full_disk_at_the_begin_is_one_line(
    whole: Any, monkeypatch: pytest.MonkeyPatch, part: str, fails: Any, says: str
) -> None:
    monkeypatch.setattr(launch, part, fails)
    prepared = await whole.prepare()
    with pytest.raises(DirectoryError) as caught:
        await whole.run(prepared)
    assert str(caught.value) == says.format(whole.directory)
    assert caught.value.hint == f"make room there, or {ELSEWHERE}"
    assert nothing_is_left(whole)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("header", "{} cannot be made: "),
        ("intent", "the control socket {}/control.sock cannot be made: "),
        ("acquired", ""),
    ],
)
async def test_a_journal_that_fails_at_the_begin_is_one_line(
    whole: Any, monkeypatch: pytest.MonkeyPatch, kind: str, says: str
) -> None:
    class Full(Journal):
        def append(self, wanted: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
            if wanted == kind:
                full()
            return super().append(wanted, fields)

    monkeypatch.setattr(launch, "open_journal", Full)
    prepared = await whole.prepare()
    lost = "the journal could not be written: No space left on device"
    if not says:
        # The session has begun, and ends because nothing that it does can be written down.
        result = await whole.run(prepared)
        assert lost in result.outcome.internal
        assert not (whole.directory / "control.sock").exists()
        (whole.directory / "journal.jsonl").unlink()
        return
    with pytest.raises(DirectoryError) as caught:
        await whole.run(prepared)
    assert str(caught.value) == says.format(whole.directory) + lost
    assert caught.value.hint == f"make room there, or {ELSEWHERE}"
    assert nothing_is_left(whole)


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (TransportError("out of descriptors", hint="close some"), "close some"),
        (AcquireTimeout("making the control took longer than 30 s"), ELSEWHERE),
    ],
)
async def test_a_control_socket_that_cannot_be_made_is_told(
    whole: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, hint: str
) -> None:
    def fail(path: Path) -> Any:
        raise error

    monkeypatch.setattr(launch, "listen_local", fail)
    prepared = await whole.prepare()
    with pytest.raises(DirectoryError) as caught:
        await whole.run(prepared)
    assert str(caught.value).endswith(f"control.sock cannot be made: {error}")
    assert caught.value.hint == hint
    assert nothing_is_left(whole)


async def _no_harness() -> Any:
    raise AssertionError("nobody needs a harness here")
