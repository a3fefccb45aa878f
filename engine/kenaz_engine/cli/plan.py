"""`kenaz-launcher plan`: what a session would be made of. Makes nothing."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from kenaz_drivers.contract import Capabilities, LaunchPlan
from kenaz_engine.cli.failures import ENVIRONMENT, SUCCESS
from kenaz_engine.cli.output import Paint, plain, print_json, table
from kenaz_engine.images.builds import Offered
from kenaz_engine.lifecycle.analysis import abort_bound
from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.session.check import telling_all
from kenaz_engine.session.guest import Layout
from kenaz_engine.session.lifecycles import find_lifecycle
from kenaz_engine.session.prepare import layout_of, plan_launch, survey
from kenaz_engine.session.prepared import Prepared
from kenaz_engine.session.vocabulary import VOCABULARY
from kenaz_engine.spec.files import read
from kenaz_engine.spec.resolve import ResolvedSession, describe, load_session
from kenaz_engine.spec.units import format_duration


@dataclass(frozen=True, slots=True)
class Deadline:
    """How long a state may last, in seconds, and what says so."""

    state: str
    timeout: float | None
    idle: float | None
    origin: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is shown. There is no `launch` without an image that is needed."""

    prepared: Prepared
    layout: Layout
    deadlines: tuple[Deadline, ...]
    launch: LaunchPlan | None


def configure(parser: argparse.ArgumentParser) -> None:
    """The same as for `run`, as far as it bears on the plan."""
    parser.add_argument("spec", metavar="SPEC", help="the session's file, or - for standard input")
    parser.add_argument(
        "--set", metavar="PATH=VALUE", action="append", default=[], help="override a value of the spec"
    )
    parser.add_argument("--session-id", metavar="ID", help="the session's id, instead of a random one")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(arguments: argparse.Namespace) -> int:
    """Shows the plan; fails when the session could not be run here."""
    text, file = read(arguments.spec)
    with telling_all():
        resolved = load_session(
            text, file, overrides=arguments.set, session_id=arguments.session_id, environment=os.environ
        )
    plan = make_plan(trio.run(survey, resolved))
    if arguments.json:
        print_json(plan_data(plan))
    else:
        sys.stdout.writelines(f"{line}\n" for line in _lines(plan, Paint(sys.stdout)))
    return ENVIRONMENT if plan.prepared.missing else SUCCESS


def make_plan(prepared: Prepared) -> Plan:
    """What follows from a prepared session. Raises DirectoryError and DriverError."""
    layout = layout_of(prepared)
    return Plan(
        prepared=prepared,
        layout=layout,
        deadlines=tuple(deadlines(find_lifecycle(prepared.resolved), prepared)),
        launch=None if prepared.missing or prepared.fetches else plan_launch(prepared, layout),
    )


def deadlines(written: Lifecycle, prepared: Prepared) -> Iterator[Deadline]:
    """The deadlines in force, against those that the lifecycle's file has."""
    resolved, capabilities = prepared.resolved, prepared.capabilities
    for state in prepared.lifecycle.states.values():
        if state.final:
            continue
        before = written.states[state.name].timeout
        if state.name in resolved.timeouts:
            was = "none" if before is None else format_duration(before)
            origin = f"{_origin(resolved, f'spec.timeouts.{state.name}')}, instead of {was}"
        elif before is not None and state.timeout != before:
            times = f"x{capabilities.deadline_scale:g}"
            origin = f"{format_duration(before)} {times} under {capabilities.accelerator}"
        else:
            origin = "the lifecycle"
        yield Deadline(state.name, state.timeout, state.idle, origin)


def _origin(resolved: ResolvedSession, path: str) -> str:
    return resolved.origins.get(path, "the spec")


def _chosen(prepared: Prepared) -> str:
    resolved = prepared.resolved
    if resolved.driver != "auto":
        return f"named by {_origin(resolved, 'spec.driver')}"
    if prepared.capabilities.accelerator == "tcg":
        return "auto: the first usable one, and none runs guests without emulation"
    if not prepared.capabilities.isolates:
        return "auto: the last resort, as nothing else is usable"
    return "auto: the first usable one"


