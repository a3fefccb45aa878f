"""Lifecycles from YAML and from journals, and back to plain data.

What is refused here needs no look at paths; `analysis` finds the rest. Codes of load faults:

KL001  the file is not of the form that the schema asks for
KL002  a transition leads to a state that does not exist
KL003  the initial state does not exist
KL004  a final state has something else besides
KL005  a state neither invokes an activity nor is final
KL006  a transition both fails and warns
KL007  the bound of a counter is not between 1 and 100
KL008  a state has no timeout, or `timeout: none` without `idle`
KL009  an event stands where it cannot: an outcome or a timer ignored or under `any`, an event both handled
       and ignored
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kenaz_engine.lifecycle.model import OUTCOMES, TIMERS, Arm, Backoff, Guard, Lifecycle, Retry, State
from kenaz_engine.spec import schema, yamlfile
from kenaz_engine.spec.faults import Fault, Place
from kenaz_engine.spec.units import format_duration, parse_duration
from kenaz_engine.spec.yamlfile import Document, Path, dotted, shorten

_SHAPE = "KL001"


def load_lifecycle(text: str | bytes, file: str) -> Lifecycle:
    """The lifecycle that `text` describes, which came from `file`. Raises InvalidFile with every fault."""
    faults: list[Fault] = []
    return _lifecycle(yamlfile.parse(text, file, faults), faults)


def from_data(data: Any, place_of: Callable[[Path], Place] = lambda _: Place("<data>")) -> Lifecycle:
    """The lifecycle in plain data, such as the header of a journal holds. Raises InvalidFile.

    `place_of` tells where the value at a path stands; the lines of its places become those of the arms.
    """
    return _lifecycle(yamlfile.from_data(data, place_of, place_of(()).file), [])


def to_data(lifecycle: Lifecycle) -> dict[str, Any]:
    """The lifecycle as plain JSON data, from which `from_data` makes an equal one, but for file and lines.

    Times are rounded to milliseconds. `lines` has the lines.
    """
    metadata = {"name": lifecycle.name, "description": lifecycle.description}
    data: dict[str, Any] = {
        "apiVersion": schema.API_VERSION,
        "kind": "Lifecycle",
        "metadata": {key: text for key, text in metadata.items() if text},
        "initial": lifecycle.initial,
        "states": {name: _state_data(state) for name, state in lifecycle.states.items()},
    }
    if lifecycle.strict:
        data["strict"] = True
    if lifecycle.any:
        data["any"] = _transitions_data(lifecycle.any)
    return data


def lines(lifecycle: Lifecycle) -> dict[str, int]:
    """The line of each state and transition, by JSON Pointer into what `to_data` gives."""
    found: dict[Path, int] = {("states", name): state.line for name, state in lifecycle.states.items()}
    tables: dict[Path, Mapping[str, tuple[Arm, ...]]] = {
        ("states", name, "on"): state.on for name, state in lifecycle.states.items()
    }
    for path, table in {**tables, ("any",): lifecycle.any}.items():
        found |= {(*path, event, i): arm.line for event, arms in table.items() for i, arm in enumerate(arms)}
    return {_pointer(path): line for path, line in found.items() if line}


def places(lines: Mapping[str, int], file: str) -> Callable[[Path], Place]:
    """For `from_data`: where things stood in `file`, from what `lines` gave."""
    return lambda path: Place(file, lines.get(_pointer(path), 0))


def _pointer(path: Path) -> str:
    """Names in a lifecycle have none of the characters that a JSON Pointer would have to escape."""
    return "".join(f"/{step}" for step in path)


# --- from data ----------------------------------------------------------------------------------------------


def _lifecycle(document: Document, faults: list[Fault]) -> Lifecycle:
    if wrong := schema.check_kind(document, "Lifecycle"):
        yamlfile.refuse([*faults, *wrong])
    shape = schema.check(document, schema.shipped("Lifecycle"), code=_SHAPE)
    faults = [*faults, *yamlfile.untold(shape, faults)]
    data = document.data
    faults += _meaning_faults(document, data)
    if faults:
        yamlfile.refuse(faults)
    return Lifecycle(
        name=data["metadata"]["name"],
        initial=data["initial"],
        states={name: _state(document, name, state) for name, state in data["states"].items()},
        any=_transitions(document, ("any",), data.get("any", {})),
        description=data["metadata"].get("description", ""),
        strict=data.get("strict", False),
        file=document.file,
    )


def _state(document: Document, name: str, data: Mapping[str, Any]) -> State:
    path = ("states", name)
    timeout = data.get("timeout", "none")
    given: dict[str, Any] = {}
    if "cleanup" in data:
        given["cleanup"] = parse_duration(data["cleanup"])
    return State(
        name=name,
        invoke=data.get("invoke", ""),
        timeout=None if timeout == "none" else parse_duration(timeout),
        idle=parse_duration(data["idle"]) if "idle" in data else None,
        retry=_retry(data["retry"]) if "retry" in data else None,
        on=_transitions(document, (*path, "on"), data.get("on", {})),
        ignore=frozenset(data.get("ignore", ())),
        goal=data.get("goal", False),
        final=data.get("final"),
        line=document.key_place(path).line,
        **given,
    )


def _retry(data: Mapping[str, Any]) -> Retry:
    backoff = data.get("backoff", {})
    given = {key: parse_duration(backoff[name]) for name, key in _WAITS.items() if name in backoff}
    given |= {key: float(backoff[key]) for key in ("factor", "jitter") if key in backoff}
    return Retry(int(data["attempts"]), _guard(data.get("when")), Backoff(**given))


_WAITS = {"first": "first", "max": "maximum"}


def _transitions(document: Document, path: Path, data: Mapping[str, Any]) -> dict[str, tuple[Arm, ...]]:
    return {
        event: tuple(_arm(arm, document.place(here)) for here, arm in _arms((*path, event), entry))
        for event, entry in data.items()
    }


def _arms(path: Path, entry: Any) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """The arms of one event in their long form, each with its path."""
    if isinstance(entry, list):
        for index, arm in enumerate(entry):
            if isinstance(arm, dict):
                yield (*path, index), arm
    elif isinstance(entry, dict):
        yield path, entry
    elif isinstance(entry, str):
        yield path, {"target": entry}


def _arm(data: Mapping[str, Any], place: Place) -> Arm:
    return Arm(
        target=data["target"],
        when=_guard(data.get("when")),
        fail=data.get("fail", ""),
        warn=data.get("warn", ""),
        count=data.get("count", ""),
        line=place.line,
    )


def _guard(data: Mapping[str, Any] | None) -> Guard | None:
    match data:
        case None:
            return None
        case {"verdict": value}:
            return Guard("verdict", "", value)
        case {"below": bound}:
            [(counter, value)] = bound.items()
            return Guard("below", counter, int(value))
        case _:
            [(key, value)] = data["data"].items()
            return Guard("data", key, value)


# --- meaning ------------------------------------------------------------------------------------------------


def _meaning_faults(document: Document, data: Mapping[str, Any]) -> Iterator[Fault]:
    """What the schema cannot say. Parts of a wrong type are passed over; they are faults already."""
    states = data.get("states")
    if not isinstance(states, dict):
        return
    initial = data.get("initial")
    if isinstance(initial, str) and initial not in states:
        yield _unknown_state(document, ("initial",), initial, states, "KL003")
    for name, state in states.items():
        if isinstance(state, dict):
            yield from _state_faults(document, ("states", name), state)
            yield from _transition_faults(document, ("states", name, "on"), state.get("on"), states)
    yield from _transition_faults(document, ("any",), data.get("any"), states)
    for event in data["any"] if isinstance(data.get("any"), dict) else ():
        if event in OUTCOMES or event in TIMERS:
            path: Path = ("any", event)
            message = f"`{event}` belongs to each state on its own and cannot be under `any`"
            yield Fault(document.key_place(path), dotted(path), message, "", "KL009")


def _state_faults(document: Document, path: Path, state: Mapping[str, Any]) -> Iterator[Fault]:
    key = document.key_place(path)
    if "final" in state:
        for other in state.keys() - {"final"}:
            place = document.key_place((*path, other))
            message = f"a final state cannot have `{other}`"
            yield Fault(place, dotted((*path, other)), message, "", "KL004")
        return
    if "invoke" not in state:
        message, hint = "the state does nothing", "add `invoke`, or `final: success` or `final: failure`"
        yield Fault(key, dotted(path), message, hint, "KL005")
    if "timeout" not in state:
        hint = "add `timeout: 60s`, or `idle` and `timeout: none`"
        yield Fault(key, dotted(path), "the state has no timeout", hint, "KL008")
    elif state["timeout"] == "none" and "idle" not in state:
        place = document.place((*path, "timeout"))
        message, hint = "the state could last for ever", "`none` needs `idle` beside it"
        yield Fault(place, dotted((*path, "timeout")), message, hint, "KL008")
    handled = state["on"] if isinstance(state.get("on"), dict) else {}
    ignored = state["ignore"] if isinstance(state.get("ignore"), list) else []
    for index, event in enumerate(ignored):
        here = (*path, "ignore", index)
        if event in OUTCOMES:
            message = f"the outcome `{event}` cannot be ignored"
        elif event in TIMERS:
            message = f"the timer `{event}` cannot be ignored"
        elif isinstance(event, str) and event in handled:
            message = f"`{event}` is ignored, yet has a transition"
        elif event in ignored[:index]:
            message = f"`{shorten(str(event))}` is stated twice"
        else:
            continue
        yield Fault(document.place(here), dotted(here), message, "", "KL009")


def _transition_faults(
    document: Document, path: Path, transitions: Any, states: Mapping[str, Any]
) -> Iterator[Fault]:
    for event, entry in transitions.items() if isinstance(transitions, dict) else ():
        for here, arm in _arms((*path, event), entry):
            target = arm.get("target")
            if isinstance(target, str) and target not in states:
                inner = (*here, "target") if document.node((*here, "target")) else here
                yield _unknown_state(document, inner, target, states, "KL002")
            if "fail" in arm and "warn" in arm:
                place = document.key_place((*here, "warn"))
                message, hint = "a transition either fails or warns", "take `fail` or `warn` out"
                yield Fault(place, dotted(here), message, hint, "KL006")


def _unknown_state(document: Document, path: Path, name: str, states: Mapping[str, Any], code: str) -> Fault:
    hint = schema.suggestion(name, states)
    return Fault(document.place(path), dotted(path), f"there is no state `{shorten(name)}`", hint, code)


# --- to data ------------------------------------------------------------------------------------------------


def _state_data(state: State) -> dict[str, Any]:
    if state.final:
        return {"final": state.final}
    data: dict[str, Any] = {
        "invoke": state.invoke,
        "timeout": "none" if state.timeout is None else format_duration(state.timeout),
        "cleanup": format_duration(state.cleanup),
    }
    if state.idle is not None:
        data["idle"] = format_duration(state.idle)
    if state.retry:
        data["retry"] = _retry_data(state.retry)
    if state.goal:
        data["goal"] = True
    if state.ignore:
        data["ignore"] = sorted(state.ignore)
    if state.on:
        data["on"] = _transitions_data(state.on)
    return data


def _retry_data(retry: Retry) -> dict[str, Any]:
    backoff = retry.backoff
    data: dict[str, Any] = {
        "attempts": retry.attempts,
        "backoff": {
            "first": format_duration(backoff.first),
            "factor": backoff.factor,
            "max": format_duration(backoff.maximum),
            "jitter": backoff.jitter,
        },
    }
    if retry.when:
        data["when"] = _guard_data(retry.when)
    return data


def _transitions_data(transitions: Mapping[str, tuple[Arm, ...]]) -> dict[str, Any]:
    return {event: [_arm_data(arm) for arm in arms] for event, arms in transitions.items()}


def _arm_data(arm: Arm) -> dict[str, Any]:
    data: dict[str, Any] = {"target": arm.target}
    if arm.when:
        data["when"] = _guard_data(arm.when)
    texts = {"fail": arm.fail, "warn": arm.warn, "count": arm.count}
    return data | {key: text for key, text in texts.items() if text}


def _guard_data(guard: Guard) -> dict[str, Any]:
    return {guard.kind: guard.value if guard.kind == "verdict" else {guard.key: guard.value}}
