"""Scenarios (`kind: Scenario`): from YAML with every fault at its place, and back to YAML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kenaz_engine.lifecycle.loader import load_lifecycle
from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.lifecycle.vocabulary import Vocabulary
from kenaz_engine.replay.script import EVERY, FAULTS, REQUESTS, WORK, Cue, Script, point, points_of
from kenaz_engine.session.lifecycles import is_path, shipped_lifecycle, shipped_lifecycles
from kenaz_engine.session.vocabulary import VOCABULARY
from kenaz_engine.spec import schema, yamlfile
from kenaz_engine.spec.faults import Fault, InvalidFile
from kenaz_engine.spec.files import STDIN, read
from kenaz_engine.spec.units import format_duration, parse_duration
from kenaz_engine.spec.yamlfile import Document, dotted, shorten


@dataclass(frozen=True, slots=True)
class Expectation:
    """What must come of a scenario; None for what is not looked at. Times are in seconds."""

    path: tuple[str, ...] | None = None
    state: str | None = None
    verdict: str | None = None
    also: tuple[str, ...] | None = None
    warnings: tuple[str, ...] | None = None
    at_least: float | None = None
    at_most: float | None = None
    left: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Scenario:
    """A script for one lifecycle, and what must come of it."""

    name: str
    lifecycle: Lifecycle
    script: Script = field(default_factory=Script)
    expect: Expectation = Expectation()
    description: str = ""
    file: str = ""
    vocabulary: Vocabulary = field(default=VOCABULARY, repr=False)


def load_scenario(text: str | bytes, file: str) -> Scenario:
    """The scenario that `text` describes, which came from `file`; its lifecycle is read from beside it.

    Raises InvalidFile with every fault.
    """
    faults: list[Fault] = []
    document = yamlfile.parse(text, file, faults)
    if wrong := schema.check_kind(document, "Scenario"):
        yamlfile.refuse([*faults, *wrong])
    shape = schema.check(document, schema.shipped("Scenario"))
    faults += yamlfile.untold(shape, faults)
    data = document.data
    lifecycle = _lifecycle(document, data.get("lifecycle"), faults)
    if lifecycle is not None:
        faults += yamlfile.untold(_meaning_faults(document, data, lifecycle), faults)
    if faults or lifecycle is None:
        yamlfile.refuse(faults)
    return Scenario(
        name=data["metadata"]["name"],
        lifecycle=lifecycle,
        script=_script(data),
        expect=_expectation(data.get("expect", {})),
        description=data["metadata"].get("description", ""),
        file=file,
    )


def _lifecycle(document: Document, name: Any, faults: list[Fault]) -> Lifecycle | None:
    """The lifecycle; None, and one fault more, where it cannot be had."""
    if not isinstance(name, str) or not name:
        return None
    try:
        if is_path(name):
            beside = Path() if document.file == STDIN else Path(document.file).parent
            return load_lifecycle(*read(str(beside / name)))
        return shipped_lifecycle(name)
    except KeyError:
        hint = schema.suggestion(name, shipped_lifecycles()) or "a file needs a path, such as ./own.yaml"
        message = f"there is no lifecycle `{shorten(name)}`"
        faults.append(Fault(document.place(("lifecycle",)), "lifecycle", message, hint))
    except InvalidFile as invalid:
        faults += invalid.faults
    return None


def _meaning_faults(document: Document, data: Mapping[str, Any], lifecycle: Lifecycle) -> Iterator[Fault]:
    """What the schema cannot say. Parts of a wrong type are passed over; they are faults already."""
    states = lifecycle.states
    finals = [state.name for state in states.values() if state.final]
    releasing = [point(state, f"release:{name}") for state in finals for name in VOCABULARY.resources]
    points = [*points_of(lifecycle, VOCABULARY), *releasing]
    raised = [event for r in VOCABULARY.resources.values() for event in sorted(r.raises)]
    invoked = {state.invoke for state in states.values() if not state.final}

    def fault(path: yamlfile.Path, message: str, known: Any) -> Fault:
        return Fault(
            document.place(path), dotted(path), message, schema.suggestion(document.get(path), known)
        )

    takes = data["world"].get("takes") if isinstance(data.get("world"), dict) else None
    for activity in takes if isinstance(takes, dict) else ():
        if activity not in invoked:
            path: yamlfile.Path = ("world", "takes", activity)
            message = f"the lifecycle `{lifecycle.name}` invokes no `{shorten(activity)}`"
            yield Fault(document.key_place(path), dotted(path), message, schema.suggestion(activity, invoked))
    for part in ("script", "faults"):
        for index, cue in enumerate(data[part]) if isinstance(data.get(part), list) else ():
            if not isinstance(cue, dict):
                continue
            path = (part, index)
            yield from _when_faults(document, path, cue, points)
            event = cue.get("event")
            if part == "script" and isinstance(event, str) and event not in (*raised, *REQUESTS):
                message = f"nothing raises `{shorten(event)}`"
                yield fault((*path, "event"), message, [*raised, *REQUESTS])
    expect = data["expect"] if isinstance(data.get("expect"), dict) else {}
    named: list[tuple[yamlfile.Path, Any]] = [(("expect", "state"), expect.get("state"))]
    if isinstance(expect.get("path"), list):
        named += [(("expect", "path", index), state) for index, state in enumerate(expect["path"])]
    for path, state in named:
        if isinstance(state, str) and state not in states:
            yield fault(path, f"the lifecycle `{lifecycle.name}` has no state `{shorten(state)}`", states)
    final = expect.get("state")
    if isinstance(final, str) and final in states and final not in finals:
        yield fault(("expect", "state"), f"`{final}` is no final state", finals)


def _when_faults(
    document: Document, path: yamlfile.Path, cue: Mapping[str, Any], points: list[str]
) -> Iterator[Fault]:
    at = cue.get("at")
    if not isinstance(at, str) or not at:
        return
    here = (*path, "at")

    def fault(message: str, hint: str = "") -> Fault:
        return Fault(document.place(here), dotted(here), message, hint)

    if "/" in at:
        if at not in points:
            state = at.partition("/")[0]
            known = [name for name in points if name.startswith(f"{state}/")] or points
            yield fault(f"there is no point `{shorten(at)}`", schema.suggestion(at, known))
        if cue.get("always") is True and "nth" in cue:
            place = document.key_place((*path, "nth"))
            yield Fault(place, dotted((*path, "nth")), "does not go with `always`", "remove one of the two")
        return
    if path[0] == "faults":
        yield fault("must be a point: a fault happens to the work that comes there", "write STATE/BOUNDARY")
        return
    try:
        parse_duration(at)
    except ValueError:
        yield fault(f"`{shorten(at)}` is neither a time nor a point", "write 30s, or STATE/BOUNDARY")
        return
    for key in ("after", "nth", "always"):
        if key in cue:
            place = document.key_place((*path, key))
            yield Fault(place, dotted((*path, key)), "goes with a point, not with a time", "remove it")


def _script(data: Mapping[str, Any]) -> Script:
    world = data.get("world", {})
    work = world.get("work")
    return Script(
        cues=tuple(_cues(data)),
        work=WORK if work is None else None if work == "none" else parse_duration(work),
        takes=tuple((name, parse_duration(time)) for name, time in world.get("takes", {}).items()),
        opposite=world.get("simultaneous") == "opposite",
    )


def _cues(data: Mapping[str, Any]) -> Iterator[Cue]:
    for cue in (*data.get("script", ()), *data.get("faults", ())):
        at, after = cue["at"], parse_duration(cue.get("after", "0s"))
        if "/" not in at:
            at, after = "", parse_duration(at)
        said = {"message": cue["message"]} if "message" in cue else {}
        what = cue["event"] if "event" in cue else cue["fault"]
        nth = EVERY if cue.get("always") else int(cue.get("nth", 1))
        yield Cue(what, at, nth, after, tuple({**said, **cue.get("data", {})}.items()))


def _expectation(data: Mapping[str, Any]) -> Expectation:
    def texts(key: str) -> tuple[str, ...] | None:
        return tuple(data[key]) if key in data else None

    elapsed = {key: parse_duration(time) for key, time in data.get("elapsed", {}).items()}
    return Expectation(
        path=texts("path"),
        state=data.get("state"),
        verdict=data.get("verdict"),
        also=texts("also"),
        warnings=texts("warnings"),
        at_least=elapsed.get("min"),
        at_most=elapsed.get("max"),
        left=texts("left"),
    )


def to_yaml(
    name: str, lifecycle: str, script: Script, *, description: str = "", comment: str = "", width: int = 110
) -> str:
    """A scenario's file, which expects nothing but that the laws hold. `lifecycle` is its name or path."""
    import yaml

    metadata = {"name": name, **({"description": description} if description else {})}
    world: dict[str, Any] = {}
    if script.work != WORK:
        world["work"] = "none" if script.work is None else format_duration(script.work)
    if script.takes:
        world["takes"] = {activity: format_duration(seconds) for activity, seconds in script.takes}
    if script.opposite:
        world["simultaneous"] = "opposite"
    parts: dict[str, Any] = {
        "apiVersion": schema.API_VERSION,
        "kind": "Scenario",
        "metadata": metadata,
        "lifecycle": lifecycle,
        "world": world,
        "script": [_cue_data(cue) for cue in script.cues if cue.what not in FAULTS],
        "faults": [_cue_data(cue) for cue in script.cues if cue.what in FAULTS],
    }
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    kept = {key: value for key, value in parts.items() if value}
    return lines + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=width)


def _cue_data(cue: Cue) -> dict[str, Any]:
    data: dict[str, Any] = {"at": cue.at or format_duration(cue.after)}
    if cue.nth != 1:
        data |= {"always": True} if cue.nth == EVERY else {"nth": cue.nth}
    if cue.at and cue.after:
        data["after"] = format_duration(cue.after)
    data["fault" if cue.what in FAULTS else "event"] = cue.what
    said = dict(cue.data)
    if cue.what in FAULTS and isinstance(said.get("message"), str):
        data["message"] = said.pop("message")
    return {**data, "data": said} if said else data
