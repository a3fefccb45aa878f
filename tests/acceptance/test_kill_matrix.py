"""The launcher is killed at every record of a session; `reap` gives back all it held, and the journal reads.

How a record is chosen is in kenaz_engine/journal/mortal.py: before it is written, half-way, or after it. The
whole matrix is in `make test-all`; `make test` has the points after which something is there, or gone.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trio

from kenaz_engine.journal.reader import read_journal
from kenaz_engine.replay.replayer import check_shape, replay
from kenaz_engine.session.directory import see
from kenaz_engine.session.reap import Reaped, reap

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")

SESSION = "k"
AT_ONCE = 4
"""Sessions that are killed at a time; an emulated machine takes a core."""

SLACK = 3
"""Records that a session may have more than another: what tells of a machine's end comes sooner or later."""

PROCESS = {"driver": "process"}
QEMU = {"driver": "qemu", "driverOptions.qemu.accel": "tcg", "behaviour": "bye"}
LIBVIRT = {"driver": "libvirt", "driverOptions.libvirt.accel": "tcg", "behaviour": "bye"}

Worlds = Callable[[], Any]


def pieces(world: Any, **options: str) -> list[dict[str, Any]]:
    """The records of a session that nobody disturbs."""
    done = world.run("--session-id", SESSION, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    records: list[dict[str, Any]] = world.records(SESSION)
    return records


def die_at(world: Any, point: str, *, may_end: bool = False, **options: str) -> bool:
    """Runs a session whose launcher dies there. Nobody cleans up, yet no process outlives it. With `may_end`
    it may have ended before it came there. False where a busy libvirt made no machine in time, so that the
    session ended before that point."""
    done = subprocess.run(
        world.command("--session-id", SESSION, **options),
        env={**world.environment, "KENAZ_TEST_KILL": point},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode == 1 and "VM did not start: libvirt does not" in done.stdout:
        assert world.left() == []
        return False
    ends = {-signal.SIGKILL, 0} if may_end else {-signal.SIGKILL}
    assert done.returncode in ends, f"{point}: {done.returncode} {done.stdout} {done.stderr}"
    world.until(lambda: world.processes() == [])
    return True


def reap_and_look(world: Any, point: str) -> str:
    """Reaps, and holds what comes of it; returns how."""
    directory = world.directory(SESSION)
    shown = see(directory).status
    result = trio.run(_reap, directory)
    assert result.status in ("reaped", "ended"), (point, result)
    assert world.left() == [], point
    if result.message:
        assert (shown, result.message) == ("dead", "it died before its first record"), point
        assert not directory.exists()
        return "gone"
    assert shown == ("dead" if result.status == "reaped" else "ended"), point
    recording = read_journal(directory / "journal.jsonl")
    for record in recording.records:
        check_shape(record)
    assert recording.end is not None, point
    assert recording.end["left"] == []
    assert not recording.torn, point
    again = replay(recording)
    assert again.ok, f"{point}: {again}"
    assert see(directory).status == "ended"
    assert trio.run(_reap, directory).status == "ended"
    assert read_journal(directory / "journal.jsonl") == recording
    return str(result.status)


async def _reap(directory: Path) -> Reaped:
    return await reap(directory, trio.current_time() + 60)


def matrix(
    worlds: Worlds, points: Iterable[str], may_end: Container[str] = (), **options: str
) -> dict[str, str]:
    """What came of each point."""

    def one(point: str) -> tuple[str, str]:
        for _ in range(3):
            world = worlds()
            if die_at(world, point, may_end=point in may_end, **options):
                return point, reap_and_look(world, point)
        raise AssertionError(f"{point}: libvirt made no machine, three times")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(pool.map(one, points))


def due(point: str) -> str:
    """What is to come of a point where the session cannot have ended before."""
    return {"before:0": "gone", "torn:0": "gone", "after:end": "ended"}.get(point, "reaped")


def test_killed_where_something_was_just_made_or_given_back(worlds: Worlds) -> None:
    records = pieces(worlds(), **PROCESS)
    made = [r["seq"] for r in records if r["kind"] in ("header", "intent", "acquired", "released")]
    points = ["before:0", "torn:0", "before:1", "torn:9", *(f"after:{seq}" for seq in made), "after:end"]
    assert matrix(worlds, points, **PROCESS) == {point: due(point) for point in points}


def before_and_after_every_record(worlds: Worlds, part: int, **options: str) -> None:
    """A quarter of the matrix. It goes on past the end of a session, for the next one may be longer."""
    count = len(pieces(worlds(), **options))
    numbers = [str(seq) for seq in range(count + SLACK)]
    points = [f"{where}:{which}" for which in [*numbers, "end"] for where in ("before", "after")]
    late = points[2 * (count - SLACK - 1) : -2]
    came = matrix(worlds, points[part::4], late, **options)
    assert list(came) == points[part::4]
    for point, outcome in came.items():
        assert outcome == due(point) or (outcome == "ended" and point in late), point


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("driver", ["process", "qemu"])
def test_killed_before_and_after_every_record(
    worlds: Worlds, driver: str, part: int, request: pytest.FixtureRequest
) -> None:
    if driver == "qemu":
        request.getfixturevalue("qemu")
    before_and_after_every_record(worlds, part, **(QEMU if driver == "qemu" else PROCESS))


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("part", range(4))
def test_killed_with_a_domain_before_and_after_every_record(
    worlds: Worlds, qemu: str, libvirtd: Any, part: int
) -> None:
    """Its QEMU is no child of the launcher: libvirt has it, and is to give it up."""
    uri = {"driverOptions.libvirt.uri": libvirtd.uri}
    before_and_after_every_record(worlds, part, **LIBVIRT, **uri)
    assert libvirtd.domains() == []


@pytest.mark.parametrize(
    ("count", "options"),
    [
        pytest.param(4, PROCESS, id="process"),
        pytest.param(60, PROCESS, id="process-long", marks=pytest.mark.slow),
        pytest.param(10, QEMU, id="qemu-long", marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_time(worlds: Worlds, count: int, options: dict[str, str]) -> None:
    """Between records, too: in the middle of what they are about. Half of them with all of its group."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    begun = time.monotonic()
    pieces(worlds(), **options)
    whole = time.monotonic() - begun
    if (os.cpu_count() or 1) < AT_ONCE:
        whole *= 2  # several at a time are that much slower
    plan = [(draw.uniform(0.2 * whole, whole), draw.random() < 0.5) for _ in range(count)]

    def one(when: tuple[float, bool]) -> None:
        world, (seconds, group) = worlds(), when
        with subprocess.Popen(
            world.command("--session-id", SESSION, **options),
            env=world.environment,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        ) as running:
            time.sleep(seconds)
            (os.killpg if group else os.kill)(running.pid, signal.SIGKILL)
        world.until(lambda: world.processes() == [])
        if world.directory(SESSION).exists():
            reap_and_look(world, f"{when} of seed {seed}")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(one, plan))


def test_a_reaper_that_is_killed_is_followed_by_one_that_goes_on(worlds: Worlds) -> None:
    """Each lives to write one record more than the one before it, until nothing is left to do."""
    world = worlds()
    assert die_at(world, "after:20", **PROCESS)
    journal = world.directory(SESSION) / "journal.jsonl"
    died = 0
    for lived, where in zip(itertools.count(), itertools.cycle(("before", "torn", "after"))):
        length = len(read_journal(journal).records)
        done = subprocess.run(
            [sys.executable, "-m", "kenaz_engine.cli.main", "reap"],
            env={**world.environment, "KENAZ_TEST_KILL": f"{where}:{length + lived}"},
            capture_output=True,
            timeout=300,
            check=False,
        )
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        assert world.status(SESSION) in ("dead", "ended")
        died += 1
    assert died >= 3
    reap_and_look(world, "the last")
    kinds = Counter(r["kind"] for r in read_journal(journal).records)
    assert kinds["reap"] >= 3
    assert kinds["released"] == kinds["intent"]