# --- text ---------------------------------------------------------------------------------------------------


def _lines(plan: Plan, paint: Paint) -> Iterator[str]:
    prepared, capabilities = plan.prepared, plan.prepared.capabilities
    yield paint(f"session {prepared.resolved.id}", "bold")
    yield from table(list(_values(prepared.resolved)), indent="  ")
    yield paint(f"driver {prepared.driver.name}", "bold") + f": {_chosen(prepared)}"
    for name, considered in prepared.considered:
        yield f"  {name}: {'usable' if considered.usable else 'not usable'}"
        yield from reason_lines(considered, paint, indent="    ")
    yield paint("machine", "bold")
    facts = [
        ("architecture", prepared.arch),
        ("accelerator", capabilities.accelerator),
        ("transport", f"{prepared.transport}: {prepared.transport_reason}"),
        ("image", _image(plan)),
        *([("build", _build(prepared.build))] if prepared.build else []),
        ("directory", str(plan.layout.directory)),
        ("sockets", str(plan.layout.sockets)),
    ]
    yield from table(facts, indent="  ")
    yield paint(f"lifecycle {prepared.lifecycle.name}", "bold") + f": {_bound_words(prepared.lifecycle)}"
    rows = [(d.state, _timeout(d.timeout), _idle(d.idle), d.origin) for d in plan.deadlines]
    yield from table(rows, indent="  ")
    yield paint("command", "bold")
    if plan.launch is None:
        yield paint("  not known without the image", "red")
    else:
        for helper in plan.launch.helpers:
            yield f"  # before it, and for as long: {helper.name}"
            yield from (f"  {line}" for line in command_lines(helper.argv))
        yield from (f"  {line}" for line in command_lines(plan.launch.argv))
        if plan.launch.stdin:
            yield "  # which reads:"
            yield from (f"  {plain(line)}" for line in plan.launch.stdin.splitlines())
    if notes := notes_of(plan):
        yield paint("notes", "bold")
        yield from (f"  {plain(note)}" for note in notes)


def reason_lines(capabilities: Capabilities, paint: Paint, *, indent: str) -> Iterator[str]:
    """What `probe` looked at, and the mend of what is not as it should be."""
    for reason in capabilities.reasons:
        mark = paint("ok", "green") if reason.ok else paint("no", "red")
        mend = f" ({plain(reason.mend)})" if reason.mend and not reason.ok else ""
        yield f"{indent}{mark}  {plain(reason.text)}{mend}"


def command_lines(argv: Sequence[str]) -> list[str]:
    """The command, fit for a shell: one option a line with what belongs to it."""
    groups: list[list[str]] = []
    for word in argv:
        if not groups or word.startswith("-"):
            groups.append([])
        groups[-1].append(shlex.quote(word))
    lines = [" ".join(group) for group in groups]
    return [
        f"{'  ' if n else ''}{line}{' ' + chr(92) if n < len(lines) - 1 else ''}"
        for n, line in enumerate(lines)
    ]


def notes_of(plan: Plan) -> list[str]:
    """What the user should know, each once."""
    return list(dict.fromkeys([*plan.prepared.notes, *(plan.launch.notes if plan.launch else ())]))


def _values(resolved: ResolvedSession) -> Iterator[tuple[str, str, str]]:
    for path, value in _flat(_as_written(resolved)):
        yield path, plain(value), _origin_of(resolved, path)


def _as_written(resolved: ResolvedSession) -> dict[str, Any]:
    """The session by the paths of its file. Values of the environment are not for eyes."""
    spec = describe(resolved)
    metadata = {key: spec.pop(key) for key in ("id", "name", "labels")}
    spec["workbench"]["env"] = dict.fromkeys(spec["workbench"]["env"], "(hidden)")
    return {"metadata": metadata, "spec": spec}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        yield path, ", ".join(map(str, value)) or "none"
    else:
        yield path, "none" if value == {} else str(value)


def _origin_of(resolved: ResolvedSession, path: str) -> str:
    """A value that stands inside of one that was set as a whole comes from where that comes from."""
    while path and path not in resolved.origins:
        path = path.rpartition(".")[0]
    return resolved.origins.get(path, "default")


