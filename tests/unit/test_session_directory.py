"""Where sessions live on disk, and what is concluded from what is found there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from trio.testing import MockClock

from kenaz_engine.session import directory as module
from kenaz_engine.session.directory import (
    DirectoryError,
    all_sessions,
    create_directory,
    finished,
    is_alive,
    make_socket_directory,
    runtime_home,
    see,
    socket_directory,
    state_home,
)
from kenaz_engine.session.locks import try_lock


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KENAZ_STATE_DIR", str(tmp_path))
    return tmp_path / "sessions"


def test_the_environment_says_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KENAZ_STATE_DIR", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_home() == tmp_path / "kenaz"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert runtime_home() == Path("/run/user/7/kenaz")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert runtime_home().name == f"kenaz-{os.getuid()}"


def test_sessions_of_one_id_in_two_places_do_not_share_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run")
    long = "/" + "a" * 110
    first, second = (socket_directory(Path(long, where, "s1")) for where in ("x", "y"))
    assert first != second
    assert first.parent == second.parent == Path("/run/kenaz")
    assert socket_directory(Path("/state/s1")) == Path("/state/s1")


def test_macos_has_room_for_the_sockets_of_a_long_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: f"/var/folders/zz/{'x' * 30}/T")
    monkeypatch.setattr(os, "getuid", lambda: 1234567890)  # of a directory service
    monkeypatch.setattr(module, "LONGEST_PATH", 103)
    state = Path("/Users", "somebody", "Library/Application Support/kenaz/sessions")
    assert socket_directory(state / ("i" * 25)) == state / ("i" * 25)
    assert socket_directory(state / ("i" * 63)).parent == runtime_home()


async def test_a_session_has_its_directory_for_itself(home: Path) -> None:
    directory = await create_directory("s1")
    assert directory.path == home / "s1"
    assert directory.path.stat().st_mode & 0o777 == 0o700
    assert (directory.journal.name, directory.console.name) == ("journal.jsonl", "console.log")
    assert is_alive(directory.path)
    with pytest.raises(DirectoryError, match="a living session has the id 's1'") as caught:
        await create_directory("s1")
    assert "kenaz-launcher end s1" in caught.value.hint
    directory.close()
    directory.close()
    assert not is_alive(home / "s1")


def ended(number: int, **fields: object) -> str:
    return json.dumps({"kind": "end", "number": number, **fields}) + "\n"


async def test_what_has_ended_is_set_aside(home: Path) -> None:
    for number in range(3):
        directory = await create_directory("s1")
        directory.journal.write_text(ended(number))
        directory.close()
    found = [json.loads((home / name / "journal.jsonl").read_text()) for name in ("s1~1", "s1~2", "s1")]
    assert [record["number"] for record in found] == [0, 1, 2]


@pytest.mark.parametrize(
    "journal", ["", "{}\n", ended(0)[:-1], ended(0, left=[{"id": 1}]), "nonsense\n", "[]\n", None]
)
async def test_what_may_hold_something_keeps_its_place(home: Path, journal: str | None) -> None:
    """Set aside, what it holds could not be found by the paths that its journal has."""
    directory = await create_directory("s1")
    if journal is not None:
        directory.journal.write_text(journal)
    directory.close()
    with pytest.raises(DirectoryError, match="a dead session has the id 's1', and is not reaped") as caught:
        await create_directory("s1")
    assert "kenaz-launcher reap s1" in caught.value.hint
    assert [path.name for path in home.glob("s1*")] == ["s1"]


async def test_a_lock_that_nobody_holds_is_a_sign_of_death(home: Path) -> None:
    directory = await create_directory("s1")
    directory.journal.write_text(ended(0))
    assert not finished(directory.path)
    directory.lock.close()
    assert not finished(directory.path)
    (directory.path / "lock").unlink()
    assert finished(directory.path)


async def test_who_looks_does_not_hinder_who_looks(home: Path) -> None:
    directory = await create_directory("s1")
    directory.lock.close()
    with (directory.path / "lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert not is_alive(directory.path)
        assert try_lock(directory.path / "lock") is None


async def test_what_could_not_begin_is_discarded_unless_it_holds_a_socket(home: Path) -> None:
    directory = await create_directory("s1")
    (directory.path / "control.sock").touch()
    directory.discard()
    assert directory.path.exists()
    (directory.path / "control.sock").unlink()
    directory.discard()
    directory.close()
    assert not directory.path.exists()


async def test_a_directory_that_cannot_be_made_is_told(home: Path) -> None:
    home.write_text("a file")
    with pytest.raises(DirectoryError, match="cannot be made: File exists") as caught:
        await create_directory("s1")
    assert "KENAZ_STATE_DIR" in caught.value.hint


async def test_a_launcher_that_holds_the_door_is_not_waited_for_long(
    home: Path, autojump_clock: MockClock
) -> None:
    home.mkdir()
    other = try_lock(home / ".creating")
    assert other is not None
    with pytest.raises(DirectoryError, match=r"another launcher holds .*\.creating for more than 5 s"):
        await create_directory("s1")
    other.close()


def test_the_place_for_sockets_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "run" / "kenaz" / "s1"
    make_socket_directory(path)
    (path / "control.sock").touch()
    make_socket_directory(path)
    assert list(path.iterdir()) == []
    path.parent.chmod(0o777)
    with pytest.raises(PermissionError, match="is not yours alone to write to"):
        make_socket_directory(path)


def test_a_place_of_somebody_elses_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "getuid", lambda: os.geteuid() + 1)
    with pytest.raises(PermissionError) as caught:
        make_socket_directory(tmp_path / "s1")
    assert caught.value.errno == errno.EPERM


async def test_what_is_seen_follows_from_lock_and_journal(home: Path) -> None:
    assert list(all_sessions()) == []
    directory = await create_directory("s1")
    assert (see(directory.path).status, see(directory.path).state) == ("running", "")
    directory.close()
    (home / "s0").mkdir()
    (home / "s0/journal.jsonl").write_text("no journal\n")
    assert [(seen.id, seen.status, seen.recording) for seen in all_sessions()] == [
        ("s0", "damaged", None),
        ("s1", "dead", None),
    ]


# Locks


def test_a_lock_is_held_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with pytest.raises(FileNotFoundError):
        try_lock(path, create=False)
    lock = try_lock(path)
    assert lock is not None
    assert lock.path == path
    assert try_lock(path) is None
    lock.close()
    again = try_lock(path, create=False)
    assert again is not None
    again.close(remove=True)
    again.close(remove=True)
    assert not path.exists()


def test_a_lock_on_a_file_that_was_removed_since_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kenaz_engine.session import locks

    path, lock_it = tmp_path / "lock", locks._try_lock

    def late(file: int, **how: bool) -> bool:
        path.unlink()  # its holder has ended in between, and somebody else begins
        path.touch()
        return lock_it(file, **how)

    monkeypatch.setattr(locks, "_try_lock", late)
    assert try_lock(path) is None
    monkeypatch.undo()
    assert try_lock(path) is not None


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from kenaz_engine.session.locks import try_lock;"
        "lock = try_lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert try_lock(tmp_path / "lock") is None
        other.kill()
    lock = try_lock(tmp_path / "lock")
    assert lock is not None
    lock.close()


def test_where_locks_do_not_work_nothing_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kenaz_engine.session import locks

    opened: list[int] = []

    def broken(file: int, **how: bool) -> bool:
        opened.append(file)
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks, "_try_lock", broken)
    with pytest.raises(OSError, match="No locks available"):
        try_lock(tmp_path / "lock")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])
