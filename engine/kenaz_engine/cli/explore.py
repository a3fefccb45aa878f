"""`kenaz-launcher explore`: what can go wrong on a lifecycle, all of it, on virtual time."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kenaz_engine.cli.failures import FAILED, SUCCESS, USAGE, CommandError
from kenaz_engine.cli.lifecycles import open_lifecycle
from kenaz_engine.cli.output import Paint, plain, print_json
from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.replay.explore import ORDERS, Found, Report, explore, nominal_worlds
from kenaz_engine.replay.script import EVERY
from kenaz_engine.replay.shrink import scenario_of, shrink
from kenaz_engine.session.lifecycles import shipped_lifecycles
from kenaz_engine.spec.schema import suggestion

SHOWN = 10
"""Transitions not taken that are listed; of more than these only the number is told."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Which lifecycle, how far, and what to keep of what is found."""
    parser.add_argument(
        "lifecycle",
        metavar="LIFECYCLE",
        help="a shipped lifecycle's name, or the file of one or of a session",
    )
    parser.add_argument(
        "--faults",
        type=int,
        choices=(0, 1, 2),
        default=1,
        metavar="N",
        help="at most so many at once, 0 to 2 (default: 1)",
    )
    parser.add_argument(
        "--world", metavar="NAME", default="all", help="the nominal world to explore (default: all)"
    )
    parser.add_argument(
        "--order", choices=ORDERS, default="both", help="of simultaneous events (default: both)"
    )
    parser.add_argument(
        "--write", metavar="DIR", type=Path, help="write a scenario for each breach to this directory"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--format", choices=("text", "json"), default="text", help="form of the report")
    form.add_argument(
        "--json", action="store_const", const="json", dest="format", help="same as --format json"
    )


def run(arguments: argparse.Namespace) -> int:
    """Explores, shrinks what is found, and tells it."""
    lifecycle = open_lifecycle(arguments.lifecycle)
    known = list(nominal_worlds(lifecycle))
    if arguments.world not in ("all", *known):
        hint = suggestion(arguments.world, ["all", *known])
        raise CommandError(f"there is no world {arguments.world!r}", hint, USAGE)
    begun = time.monotonic()
    worlds = known if arguments.world == "all" else [arguments.world]
    report = explore(lifecycle, faults=arguments.faults, worlds=worlds, order=arguments.order)
    found = [shrink(lifecycle, each) for each in report.found]
    files = _write(arguments.write, found, arguments.lifecycle, lifecycle) if arguments.write else []
    if arguments.format == "json":
        print_json(_data(report, found, files))
    else:
        _show(report, found, files, time.monotonic() - begun)
    return FAILED if found else SUCCESS


def _write(directory: Path, found: Sequence[Found], what: str, lifecycle: Lifecycle) -> list[Path]:
    """A scenario for each breach. Files of earlier runs are written anew."""
    files = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        named = what if what in shipped_lifecycles() else _path_from(directory, what)
        for each in found:
            name = f"{lifecycle.name}-{each.breach.law}-{each.breach.state}".replace("_", "-").lower()
            file = directory / f"{name}.scenario.yaml"
            file.write_text(scenario_of(each, name[:63].rstrip("-"), named), "utf-8")
            files.append(file)
    except OSError as error:
        raise CommandError(f"{directory} cannot be written: {error.strerror}", "name another one") from None
    return files


def _path_from(directory: Path, what: str) -> str:
    """The lifecycle's path as the scenario is to name it: from its own directory, where there is a way."""
    try:
        path = Path(os.path.relpath(what, directory)).as_posix()
    except ValueError:  # another drive
        return Path(what).resolve().as_posix()
    return path if "/" in path else f"./{path}"


def _show(report: Report, found: Sequence[Found], files: Sequence[Path], seconds: float) -> None:
    paint = Paint(sys.stdout)
    worlds = ", ".join(f"{world} {runs}" for world, runs in report.runs.items())
    print(f"{sum(report.runs.values())} sessions in {seconds:.1f} s ({worlds})")
    print(f"states entered: {sum(report.states.values())} of {len(report.states)}")
    taken, uncovered = sum(report.transitions.values()), report.uncovered
    print(f"transitions taken: {taken} of {len(report.transitions)}")
    for transition in uncovered[:SHOWN]:
        print(f"  not taken: {transition} (line {transition.line})")
    if len(uncovered) > SHOWN:
        print(f"  and {len(uncovered) - SHOWN} more")
    if not found:
        print(f"{paint('ok', 'green')}: no law was broken")
    for index, each in enumerate(found):
        print(f"{paint('broken', 'red')}: {plain(str(each.breach))}")
        print(f"  {plain(_how(each))}")
        if files:
            print(f"  {files[index]}")


def _how(found: Found) -> str:
    """The script in a line."""
    cues = [
        f"{cue.what} at {cue.at}"
        + (" each time" if cue.nth == EVERY else f" (time {cue.nth})" if cue.nth > 1 else "")
        + (f" after {cue.after:g} s" if cue.after else "")
        for cue in found.script.cues
    ]
    order = ", simultaneous events the other way round" if found.script.opposite else ""
    return f"by {', then '.join(cues) or 'nothing at all'}{order}"


def _data(report: Report, found: Sequence[Found], files: Sequence[Path]) -> dict[str, Any]:
    return {
        "ok": not found,
        "lifecycle": report.lifecycle.name,
        "runs": dict(report.runs),
        "endings": dict(report.endings),
        "states": dict(report.states),
        "transitions": [
            {
                "state": transition.state or None,
                "event": transition.event,
                "nth": transition.nth,
                "target": transition.target,
                "line": transition.line,
                "taken": taken,
            }
            for transition, taken in report.transitions.items()
        ],
        "breaches": [
            {
                "law": each.breach.law,
                "state": each.breach.state,
                "event": each.breach.event or None,
                "message": each.breach.message,
                "world": each.world,
                "how": _how(each),
                "file": str(files[index]) if files else None,
            }
            for index, each in enumerate(found)
        ],
    }
