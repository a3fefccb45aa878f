"""Any lifecycle that the model can hold survives being written down."""

from __future__ import annotations

import json
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from kenaz_engine.lifecycle.loader import from_data, to_data
from kenaz_engine.lifecycle.model import OUTCOMES, TIMERS, Arm, Backoff, Guard, Lifecycle, Retry, State

NAMES = st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True)
EVENTS = st.from_regex(r"[a-z][a-z0-9_-]{0,5}(\.[a-z]{1,4})?", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
TIMES = st.integers(1, 3_600_000).map(lambda milliseconds: milliseconds / 1000)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | FLOATS | st.text(max_size=5)
GUARDS = (
    st.builds(Guard, st.just("data"), st.text(max_size=8), SCALARS)
    | st.builds(Guard, st.just("verdict"), st.just(""), st.sampled_from(["success", "failure"]))
    | st.builds(Guard, st.just("below"), st.text(max_size=8), st.integers(1, 100))
)
RETRIES = st.builds(
    Retry,
    st.integers(1, 100),
    st.none() | GUARDS,
    st.builds(Backoff, TIMES, st.floats(1, 100), TIMES, st.floats(0, 1)),
)


@st.composite
def arms(draw: st.DrawFn, targets: list[str]) -> Arm:
    fail, warn = draw(st.sampled_from([("", ""), ("x", ""), ("", "x")]))
    text = draw(TEXTS)
    return Arm(
        draw(st.sampled_from(targets)),
        draw(st.none() | GUARDS),
        fail and text,
        warn and text,
        draw(st.just("") | NAMES),
    )


@st.composite
def lifecycles(draw: st.DrawFn) -> Lifecycle:
    ignored = st.frozensets(EVENTS.filter(lambda event: event not in OUTCOMES), max_size=3)
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    table = st.dictionaries(EVENTS, st.lists(arms(names), min_size=1, max_size=3).map(tuple), max_size=3)
    states = {}
    for name in names:
        if draw(st.booleans()):
            states[name] = State(name, final=draw(st.sampled_from(["success", "failure"])))
            continue
        on = draw(table)
        idle = draw(st.none() | TIMES)
        states[name] = State(
            name,
            invoke=draw(EVENTS),
            timeout=draw(TIMES if idle is None else st.none() | TIMES),
            idle=idle,
            cleanup=draw(TIMES),
            retry=draw(st.none() | RETRIES),
            on=on,
            ignore=draw(ignored) - on.keys(),
            goal=draw(st.booleans()),
        )
    any_state = {event: taken for event, taken in draw(table).items() if event not in (*OUTCOMES, *TIMERS)}
    return Lifecycle(
        name=draw(st.from_regex(r"[a-z0-9][a-z0-9-]{0,9}", fullmatch=True)),
        initial=draw(st.sampled_from(names)),
        states=states,
        any=any_state,
        description=draw(st.just("") | TEXTS),
        strict=draw(st.booleans()),
    )


def without_places(lifecycle: Lifecycle) -> Lifecycle:
    def bare(table: dict[str, tuple[Arm, ...]]) -> dict[str, tuple[Arm, ...]]:
        return {event: tuple(replace(arm, line=0) for arm in taken) for event, taken in table.items()}

    states = {
        name: replace(state, line=0, on=bare(dict(state.on))) for name, state in lifecycle.states.items()
    }
    return replace(lifecycle, file="", states=states, any=bare(dict(lifecycle.any)))


@settings(max_examples=50, deadline=None)
@given(lifecycles())
def test_a_lifecycle_survives_being_written_down(lifecycle: Lifecycle) -> None:
    written = json.dumps(to_data(lifecycle))
    again = from_data(json.loads(written))
    assert without_places(again) == lifecycle
    assert list(again.states) == list(lifecycle.states)
