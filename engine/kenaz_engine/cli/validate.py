"""`kenaz-launcher validate`: everything that is wrong with files, and nothing else. Imports little, late."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kenaz_engine.cli.failures import SUCCESS, USAGE
from kenaz_engine.cli.output import Paint, plain, print_json
from kenaz_engine.cli.specfiles import kind_of, load_anywhere
from kenaz_engine.lifecycle.analysis import abort_bound
from kenaz_engine.lifecycle.loader import load_lifecycle
from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.session.check import check
from kenaz_engine.session.lifecycles import lifecycle_faults
from kenaz_engine.session.vocabulary import VOCABULARY
from kenaz_engine.spec.faults import Fault, InvalidFile
from kenaz_engine.spec.files import is_ours, read
from kenaz_engine.spec.units import format_duration
from kenaz_engine.spec.yamlfile import in_order


@dataclass(frozen=True, slots=True)
class Report:
    """What was found in a file. `kind` is empty where it could not be told, `lifecycle` is None where none
    could be loaded."""

    file: str
    kind: str
    faults: Sequence[Fault]
    lifecycle: Lifecycle | None = None

    @property
    def ok(self) -> bool:
        """True when nothing refuses the file."""
        return not any(fault.level == "error" for fault in self.faults)


def configure(parser: argparse.ArgumentParser) -> None:
    """Files, and the form of the report."""
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="a session, lifecycle, scenario or catalog; `-` is stdin"
    )
    parser.add_argument(
        "--ours-only", action="store_true", help="pass over files without `apiVersion: kenaz.dev/...`"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--format", choices=("text", "json"), default="text", help="form of the report")
    form.add_argument(
        "--json", action="store_const", const="json", dest="format", help="same as --format json"
    )


def run(arguments: argparse.Namespace) -> int:
    """Checks every file, also after one that is invalid."""
    files = [path for path in arguments.files if path == "-" or not arguments.ours_only or is_ours(path)]
    if arguments.format == "json":
        reports = [examine_file(path) for path in files]
        print_json({"ok": all(report.ok for report in reports), "files": [_data(r) for r in reports]})
    else:
        reports = []
        for path in files:
            reports.append(report := examine_file(path))
            _show(report)
    return SUCCESS if all(report.ok for report in reports) else USAGE


def examine_file(path: str) -> Report:
    """What is wrong with the file at `path`, and what it holds."""
    file, kind = path, ""
    try:
        text, file = read(path)
        kind = kind_of(text, file)
        if kind == "Lifecycle":
            lifecycle = load_lifecycle(text, file)
            return Report(file, kind, lifecycle_faults(lifecycle), lifecycle)
        if kind == "Scenario":
            from kenaz_engine.replay.scenario import load_scenario

            # Its lifecycle is not analysed: a scenario may well be there to show what is wrong with it.
            return Report(file, kind, [], load_scenario(text, file).lifecycle)
        if kind == "Catalog":
            from kenaz_engine.images.catalogfile import load_catalog

            load_catalog(text, file)
            return Report(file, kind, ())
        return _examine_session(text, file)
    except InvalidFile as invalid:
        return Report(file, kind, invalid.faults)


def _examine_session(text: str, file: str) -> Report:
    resolved, faults = load_anywhere(text, file)
    lifecycle, found = check(resolved)
    return Report(file, "Session", in_order([*faults, *found]), lifecycle)


def _show(report: Report) -> None:
    if report.faults:
        paint = Paint(sys.stderr)
        for fault in report.faults:
            print(fault_line(fault, paint), file=sys.stderr, flush=True)
    if report.ok:
        print(f"{plain(report.file)}: {Paint(sys.stdout)('ok', 'green')}: {_summary(report)}", flush=True)


def fault_line(fault: Fault, paint: Paint) -> str:
    """A fault as compilers print theirs: the place first, and a warning called one."""
    place = plain(str(fault.place))
    rest = plain(str(fault)).removeprefix(f"{place}: ")
    warning = paint("warning: ", "yellow") if fault.level == "warning" else ""
    return f"{paint(place, 'bold')}: {warning}{rest}"


def _summary(report: Report) -> str:
    lifecycle = report.lifecycle
    if lifecycle is None:
        return report.kind.lower()
    what = (
        "lifecycle" if report.kind == "Lifecycle" else f"{report.kind.lower()} on lifecycle {lifecycle.name}"
    )
    bound = abort_bound(lifecycle, VOCABULARY).seconds
    end = (
        "an abort may never end it"
        if math.isinf(bound)
        else f"an abort ends it within {format_duration(bound)}"
    )
    return f"{what}, {len(lifecycle.states)} states, {end}"


def _data(report: Report) -> dict[str, Any]:
    data: dict[str, Any] = {
        "file": report.file,
        "kind": report.kind or None,
        "ok": report.ok,
        "faults": [fault_data(fault) for fault in report.faults],
    }
    if report.ok and report.lifecycle is not None:
        bound = abort_bound(report.lifecycle, VOCABULARY).seconds
        data["lifecycle"] = {
            "name": report.lifecycle.name,
            "states": len(report.lifecycle.states),
            "abortBound": None if math.isinf(bound) else bound,
        }
    return data


def fault_data(fault: Fault) -> dict[str, Any]:
    """A fault as JSON; line and column are 0 where it concerns the file as a whole."""
    return {
        "file": fault.place.file,
        "line": fault.place.line,
        "column": fault.place.column,
        "level": fault.level,
        "code": fault.code or None,
        "path": fault.path,
        "message": fault.message,
        "hint": fault.hint or None,
    }
