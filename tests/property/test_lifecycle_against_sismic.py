"""The core against an independent statechart interpreter, `sismic`, on thousands of random lifecycles.

Where the semantics coincide, both must take the same transitions, through the same states, with the same
failures and counters in the end. That is (by the numbers of docs/reference/lifecycle.md): one event at a
time, run to completion (L2); the first transition whose guard holds (L6); what a state says about an event
hides `any`, and final states take nothing (L7); an event without a transition leads to nothing (L8); which
line was taken (L9); all guards (L10), on the snapshot from before the transition (L11); counters (L12);
verdict and warnings (L13).

The other side says it in its own means, so that nothing of ours is merely repeated: `any` is the transitions
of a state around all that are not final, hidden by inner ones; order is priority; guards, counters and texts
are code.

Left out, since a statechart does not have them: what is stale or foreign (L3 to L5: events carry no entry,
activity or id here), retries and timers (timers are plain events here), `strict`, the message that an event
adds to a text, and that a guard tells `true` from 1. Clean-up belongs to the runner and is not decided.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
from sismic import model as chart
from sismic.interpreter import Interpreter

from kenaz_engine.lifecycle.machine import Event, Machine, Table
from kenaz_engine.lifecycle.model import Arm, Guard, Lifecycle, State
from kenaz_engine.lifecycle.vocabulary import Vocabulary

CASES = 2_000
LONG = 20_000
NOTHING = Vocabulary({}, {})
EVENTS = ("done", "error", "timeout", "end", "abort", "guest.bye")
COUNTERS = ("n", "m")
DATA = {"clean": (True, False), "by": ("signal", "harness")}
ROOT, ALIVE, HIDE = "the root", "all that is alive", -1_000_000


@dataclass(frozen=True)
class Walk:
    """What a side did: the line taken for each event (0: none), the states entered, and what it remembers."""

    taken: list[int]
    path: list[str]
    failures: list[str]
    warnings: list[str]
    counters: dict[str, int]


# --- random lifecycles --------------------------------------------------------------------------------------


class Draw:
    """Draws a lifecycle and events for it; the bigger `size`, the more of everything."""

    def __init__(self, seed: int, size: int) -> None:
        self.random = random.Random(seed)
        self.size = size
        self.waiting = [f"s{i}" for i in range(self.random.randint(1, 1 + size))]
        self.events = self.random.sample(EVENTS, min(len(EVENTS), 1 + size))
        self.line = 0

    def lifecycle(self) -> Lifecycle:
        states = {name: self.state(name) for name in self.waiting}
        states |= {"good": State("good", final="success"), "bad": State("bad", final="failure")}
        return Lifecycle("random", self.waiting[0], states, any=self.table(0.3))

    def state(self, name: str) -> State:
        on = self.table(0.7)
        free = [event for event in self.events if event not in on]
        ignore = frozenset(event for event in free if self.random.random() < 0.3)
        return State(name, invoke="work", timeout=1.0, on=on, ignore=ignore)

    def table(self, share: float) -> dict[str, tuple[Arm, ...]]:
        events = [event for event in self.events if self.random.random() < share]
        return {event: tuple(self.arm() for _ in range(self.random.randint(1, 3))) for event in events}

    def arm(self) -> Arm:
        self.line += 1
        pick = self.random
        target = pick.choice([*self.waiting * 3, "good", "bad"])
        text = {pick.choice(["fail", "warn"]): f"text {self.line}"} if pick.random() < 0.5 else {}
        count = pick.choice(["", "", *COUNTERS])
        return Arm(target, when=self.guard(), count=count, line=self.line, **text)

    def guard(self) -> Guard | None:
        match self.random.randrange(5):
            case 0:
                key = self.random.choice(list(DATA))
                return Guard("data", key, self.random.choice(DATA[key]))
            case 1:
                return Guard("verdict", "", self.random.choice(["success", "failure"]))
            case 2:
                return Guard("below", self.random.choice(COUNTERS), self.random.randint(1, 3))
            case _:
                return None

    def happenings(self) -> list[Event]:
        return [self.event() for _ in range(self.random.randint(1, 4 * (1 + self.size)))]

    def event(self) -> Event:
        data = {key: self.random.choice(DATA[key]) for key in DATA if self.random.random() < 0.7}
        return Event(self.random.choice(self.events), data)


# --- both sides ---------------------------------------------------------------------------------------------


def ours(machine: Machine, events: list[Event]) -> Walk:
    decision = machine.start()
    taken, path = [], [decision.snapshot.state]
    for event in events:
        decision = machine.decide(decision.snapshot, event)
        taken.append(decision.arm)
        path += [effect.state for effect in decision.effects if hasattr(effect, "state")]
    end = decision.snapshot
    failures = [end.verdict, *end.also] if end.verdict else []
    return Walk(taken, path, failures, list(end.warnings), dict.fromkeys(COUNTERS, 0) | dict(end.counters))


def theirs(lifecycle: Lifecycle, events: list[Event]) -> Walk:
    memory: dict[str, Any] = {"failures": [], "warnings": [], **dict.fromkeys(COUNTERS, 0)}
    interpreter = Interpreter(statechart(lifecycle), initial_context=memory)
    path: list[str] = []

    def note(told: Any) -> None:
        if told.name == "state entered" and told.state in lifecycle.states:
            path.append(told.state)

    interpreter.attach(note)
    for event in events:
        interpreter.queue(event.type, **event.data)
    _, *steps = interpreter.execute()
    taken = [line_taken(step) for step in steps]
    after = interpreter.context
    return Walk(taken, path, after["failures"], after["warnings"], {name: after[name] for name in COUNTERS})


def statechart(lifecycle: Lifecycle) -> chart.Statechart:
    made = chart.Statechart(lifecycle.name)
    made.add_state(chart.CompoundState(ROOT, initial=ALIVE), None)
    made.add_state(chart.CompoundState(ALIVE, initial=lifecycle.initial), ROOT)
    for state in lifecycle.states.values():
        made.add_state(
            chart.FinalState(state.name) if state.final else chart.BasicState(state.name),
            ROOT if state.final else ALIVE,
        )
    tables = {ALIVE: lifecycle.any} | {state.name: state.on for state in lifecycle.states.values()}
    for source, table in tables.items():
        for event, arms in table.items():
            for arm in arms:
                made.add_transition(
                    chart.Transition(source, arm.target, event, guard(arm), action(arm), -arm.line)
                )
    for state in lifecycle.states.values():
        for event in {*state.on, *state.ignore}:
            # Goes nowhere, when nothing else will: enough to keep the state around it from being asked.
            made.add_transition(chart.Transition(state.name, None, event, priority=HIDE))
    return made


def line_taken(step: chart.MacroStep) -> int:
    priority = step.transitions[0].priority if step.transitions else HIDE
    return 0 if priority == HIDE else -int(priority)


def guard(arm: Arm) -> str | None:
    match arm.when:
        case None:
            return None
        case Guard("data", key, value):
            return f"event.data.get({key!r}) == {value!r}"
        case Guard("verdict", _, value):
            return "not failures" if value == "success" else "failures"
        case Guard(_, key, value):
            return f"{key} < {value}"


def action(arm: Arm) -> str | None:
    lines = [f"failures.append({arm.fail!r})"] if arm.fail else []
    lines += [f"warnings.append({arm.warn!r})"] if arm.warn else []
    lines += [f"{arm.count} += 1"] if arm.count else []
    return "\n".join(lines) or None


# --- the tests ----------------------------------------------------------------------------------------------


def test_both_take_the_same_way(request: pytest.FixtureRequest) -> None:
    cases = LONG if request.config.getoption("--long") else CASES
    moves = ends = 0
    for seed in range(cases):
        # They grow, so that the first on which both differ is a small one.
        draw = Draw(seed, size=4 * seed // cases)
        lifecycle, events = draw.lifecycle(), draw.happenings()
        expected = theirs(lifecycle, events)
        assert len(expected.taken) == len(events)
        for compiled in (Machine, Table):
            found = ours(compiled(lifecycle, NOTHING), events)
            assert found == expected, f"{compiled.__name__}, seed {seed}: {lifecycle}\n{events}"
        moves += len(expected.path)
        ends += expected.path[-1] in ("good", "bad")
    # Else they would agree on having done nothing.
    assert moves > 3 * cases
    assert cases / 5 < ends < cases * 4 / 5


def test_a_difference_is_seen() -> None:
    """The order of two transitions is enough."""
    arms = Arm("s0", line=1), Arm("good", line=2)
    states = {"s0": State("s0", on={"done": arms}), "good": State("good", final="success")}
    lifecycle = Lifecycle("two", "s0", states)
    swapped = Lifecycle("two", "s0", states | {"s0": State("s0", on={"done": arms[::-1]})})
    events = [Event("done")]
    assert ours(Machine(lifecycle, NOTHING), events) == theirs(lifecycle, events)
    assert ours(Machine(swapped, NOTHING), events) != theirs(lifecycle, events)
