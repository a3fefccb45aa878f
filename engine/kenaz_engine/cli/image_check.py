"""`image check`: boots an image once, and says what of the guest contract holds."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from kenaz_engine.cli.failures import FAILED, SUCCESS
from kenaz_engine.cli.output import plain, print_json
from kenaz_engine.journal.reader import read_journal
from kenaz_engine.session.check import telling_all
from kenaz_engine.session.contract import Point, points
from kenaz_engine.session.launch import Result, Session
from kenaz_engine.session.leftovers import leftovers
from kenaz_engine.session.prepare import prepare
from kenaz_engine.spec.resolve import load_session

if TYPE_CHECKING:
    from kenaz_engine.channel.harness import HarnessLink

BUILD = "contract-check"


def check(arguments: argparse.Namespace) -> int:
    """Runs a session of the image to its end, and reads its journal. Fails unless every point holds."""
    result = trio.run(_run, arguments)
    found = points(read_journal(result.journal).records, BUILD)
    left = leftovers(result.journal, result.outcome.left)
    ok = all(point.holds for point in found) and not left
    if arguments.json:
        print_json(
            {"ok": ok, "image": arguments.image, "journal": str(result.journal), "points": _json(found)}
        )
    else:
        for point in found:
            mark = {True: "holds", False: "FAILS", None: "not seen"}[point.holds]
            seen = f" ({plain(point.seen)})" if point.seen else ""
            print(f"{point.number:>3}  {mark:<9} {point.text}{seen}")
        for line in () if ok else result.console:
            print(f"     | {plain(line)}")
        print(f"{sum(p.holds is True for p in found)} of {len(found)} points hold; journal {result.journal}")
    return SUCCESS if ok else FAILED


async def _run(arguments: argparse.Namespace) -> Result:
    image = arguments.image if "/" not in arguments.image else str(Path(arguments.image).absolute())
    document: dict[str, Any] = {
        "apiVersion": "kenaz.dev/v1",
        "kind": "Session",
        "metadata": {"name": "check"},
        "spec": {
            "image": image,
            "machine": {
                "arch": arguments.arch,
                "memory": arguments.memory,
                "disk": arguments.disk,
                "cpus": 2,
            },
            "workbench": {"build": BUILD},
            "tools": {"allow": ["fs.*"], "deny": ["fs.delete"]},
        },
    }
    with telling_all():
        resolved = load_session(
            json.dumps(document), "image check", overrides=arguments.set, environment=os.environ
        )
    prepared = await prepare(resolved)

    async def connect() -> HarnessLink:
        from kenaz_engine.channel.harness import DemoHarness

        return DemoHarness(lambda text: None, prepared.capabilities.deadline_scale)

    print(
        f"booting {plain(image)} on {prepared.driver.name} ({prepared.capabilities.accelerator})",
        file=sys.stderr,
    )
    return await Session(prepared, connect, lambda stream, text: None).run()


def _json(found: list[Point]) -> list[dict[str, Any]]:
    return [{"number": p.number, "text": p.text, "holds": p.holds, "seen": p.seen} for p in found]
