"""`run` as a user sees it: whole sessions with the driver `process`, and what they leave."""

from __future__ import annotations

import signal
import sys
from typing import Any

import pytest

BOUND = 300

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")


WAY_UP = ["resolving", "allocating", "booting", "connecting"]
WAY_DOWN = ["draining", "stopping", "releasing"]


def test_a_session_goes_the_graceful_way_and_leaves_nothing(world: Any) -> None:
    done = world.run("--session-id", "s1")
    assert (done.returncode, done.stderr) == (0, "")
    assert world.path("s1") == [*WAY_UP, "running", *WAY_DOWN]
    assert "tool fs.delete: denied" in done.stdout
    assert done.stdout.endswith("  nothing left behind\n")


def test_a_quick_bye_is_heard_by_the_state_that_serves(world: Any) -> None:
    done = world.run("--session-id", "s1", behaviour="bye")
    assert done.returncode == 0
    assert world.path("s1") == [*WAY_UP, "running", "stopping", "releasing"]


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        ("exit:3", "failed: VM exited while serving: the agent ended with code 3"),
        ("panic", "Kernel panic - not syncing: asked for"),
        ("emergency", "kenaz: emergency: asked for"),
    ],
)
def test_a_guest_that_fails_is_told_in_one_line(world: Any, behaviour: str, says: str) -> None:
    done = world.run(behaviour=behaviour)
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("failed: ")]
    assert says in line
    assert "nothing left behind" in done.stdout


def test_a_guest_that_never_dials_ends_by_the_timeout(world: Any) -> None:
    done = world.run("--session-id", "s1", behaviour="mute", **{"timeouts.connecting": "500ms"})
    assert done.returncode == 1
    assert world.path("s1") == [*WAY_UP, "killing", "releasing"]
    assert "failed: guest did not dial in time" in done.stdout


def test_a_guest_that_hangs_is_killed(world: Any) -> None:
    quick = {"timeouts.draining": "200ms", "timeouts.stopping": "200ms"}
    done = world.run("--session-id", "s1", behaviour="hang", **quick)
    assert done.returncode == 0
    assert world.path("s1")[-4:] == ["draining", "stopping", "killing", "releasing"]
    assert "! guest did not power off" in done.stdout


def test_a_flooded_console_is_bounded(world: Any) -> None:
    done = world.run("--session-id", "s1", behaviour="flood")
    assert done.returncode == 0
    assert (world.state / "sessions/s1/console.log").stat().st_size < 1_200_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_ends_a_session_gracefully(world: Any, number: signal.Signals) -> None:
    running = world.start("--session-id", "s1", behaviour="mute")
    world.wait_for("s1", "connecting")
    running.send_signal(number)
    out, _ = running.communicate(timeout=BOUND)
    assert running.returncode == 130
    assert world.path("s1") == [*WAY_UP, "stopping", "releasing"]
    assert "interrupted: end; once more to abort" in out


def test_two_signals_abort(world: Any) -> None:
    running = world.start("--session-id", "s1", "--set", "spec.timeouts.draining=60s", behaviour="hang")
    world.wait_for("s1", "draining")
    running.send_signal(signal.SIGINT)
    world.until(lambda: any(r.get("data", {}).get("by") == "signal" for r in world.records("s1")))
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=BOUND)
    assert running.returncode == 130
    assert world.path("s1")[-2:] == ["killing", "releasing"]


def test_the_id_of_a_living_session_is_refused_and_of_an_ended_one_reused(world: Any) -> None:
    running = world.start("--session-id", "s1", behaviour="mute")
    world.wait_for("s1", "connecting")
    refused = world.run("--session-id", "s1")
    assert refused.returncode == 3
    assert refused.stderr.startswith("kenaz-launcher: a living session has the id 's1'")
    assert refused.stderr.count("\n") == 1
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=BOUND)
    assert world.run("--session-id", "s1").returncode == 0
    assert sorted(p.name for p in (world.state / "sessions").glob("s1*")) == ["s1", "s1~1"]


def test_a_long_state_directory_has_its_sockets_elsewhere(world: Any) -> None:
    world.state = world.state / ("a" * 110)
    world.environment["KENAZ_STATE_DIR"] = str(world.state)
    done = world.run("--session-id", "s1")
    assert done.returncode == 0
    made = [r for r in world.records("s1") if r["kind"] == "acquired" and r["resource"] == "runtime"]
    assert made[0]["handle"]["path"].startswith(str(world.runtime / "kenaz/s1-"))
    world.environment["XDG_RUNTIME_DIR"] = str(world.state)
    refused = world.run("--session-id", "s2")
    assert refused.returncode == 3
    assert "a socket's path would be too long" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_reader_that_goes_does_not_take_the_session_with_it(world: Any) -> None:
    # The end of `connecting` is written in any case, should all before it have been written already.
    quick = {"timeouts.connecting": "10s"}
    with world.start("--session-id", "s1", "--json", behaviour="mute", **quick) as running:
        assert running.stdout is not None
        running.stdout.readline()
        running.stdout.close()
        assert running.wait(BOUND) == 1
    assert world.records("s1")[-1]["kind"] == "end"
