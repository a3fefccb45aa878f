"""What the core costs per event: deciding and recording. Prints JSON; needs no hypervisor.

Times are of the processor, the best of several rounds, in microseconds: other work on the machine only adds.
`ratio` is against a baseline measured in the same run: the same bytes without our code around them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from kenaz_engine.journal.writer import Journal
from kenaz_engine.lifecycle.loader import load_lifecycle
from kenaz_engine.lifecycle.machine import Event, Machine
from kenaz_engine.lifecycle.recorded import decision_fields, event_fields
from kenaz_engine.session.vocabulary import VOCABULARY

ROUNDS = 10

BOUNDS = {"decide_recorded": 20.0, "append": 15.0}
"""What the design allows, in microseconds."""


def best(call: Callable[[], int]) -> float:
    """Microseconds per item of the fastest round; `call` returns how many items it did."""
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        count = call()
        times.append((time.process_time() - start) / count * 1e6)
    return min(times)


def nominal(machine: Machine) -> list[Event]:
    """The events of a session of `standard` that ends well."""
    at, events = machine.start().snapshot, []
    acquired = {
        "image.ensure": {"image": 1},
        "disk.allocate": {"disk": 2, "config": 3, "socket": 4},
        "vm.start": {"vm": 5},
        "channel.accept": {"channel": 6},
    }
    while not machine.lifecycle.states[at.state].final:
        activity = machine.lifecycle.states[at.state].invoke
        data = {"acquired": acquired[activity]} if activity in acquired else {}
        events.append(Event("done", data, at.entry, activity))
        at = machine.decide(at, events[-1]).snapshot
    return events


def decide(machine: Machine, events: Sequence[Event], append: Callable[[str, Mapping[str, Any]], Any]) -> int:
    at = machine.start().snapshot
    for event in events:
        decision = machine.decide(at, event)
        append("decision", decision_fields(decision))
        at = decision.snapshot
    return len(events)


def measure(folder: Path) -> dict[str, Any]:
    source = resources.files("kenaz_specs") / "lifecycles" / "standard.yaml"
    machine = Machine(load_lifecycle(source.read_text("utf-8"), "standard.yaml"), VOCABULARY)
    events = nominal(machine)
    journals = (Journal(folder / f"{number}.jsonl") for number in range(1000))

    def repeated(append: Callable[[str, Mapping[str, Any]], Any]) -> int:
        return sum(decide(machine, events, append) for _ in range(300))

    def recorded() -> int:
        journal = next(journals)
        count = repeated(journal.append)
        journal.close()
        return count

    def ignored() -> int:
        at, event = machine.start().snapshot, Event("unknown")
        for _ in range(5000):
            machine.decide(at, event)
        return 5000

    record = event_fields(events[2])

    def append() -> int:
        journal = next(journals)
        for _ in range(5000):
            journal.append("event", record)
        journal.close()
        return 5000

    def append_bare() -> int:
        """The same work by hand: encode, hash, write."""
        file = os.open(folder / "bare", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        prev = ""
        for seq in range(5000):
            line = json.dumps(
                {"seq": seq, "t": 1.234567, "wall": 1.7e9, "kind": "event", **record, "prev": prev}
            )
            prev = hashlib.sha256(line.encode()).hexdigest()
            os.write(file, line.encode() + b"\n")
        os.close(file)
        return 5000

    appended, bare = best(append), best(append_bare)
    return {
        "decide": round(best(lambda: repeated(lambda kind, fields: None)), 2),
        "decide_recorded": round(best(recorded), 2),
        "decide_ignored": round(best(ignored), 2),
        "append": round(appended, 2),
        "append_ratio": round(appended / bare, 2),
    }


def main() -> int:
    """Measures, prints, and returns 1 when a bound is not held."""
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    missed = [name for name, bound in BOUNDS.items() if found[name] > bound]
    print(json.dumps({"microseconds": found, "bounds": BOUNDS, "missed": missed}, indent=2))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
