"""Many real sessions in one launcher process, and what they leave in it and on the host. Prints JSON.

    python tests/soak.py [--process N] [--qemu N] [--at-once N] [--minutes M]

N sessions of each driver in sequence, then N of the driver `process` at once, twice. With `--minutes` all of
that over and over, until so many minutes have passed. Exits with 1 when a session did not succeed, when
anything is left of one, or when the process has grown by more than BOUNDS.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import trio

from kenaz_engine.channel.harness import DemoHarness
from kenaz_engine.session.launch import Session
from kenaz_engine.session.leftovers import leftovers
from kenaz_engine.session.prepare import prepare
from kenaz_engine.spec.resolve import load_session

SPEC = Path(__file__).resolve().parents[1] / "specs" / "sessions" / "hello.yaml"
RECORD = {"journal.jsonl", "console.log"}

WARM_UP = 3
"""Sessions before the first look: what is imported, compiled and cached once comes with them."""

BOUNDS = {
    "descriptors": 0,
    "children": 0,
    # trio keeps a worker thread for ten seconds after its last work.
    "threads": 1,
    # Less than one that stays with each of two hundred sessions.
    "objects": 150,
    # Ten KiB that stay with each of two hundred sessions would be seen; the allocator keeps some pages.
    "kibibytes": 2 * 1024,
}
"""By how much each figure may grow from the first look to the last, over any number of sessions."""


PASSED_OVER = {"CancelScope", "CancelReason", "tuple"}
"""Types that are not counted: trio keeps deadlines that nobody needs until they pass, or are a thousand."""


def census() -> dict[str, int]:
    """What this process holds."""
    gc.collect()
    statm = Path("/proc/self/statm").read_text().split()
    tasks = Path("/proc/self/task")
    return {
        "descriptors": len(list(Path("/proc/self/fd").iterdir())) - 1,  # less the one that looks
        "children": sum(len((task / "children").read_text().split()) for task in tasks.iterdir()),
        "threads": len(list(tasks.iterdir())),
        "objects": sum(type(one).__name__ not in PASSED_OVER for one in gc.get_objects()),
        "kibibytes": int(statm[1]) * resource.getpagesize() // 1024,
    }


class Soak:
    """The sessions of one run, in directories of their own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.faults: list[str] = []
        self.sessions = 0
        self._text = SPEC.read_text()

    async def session(self, driver: str) -> None:
        """One, from its spec to nothing left."""
        overrides = [f"spec.driver={driver}"]
        resolved = load_session(self._text, SPEC.name, overrides=overrides, environment=os.environ)
        prepared = await prepare(resolved)
        with trio.fail_after(300):
            result = await Session(prepared, _harness, lambda stream, text: None).run()
        self.sessions += 1
        if not result.outcome.success:
            self.faults.append(
                f"{result.directory.name}: {result.outcome.verdict or result.outcome.internal}"
            )
        self.faults += leftovers(result.journal, result.outcome.left)

    async def in_sequence(self, driver: str, count: int) -> None:
        """One after the other."""
        for _ in range(count):
            await self.session(driver)

    async def at_once(self, driver: str, count: int) -> None:
        """All side by side."""
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(self.session, driver)

    def litter(self) -> list[str]:
        """Files beside the records of sessions."""
        files = (path for path in self.home.rglob("*") if not path.is_dir() and path.name != ".creating")
        return [str(path) for path in files if path.name not in RECORD]


async def _harness() -> DemoHarness:
    return DemoHarness(lambda line: None)


async def measure(
    soak: Soak, what: str, run: Callable[[int], Awaitable[None]], count: int, warm: int
) -> dict[str, Any]:
    """Runs some to warm up, then all between two looks."""
    await run(warm)
    before, began = census(), time.monotonic()
    await run(count)
    seconds, after = time.monotonic() - began, census()
    grown = {name: after[name] - before[name] for name in before}
    soak.faults += [f"{what}: {name} grew by {grown[name]}" for name in grown if grown[name] > BOUNDS[name]]
    soak.faults += [f"{what}: {path} was left" for path in soak.litter()]
    return {"what": what, "sessions": count, "seconds": round(seconds, 1), "before": before, "grown": grown}


async def main(soak: Soak, arguments: argparse.Namespace) -> None:
    deadline = time.monotonic() + 60 * arguments.minutes
    parts = [
        ("process in sequence", partial(soak.in_sequence, "process"), arguments.process, WARM_UP),
        ("qemu in sequence", partial(soak.in_sequence, "qemu"), arguments.qemu, 1),
        ("process at once", partial(soak.at_once, "process"), arguments.at_once, arguments.at_once),
    ]
    first: dict[str, int] = {}
    while True:
        for what, run, count, warm in parts:
            if count:
                print(json.dumps(await measure(soak, what, run, count, warm)), flush=True)
        now = census()
        first = first or now
        grown = {name: now[name] - first[name] for name in now}
        soak.faults += [
            f"in all: {name} grew by {grown[name]}" for name in grown if grown[name] > BOUNDS[name]
        ]
        if soak.faults or time.monotonic() >= deadline:
            print(
                json.dumps({"what": "all", "sessions": soak.sessions, "grown": grown, "faults": soak.faults})
            )
            return


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Runs many sessions in one process.", allow_abbrev=False)
    for option in ("process", "qemu", "at-once"):
        parser.add_argument(f"--{option}", type=int, default=0, metavar="N")
    parser.add_argument("--minutes", type=float, default=0.0, metavar="M")
    # As a service would: fifty sessions have more files open than most shells allow.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory(prefix="kz-soak-") as directory:
        for name, folder in (("KENAZ_STATE_DIR", "s"), ("XDG_RUNTIME_DIR", "r"), ("TMPDIR", "t")):
            (Path(directory) / folder).mkdir(mode=0o700)
            os.environ[name] = f"{directory}/{folder}"
        soak = Soak(Path(directory))
        trio.run(main, soak, parser.parse_args())
    sys.exit(bool(soak.faults))
