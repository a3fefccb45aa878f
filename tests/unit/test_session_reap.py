"""What a dead session's journal leads to: what is held, who may touch it, and what is written at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from kenaz_drivers._common.identity import identify
from kenaz_drivers.contract import DriverError
from kenaz_engine.journal.reader import Recording, read_journal
from kenaz_engine.journal.writer import Journal
from kenaz_engine.session import reap as module
from kenaz_engine.session.ledger import Left, still_held
from kenaz_engine.session.locks import try_lock
from kenaz_engine.session.reap import DIED, end_fields, expired, look, objection, reap, survey, sweep
from kenaz_engine.session.resources import file_handle

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no process can be told from a later one")

GONE = {"pid": 1, "start_time": "-", "boot_id": "another"}
"""A launcher of another boot."""

Record = tuple[str, dict[str, Any]]


def intent(
    number: int, resource: str, kind: str, intent: dict[str, Any], uses: tuple[int, ...] = ()
) -> Record:
    fields = {"id": number, "resource": resource, "type": kind, "intent": intent, "uses": list(uses)}
    return "intent", fields


def acquired(number: int, resource: str, kind: str, handle: dict[str, Any]) -> Record:
    return "acquired", {"id": number, "resource": resource, "type": kind, "handle": handle}


def released(number: int, resource: str, kind: str) -> Record:
    return "released", {"id": number, "resource": resource, "type": kind}


ENTERED: Record = ("entered", {"state": "booting", "entry": 1, "activity": "vm.start", "timeout": 60.0})
ENDED: Record = ("end", {"state": "ended", "success": True, "seconds": 1.0, "left": []})


class Place:
    """A state directory in which sessions are put."""

    def __init__(self, home: Path) -> None:
        self.home = home / "sessions"

    def put(self, name: str, *records: Record, lock: bool = True, **header: Any) -> Path:
        path = self.home / name
        path.mkdir(mode=0o700, parents=True)
        (path / "console.log").touch()
        if lock:
            (path / "lock").touch()
        journal = Journal(path / "journal.jsonl")
        fields = {
            "format": 1,
            "driver": "process",
            "lifecycle": {"initial": "resolving"},
            "directory": os.path.realpath(path),
            "process": GONE,
            "mark": f"{name}-0123456789abcdef",
        }
        journal.append("header", fields | header)
        for kind, more in records:
            journal.append(kind, more)
        journal.close()
        return path

    def left(self, name: str) -> set[str]:
        return {item.name for item in (self.home / name).iterdir()}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("KENAZ_STATE_DIR", str(tmp_path))
    return Place(tmp_path)


def at_once(path: Path) -> module.Reaped:
    async def main() -> module.Reaped:
        return await reap(path, trio.current_time() + 30)

    return trio.run(main)


RECORD = {"journal.jsonl", "console.log"}


# --- what a journal says ------------------------------------------------------------------------------------


def test_what_is_held_is_what_was_begun_and_not_released() -> None:
    records = [
        intent(1, "disk", "file", {"path": "/d"}),
        acquired(1, "disk", "file", {"path": "/d", "inode": 1}),
        intent(2, "socket", "socket", {"path": "/s"}),
        intent(3, "vm", "machine", {"mark": "m"}, (1, 2)),
        released(2, "socket", "socket"),
    ]
    held = still_held([{"kind": kind, **fields} for kind, fields in records])
    assert [(e.id, e.resource, e.handle, e.uses) for e in held] == [
        (1, "disk", {"path": "/d", "inode": 1}, frozenset()),
        (3, "vm", None, frozenset({1, 2})),
    ]
    assert [e.bound for e in held] == [5.0, 15.0]


def recording(*records: Record, **header: Any) -> Recording:
    first = {"kind": "header", "t": 0.0, "lifecycle": {"initial": "resolving"}, **header}
    rest = [{"kind": kind, "t": float(number), **fields} for number, (kind, fields) in enumerate(records, 1)]
    return Recording(Path("x"), [first, *rest], torn=False)


def test_a_journal_speaks_for_its_own_directory_only() -> None:
    assert objection(recording(directory="/a"), "/a") == ""
    assert "its journal is that of /b: this directory was copied or moved" in objection(
        recording(directory="/b"), "/a"
    )
    assert "another place" in objection(recording(), "/a")


def test_the_end_says_where_the_session_stood() -> None:
    decision: Record = ("decision", {"state": "killing", "verdict": "it failed", "also": ["twice"]})
    assert end_fields(recording(ENTERED, decision, ("reap", {})), []) == {
        "state": "killing",
        "success": False,
        "seconds": 2.0,
        "left": [],
        "reaped": True,
        "verdict": "it failed",
        "also": ["twice"],
        "internal": DIED,
    }
    assert end_fields(recording(), [])["state"] == "resolving"
    left = Left(3, "vm", "machine", "does not die")
    ended: Record = (
        "end",
        {"state": "failed", "success": False, "seconds": 9.5, "verdict": "v", "left": [1]},
    )
    again = end_fields(recording(decision, ended, ("reap", {})), [left])
    assert (again["state"], again["seconds"], again["verdict"]) == ("failed", 9.5, "v")
    assert again["left"] == [{"id": 3, "resource": "vm", "type": "machine", "error": "does not die"}]
    assert "internal" not in again


def test_the_newest_are_kept() -> None:
    ended = [(float(n), Path(str(n))) for n in (3, 1, 2)]
    assert expired(ended, 2) == [Path("1")]
    assert expired(ended, 3) == []


# --- one session --------------------------------------------------------------------------------------------


def test_all_is_given_back_newest_first_and_the_record_stays(place: Place, tmp_path: Path) -> None:
    disk, outside = place.home / "s1/root.qcow2", tmp_path / "outside"
    outside.touch()
    path = place.put(
        "s1",
        ENTERED,
        intent(1, "runtime", "file", {"path": str(outside)}),
        acquired(1, "runtime", "file", file_handle(outside)),
        intent(2, "disk", "file", {"path": str(disk)}),
    )
    disk.touch()
    (path / "half-written").touch()
    (path / "tree/inner").mkdir(parents=True)
    assert [e.resource for e in look(path).released] == ["disk", "runtime"]
    result = at_once(path)
    assert (result.status, [e.resource for e in result.released]) == ("reaped", ["disk", "runtime"])
    assert place.left("s1") == RECORD
    assert not outside.exists()
    records = read_journal(path / "journal.jsonl").records
    assert [r["kind"] for r in records[-4:]] == ["reap", "released", "released", "end"]
    assert records[-4]["process"] == identify(os.getpid())
    assert at_once(path).status == "ended"
    assert len(read_journal(path / "journal.jsonl").records) == len(records)


def test_another_file_of_that_path_is_not_touched(place: Place, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.touch()
    handle = {**file_handle(outside), "inode": 1}
    fields = [intent(1, "runtime", "file", {"path": str(outside)}), acquired(1, "runtime", "file", handle)]
    assert at_once(place.put("s1", *fields)).status == "reaped"
    assert outside.exists()


def test_what_is_used_by_something_that_stays_is_kept_and_the_next_time_is_tried_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Driver:
        dies = False

        async def release(self, handle: Any) -> None:
            assert handle == {"mark": "m"}
            if not self.dies:
                raise DriverError("process 7 does not die")

    driver = Driver()
    monkeypatch.setattr(module, "load", lambda name: driver)
    disk = place.home / "s1/disk"
    path = place.put(
        "s1",
        intent(1, "disk", "file", {"path": str(disk)}),
        intent(2, "vm", "machine", {"mark": "m"}, (1,)),
        intent(3, "thing", "mystery", {}),
    )
    disk.touch()
    result = at_once(path)
    assert (result.status, result.released) == ("left", ())
    assert [(item.resource, item.error) for item in result.left] == [
        ("thing", "is a mystery, which this version cannot give back"),
        ("vm", "process 7 does not die"),
        ("disk", "is still used by the vm"),
    ]
    assert disk.exists()
    assert (path / "lock").exists()
    driver.dies = True
    monkeypatch.setitem(module.BY_INTENT, "mystery", module.BY_INTENT["cid"])
    assert [e.resource for e in at_once(path).released] == ["thing", "vm", "disk"]
    assert place.left("s1") == RECORD
    kinds = [r["kind"] for r in read_journal(path / "journal.jsonl").records]
    assert (kinds.count("reap"), kinds.count("end"), kinds[-1]) == (2, 2, "end")


def test_what_its_launcher_could_not_give_back_is_tried_again(place: Place) -> None:
    disk = place.home / "s1/disk"
    end = ("end", {"state": "failed", "success": False, "seconds": 2.0, "left": [{"id": 1}]})
    path = place.put("s1", intent(1, "disk", "file", {"path": str(disk)}), end, lock=False)
    disk.touch()
    assert (look(path).status, at_once(path).status, disk.exists()) == ("dead", "reaped", False)
    last = read_journal(path / "journal.jsonl").records[-1]
    assert (last["state"], last["reaped"], last["left"]) == ("failed", True, [])


def test_a_torn_line_is_cut_off_and_the_chain_goes_on(place: Place) -> None:
    path = place.put("s1", ENTERED)
    with (path / "journal.jsonl").open("ab") as file:
        file.write(b'{"seq":2,"t":0.1')
    assert at_once(path).status == "reaped"
    assert [r["kind"] for r in read_journal(path / "journal.jsonl").records] == [
        "header",
        "entered",
        "reap",
        "end",
    ]


def test_a_session_that_died_before_its_first_record_had_nothing(place: Place) -> None:
    path = place.put("s1")
    for content in (b"", b'{"seq":0,"t"'):
        path.mkdir(exist_ok=True)
        (path / "journal.jsonl").write_bytes(content)
        assert (look(path).status, look(path).message) == ("dead", "it died before its first record")
        assert at_once(path).status == "reaped"
        assert not path.exists()
    path.mkdir()
    assert at_once(path).status == "reaped"
    path.mkdir()
    (path / "thesis.txt").touch()
    for result in (look(path), at_once(path)):
        assert (result.status, result.message) == ("refused", "it has no journal, but thesis.txt")
    assert (path / "thesis.txt").exists()


def spoil(path: Path, *change: bytes) -> None:
    journal = path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(*change, 1))


@pytest.mark.parametrize(
    ("spoiled", "says"),
    [
        (lambda path: spoil(path, b"booting", b"running"), "its journal is damaged: line 3: does not follow"),
        (lambda path: spoil(path, b'"kind":"entered"', b'"kind":"x"'), "its journal is damaged: line 2"),
        (lambda path: path.rename(path.with_name("s2")), "this directory was copied or moved"),
    ],
)
def test_nothing_is_guessed(place: Place, spoiled: Callable[[Path], Any], says: str) -> None:
    disk = place.home / "s1/disk"
    path = place.put("s1", ENTERED, intent(1, "disk", "file", {"path": str(disk)}))
    disk.touch()
    path = spoiled(path) or path
    before = {item.name: item.read_bytes() for item in path.iterdir()}
    for result in (look(path), at_once(path)):
        assert result.status == "refused"
        assert says in result.message
    assert {item.name: item.read_bytes() for item in path.iterdir()} == before


def test_records_that_lack_something_are_told(place: Place) -> None:
    path = place.put("s1", ("intent", {"id": 1}))
    for result in (look(path), at_once(path)):
        assert result.status == "refused"
        assert result.message.startswith("its journal cannot be understood: KeyError: ")


def test_a_place_that_cannot_be_written_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **how: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    path = place.put("s1", ENTERED)
    monkeypatch.setattr(module, "try_lock", refuse)
    assert at_once(path).message == f"{path}/lock: Permission denied"


def test_a_full_disk_does_not_stop_a_reaper(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Journal, kind: str, fields: Any) -> None:
        raise OSError(28, "No space left on device")

    disk = place.home / "s1/disk"
    path = place.put("s1", intent(1, "disk", "file", {"path": str(disk)}))
    disk.touch()
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", full)
        result = at_once(path)
    message = "the journal could not be written: No space left on device (make room there)"
    assert (result.status, result.message, disk.exists()) == ("left", message, False)
    assert at_once(path).status == "reaped"


def test_a_launcher_that_runs_without_its_lock_is_waited_for_and_then_left_alone(
    place: Place, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place.put("s1", ENTERED, process={**identify(os.getppid())})

    async def main() -> module.Reaped:
        return await reap(path, trio.current_time() + 30)

    result = trio.run(main, clock=autojump_clock)
    assert result.status == "refused"
    assert result.message == f"its launcher, process {os.getppid()}, still runs, without its lock"


def test_what_another_holds_is_running(place: Place) -> None:
    path = place.put("s1", ENTERED)
    lock = try_lock(path / "lock")
    assert lock is not None
    assert (look(path).status, at_once(path).status) == ("running", "running")
    lock.close()


# --- all sessions -------------------------------------------------------------------------------------------


def all_of(**how: Any) -> module.Swept:
    async def main() -> module.Swept:
        return await sweep(**how)

    return trio.run(main)


def test_the_dead_are_reaped_and_the_oldest_records_go(place: Place) -> None:
    assert all_of() == module.Swept((), ())
    for number in range(4):
        path = place.put(f"e{number}", ENDED, lock=False)
        os.utime(path / "journal.jsonl", (number, number))
    dead = place.put("d1", ENTERED)
    odd = place.put("d0", ENTERED, directory="/elsewhere")
    os.utime(dead / "journal.jsonl", (5, 5))
    os.utime(odd / "journal.jsonl", (0, 0))
    seen = survey(keep=2)
    assert ([r.status for r in seen.sessions], seen.removed) == (["refused", "dead"], ("e0", "e1"))
    swept = all_of(keep=2)
    assert [(r.id, r.status) for r in swept.sessions] == [("d0", "refused"), ("d1", "reaped")]
    assert swept.removed == ("e0", "e1")
    assert sorted(path.name for path in place.home.iterdir() if path.is_dir()) == ["d0", "d1", "e2", "e3"]
    assert odd.exists()


def test_only_what_is_old_enough(place: Place) -> None:
    place.put("d1", ENTERED)
    old = place.put("d2", ENTERED)
    place.put("e1", ENDED, lock=False)
    os.utime(old / "journal.jsonl", (0, 0))
    assert [r.id for r in survey(older_than=3600).sessions] == ["d2"]
    swept = all_of(older_than=3600, keep=0)
    assert ([r.id for r in swept.sessions], swept.removed) == (["d2"], ())


def test_when_the_time_is_over_the_rest_is_for_another_time(place: Place) -> None:
    place.put("d1", ENTERED)
    assert all_of(bound=0.0) == module.Swept((), ())
    assert all_of().sessions[0].status == "reaped"


def test_one_defect_does_not_spare_the_others(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.put("d1", ENTERED)
    place.put("d2", ENTERED)
    read = module.read_journal

    def broken(path: Path) -> Recording:
        if path.parent.name == "d1":
            raise ZeroDivisionError("a defect")
        return read(path)

    monkeypatch.setattr(module, "read_journal", broken)
    assert [r.status for r in all_of().sessions] == ["refused", "reaped"]
