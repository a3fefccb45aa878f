"""How long the command takes to start, against bare Python importing the same libraries. Prints JSON.

Each is a fresh process; the best of several rounds, taken in turns so that all see the same machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 15
LAUNCHER = str(Path(sys.executable).with_name("kenaz-launcher"))
SPEC = str(Path(__file__).resolve().parents[2] / "specs" / "sessions" / "hello.yaml")

COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "imports": [sys.executable, "-c", "import yaml, jsonschema"],
    "version": [LAUNCHER, "version"],
    "validate": [LAUNCHER, "validate", SPEC],
}
RATIOS = {"version": ("python", 2.5), "validate": ("imports", 1.3)}
"""Each against its baseline, with the ratio that the design allows."""


def seconds(command: list[str]) -> float:
    """Wall time of one run that has to succeed."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> int:
    """Measures, prints, and returns 1 when a bound is not held."""
    # An installed package has its bytecode; a checkout that was just cloned has not.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    times = {name: [seconds(command)] for name, command in COMMANDS.items()}
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    best = {name: min(rounds) for name, rounds in times.items()}
    found = {name: round(best[name] / best[base], 2) for name, (base, _) in RATIOS.items()}
    missed = [name for name, (_, bound) in RATIOS.items() if found[name] > bound]
    print(
        json.dumps(
            {
                "milliseconds": {name: round(value * 1e3, 1) for name, value in best.items()},
                "ratios": found,
                "bounds": {name: bound for name, (_, bound) in RATIOS.items()},
                "missed": missed,
            },
            indent=2,
        )
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
