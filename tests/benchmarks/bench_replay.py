"""How fast journals are replayed: read, chain checked, decided again, compared. Prints JSON.

Records a second, of the processor's time, the best of several rounds. `session` is a journal of a real QEMU
session, over and over, its header included; `long` one journal of a hundred thousand records, a third of them
events. `ratio` is against a bare loop over the same lines that parses and hashes them and does nothing else.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kenaz_engine.journal.reader import read_journal
from kenaz_engine.journal.records import FORMAT
from kenaz_engine.journal.writer import Journal
from kenaz_engine.lifecycle.loader import load_lifecycle
from kenaz_engine.lifecycle.machine import Event, Table
from kenaz_engine.lifecycle.recorded import decision_fields, event_fields, lifecycle_fields
from kenaz_engine.replay.replayer import replay
from kenaz_engine.session.vocabulary import VOCABULARY

ROUNDS = 10
TIMES = 300
STEPS = 33_333

BOUNDS = {"session_per_second": 100_000, "long_per_second": 100_000}
"""What the design allows: records a second, at least."""

SESSION = Path(__file__).parents[1] / "journals" / "qemu-hello.journal.jsonl"

LOOP = """
apiVersion: kenaz.dev/v1
kind: Lifecycle
metadata: {name: loop}
initial: there
states:
  there: {invoke: vm.stop, timeout: 10s, on: {done: back}}
  back: {invoke: vm.kill, timeout: 10s, on: {done: there}}
"""


def rate(call: Callable[[], int]) -> float:
    """Records a second in the fastest round; `call` returns how many it did."""
    rates = []
    for _ in range(ROUNDS):
        start = time.process_time()
        count = call()
        rates.append(count / (time.process_time() - start))
    return max(rates)


def replayed(path: Path) -> int:
    result = replay(read_journal(path))
    assert result.ok, str(result)
    return result.records


def bare(path: Path) -> int:
    lines = path.read_bytes().splitlines()
    for line in lines:
        json.loads(line)
        hashlib.sha256(line).hexdigest()
    return len(lines)


def make_long(path: Path) -> None:
    """Goes there and back; analysis would refuse it."""
    lifecycle = load_lifecycle(LOOP, "loop.yaml")
    table = Table(lifecycle, VOCABULARY)
    journal = Journal(path)
    journal.append("header", {"format": FORMAT, **lifecycle_fields(lifecycle)})
    decision = table.start()
    for _ in range(STEPS):
        at = decision.snapshot
        activity = lifecycle.states[at.state].invoke
        journal.append(
            "entered", {"state": at.state, "entry": at.entry, "activity": activity, "timeout": 10.0}
        )
        event = Event("done", {}, at.entry, activity)
        decision = table.decide(at, event)
        journal.append("event", event_fields(event))
        journal.append("decision", decision_fields(decision))
    journal.close()


def measure(folder: Path) -> dict[str, Any]:
    long = folder / "long.jsonl"
    make_long(long)
    session, whole = rate(lambda: sum(replayed(SESSION) for _ in range(TIMES))), rate(lambda: replayed(long))
    return {
        "session_per_second": round(session),
        "session_ratio": round(rate(lambda: sum(bare(SESSION) for _ in range(TIMES))) / session, 2),
        "long_per_second": round(whole),
        "long_ratio": round(rate(lambda: bare(long)) / whole, 2),
    }


def main() -> int:
    """Measures, prints, and returns 1 when a bound is not held."""
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    missed = [name for name, bound in BOUNDS.items() if found[name] < bound]
    print(json.dumps({"replay": found, "bounds": BOUNDS, "missed": missed}, indent=2))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