def _image(plan: Plan) -> str:
    prepared = plan.prepared
    if prepared.missing:
        hint = f" ({prepared.missing.hint})" if prepared.missing.hint else ""
        return f"{prepared.resolved.image} is missing: {prepared.missing}{hint}"
    if prepared.fetches:
        return f"{prepared.resolved.image} is not here yet: the session fetches it first"
    if prepared.image is None:
        return f"none: the driver {prepared.driver.name} boots no image"
    image = prepared.image
    if not image.digest:
        return f"{image.root}, as it is: nothing says what it must be"
    return f"{image.name}:{image.tag} {image.digest}"


def _build(offered: Offered) -> str:
    name = offered.name
    return (
        f"{name} {offered.here.digest}" if offered.here else f"{name} is not here yet: the session fetches it"
    )


def _bound_words(lifecycle: Lifecycle) -> str:
    bound = abort_bound(lifecycle, VOCABULARY).seconds
    return (
        "an abort may never end it"
        if math.isinf(bound)
        else f"an abort ends it within {format_duration(bound)}"
    )


def _timeout(seconds: float | None) -> str:
    return "no deadline" if seconds is None else f"at most {format_duration(seconds)}"


def _idle(seconds: float | None) -> str:
    return "" if seconds is None else f"idle at most {format_duration(seconds)}"


# --- JSON ---------------------------------------------------------------------------------------------------


def plan_data(plan: Plan) -> dict[str, Any]:
    """The plan as JSON; docs/reference/cli.md lists the members."""
    prepared, capabilities, launch = plan.prepared, plan.prepared.capabilities, plan.launch
    bound = abort_bound(prepared.lifecycle, VOCABULARY).seconds
    return {
        "session": describe(prepared.resolved),
        "origins": {
            path: _origin_of(prepared.resolved, path) for path, _ in _flat(_as_written(prepared.resolved))
        },
        "driver": {
            "name": prepared.driver.name,
            "reason": _chosen(prepared),
            "considered": [
                {"name": name, "usable": seen.usable, "reasons": reasons_data(seen)}
                for name, seen in prepared.considered
            ],
        },
        "arch": prepared.arch,
        "accelerator": capabilities.accelerator,
        "isolates": capabilities.isolates,
        "transport": {"name": prepared.transport, "reason": prepared.transport_reason},
        "image": _image_data(plan),
        "build": prepared.build
        and {"name": prepared.build.name, "digest": prepared.build.here and prepared.build.here.digest},
        "directory": str(plan.layout.directory),
        "sockets": str(plan.layout.sockets),
        "lifecycle": prepared.lifecycle.name,
        "abortBound": None if math.isinf(bound) else bound,
        "deadlines": [
            {"state": d.state, "timeout": d.timeout, "idle": d.idle, "origin": d.origin}
            for d in plan.deadlines
        ],
        "command": None
        if launch is None
        else {
            "argv": list(launch.argv),
            "stdin": launch.stdin,
            "environment": dict(launch.environment),
            "descriptors": {str(number): purpose for number, purpose in launch.descriptors.items()},
            "helpers": [
                {
                    "name": helper.name,
                    "argv": list(helper.argv),
                    "environment": dict(helper.environment),
                    "sockets": list(helper.sockets),
                }
                for helper in launch.helpers
            ],
        },
        "notes": notes_of(plan),
    }


def reasons_data(capabilities: Capabilities) -> list[dict[str, Any]]:
    """What `probe` looked at, as JSON."""
    return [{"ok": r.ok, "text": r.text, "mend": r.mend or None} for r in capabilities.reasons]


def _image_data(plan: Plan) -> dict[str, Any] | None:
    image, missing = plan.prepared.image, plan.prepared.missing
    if missing:
        return {"name": plan.prepared.resolved.image, "missing": str(missing), "hint": missing.hint or None}
    if plan.prepared.fetches:
        return {"name": plan.prepared.resolved.image, "fetched": False}
    if image is None:
        return None
    return {"name": image.name, "tag": image.tag, "digest": image.digest or None}
