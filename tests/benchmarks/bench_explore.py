"""How long it takes to explore `standard` in one nominal world, both orders of events. Prints JSON.

Seconds of wall time on all processors, the best of a few rounds, and of the processor for one session. The
bounds are for two cores; `ratio` is against trio alone: a run of as many tasks that do nothing but wait.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import trio
import trio.testing

from kenaz_engine.lifecycle.machine import Table
from kenaz_engine.replay.explore import explore, nominal_worlds
from kenaz_engine.replay.stage import Stage
from kenaz_engine.session.lifecycles import shipped_lifecycle
from kenaz_engine.session.vocabulary import VOCABULARY

WORLD = "harness-ends"
ROUNDS = 3
SESSIONS = 100

BOUNDS = {"singles_s": 2.0, "pairs_s": 15.0}
"""What the design allows: all single faults, and all pairs of faults."""


def best(call: Callable[[], Any], rounds: int, clock: Callable[[], float]) -> float:
    """Seconds of the fastest round."""
    times = []
    for _ in range(rounds):
        began = clock()
        call()
        times.append(clock() - began)
    return min(times)


async def waiting(tasks: int) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(tasks):
            nursery.start_soon(trio.sleep, number)


def bare() -> None:
    """A session starts about as many tasks as a state has, times its states."""
    for _ in range(SESSIONS):
        trio.run(waiting, 12, clock=trio.testing.MockClock(autojump_threshold=0))


def main() -> int:
    """Measures, prints, and returns 1 when a bound is not held."""
    lifecycle = shipped_lifecycle("standard")
    stage, script = Stage(lifecycle, VOCABULARY, Table), nominal_worlds(lifecycle)[WORLD]

    def play() -> None:
        for _ in range(SESSIONS):
            stage.play(script)

    session, alone = (best(call, ROUNDS, time.process_time) / SESSIONS for call in (play, bare))
    sessions = {}
    found: dict[str, Any] = {
        "session_ms": round(session * 1e3, 2),
        "session_ratio": round(session / alone, 2),
    }
    for name, faults, rounds in (("singles", 1, ROUNDS), ("pairs", 2, 1)):

        def run(name: str = name, faults: int = faults) -> None:
            report = explore(lifecycle, faults=faults, worlds=[WORLD])
            assert report.found == ()
            sessions[name] = sum(report.runs.values())

        found[f"{name}_s"] = round(best(run, rounds, time.perf_counter), 2)
    missed = [name for name, bound in BOUNDS.items() if found[name] > bound]
    print(json.dumps({"explore": found, "sessions": sessions, "bounds": BOUNDS, "missed": missed}, indent=2))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
