"""`kenaz-launcher simulate`: do made-up sessions go as their scenarios expect?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from kenaz_engine.cli.failures import FAILED, SUCCESS, USAGE, CommandError
from kenaz_engine.cli.output import Paint, plain, print_json
from kenaz_engine.replay.scenario import Scenario, load_scenario
from kenaz_engine.spec.faults import Fault, InvalidFile
from kenaz_engine.spec.files import read


def configure(parser: argparse.ArgumentParser) -> None:
    """Which scenarios, and what to keep of them."""
    parser.add_argument(
        "scenarios", nargs="+", metavar="SCENARIO", help="the file of a scenario; `-` is stdin"
    )
    parser.add_argument(
        "--journal", metavar="FILE", help="write the session's journal to a new file (one scenario only)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--format", choices=("text", "json"), default="text", help="form of the report")
    form.add_argument(
        "--json", action="store_const", const="json", dest="format", help="same as --format json"
    )


def run(arguments: argparse.Namespace) -> int:
    """Loads every file before it runs any, so that a mistake in one is told at once."""
    if arguments.journal and len(arguments.scenarios) > 1:
        raise CommandError("--journal is for one scenario", "name one only", USAGE)
    scenarios: list[Scenario] = []
    faults: list[Fault] = []
    for path in arguments.scenarios:
        try:
            scenarios.append(load_scenario(*read(path)))
        except InvalidFile as invalid:
            faults += invalid.faults
    if faults:
        raise InvalidFile(faults)
    from kenaz_engine.replay.simulate import ScenarioResult, run_scenario

    results: list[ScenarioResult] = []
    for scenario in scenarios:
        results.append(result := run_scenario(scenario))
        if arguments.format == "text":
            _show(result)
        if arguments.journal:
            _write(Path(arguments.journal), result.journal())
    ok = all(result.ok for result in results)
    if arguments.format == "json":
        print_json({"ok": ok, "scenarios": [_data(result) for result in results]})
    return SUCCESS if ok else FAILED


def _write(path: Path, journal: bytes) -> None:
    try:
        with path.open("xb") as file:
            file.write(journal)
    except FileExistsError:
        raise CommandError(f"{path} is there already", "name a new file", USAGE) from None
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror}", "name another file") from None


def _show(result: Any) -> None:
    from kenaz_engine.replay.simulate import clock

    paint = Paint(sys.stdout)
    outcome = result.outcome
    verdict = f": {outcome.verdict}" if outcome.verdict else ""
    summary = f"`{outcome.state}` after {clock(outcome.seconds)}, {len(result.path)} states{verdict}"
    state = paint("ok", "green") if result.ok else paint("failed", "red")
    print(f"{result.scenario.file}: {state}: {plain(summary)}", flush=True)
    for failure in result.failures:
        first, *rest = failure.splitlines()
        print(f"  {plain(first)}")
        for line in rest:
            style = {"-": "red", "+": "green"}.get(line.strip()[:1], "")
            print(f"  {paint(plain(line), style) if style else plain(line)}")


def _data(result: Any) -> dict[str, Any]:
    outcome = result.outcome
    return {
        "file": result.scenario.file,
        "name": result.scenario.name,
        "ok": result.ok,
        "state": outcome.state,
        "success": outcome.success,
        "seconds": round(outcome.seconds, 3),
        "verdict": outcome.verdict or None,
        "also": list(outcome.also),
        "warnings": list(outcome.warnings),
        "left": [entry.resource for entry in outcome.left],
        "path": [
            {"state": step.state, "t": step.t, "event": step.event or None, "line": step.line}
            for step in result.path
        ],
        "failures": list(result.failures),
    }
