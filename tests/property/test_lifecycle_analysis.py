"""Analysis against the machine: what it shows happens, and what it lets pass never goes wrong."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kenaz_engine.lifecycle.analysis import abort_bound, analyse
from kenaz_engine.lifecycle.analysis.text import Text
from kenaz_engine.lifecycle.findings import Finding
from kenaz_engine.lifecycle.loader import load_lifecycle
from kenaz_engine.lifecycle.machine import Decision, Event, Machine, Snapshot, Wait
from kenaz_engine.lifecycle.model import Arm, Guard, Lifecycle, Retry, State
from kenaz_engine.lifecycle.product import explore
from kenaz_engine.session.vocabulary import VOCABULARY

STANDARD = load_lifecycle(
    files("kenaz_specs").joinpath("lifecycles", "standard.yaml").read_bytes(), "standard.yaml"
)
WORKING = ("a", "b", "c", "d", "e")
TARGETS = (*WORKING, "good", "bad")
EVENTS = (
    "done",
    "error",
    "timeout",
    "idle",
    "end",
    "abort",
    "vm.exited",
    "guest.panic",
    "channel.lost",
    "internal.error",
)
OUTSIDE = EVENTS[4:]

GUARDS = st.one_of(
    st.none(),
    st.builds(Guard, st.just("verdict"), st.just(""), st.sampled_from(["success", "failure"])),
    st.builds(Guard, st.just("data"), st.sampled_from(["clean", "transient"]), st.booleans()),
    st.builds(Guard, st.just("below"), st.sampled_from(["x", "y"]), st.integers(1, 3)),
)


@st.composite
def arms(draw: st.DrawFn, targets: tuple[str, ...] = TARGETS) -> tuple[Arm, ...]:
    def arm(guard: Guard | None) -> Arm:
        told = draw(st.sampled_from(["", "fail", "fail", "warn"]))
        count = draw(st.sampled_from(["", "", "x", "y"]))
        target = draw(st.sampled_from(targets))
        return Arm(target, guard, fail=told * (told == "fail"), warn=told * (told == "warn"), count=count)

    guards = draw(st.lists(GUARDS, max_size=2))
    return (*map(arm, guards), arm(draw(st.sampled_from([None, None, Guard("verdict", "", "success")]))))


@st.composite
def states(draw: st.DrawFn, name: str) -> State:
    idle = draw(st.sampled_from([None, None, 60.0]))
    events = draw(st.sets(st.sampled_from(EVENTS), min_size=3))
    return State(
        name,
        invoke=draw(st.sampled_from([*VOCABULARY.activities, "no.such"])),
        timeout=None if idle is not None and draw(st.booleans()) else 10.0,
        idle=idle,
        retry=draw(st.sampled_from([None, None, Retry(2), Retry(3, Guard("data", "transient", True))])),
        on={event: draw(arms()) for event in sorted(events)},
        ignore=frozenset(draw(st.sets(st.sampled_from(OUTSIDE)))) - events,
        goal=draw(st.booleans()),
    )


@st.composite
def lifecycles(draw: st.DrawFn) -> Lifecycle:
    found = {name: draw(states(name)) for name in WORKING}
    found |= {"good": State("good", final="success"), "bad": State("bad", final="failure")}
    common = draw(st.sets(st.sampled_from(OUTSIDE), max_size=3))
    return Lifecycle("random", "a", found, {event: draw(arms()) for event in sorted(common)})


@st.composite
def variants(draw: st.DrawFn) -> Lifecycle:
    """The shipped lifecycle with up to three things changed."""
    changed = dict(STANDARD.states)
    working = tuple(name for name, state in changed.items() if not state.final)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(working))
        state = changed[name]
        event = draw(st.sampled_from(sorted(state.on)))
        if draw(st.booleans()):
            targets = tuple(changed)
            state = replace(state, on={**state.on, event: draw(arms(targets))}, ignore=state.ignore - {event})
        elif event not in ("done", "error", "timeout", "idle"):
            rest = {other: found for other, found in state.on.items() if other != event}
            state = replace(state, on=rest, ignore=state.ignore | {event})
        else:
            state = replace(state, ignore=state.ignore ^ {draw(st.sampled_from(OUTSIDE))} - state.on.keys())
        changed[name] = state
    return replace(STANDARD, states=changed)


def errors(lifecycle: Lifecycle) -> list[Finding]:
    return [found for found in analyse(lifecycle, VOCABULARY) if found.level == "error"]


def tried_out(machine: Machine, snapshot: Snapshot, event: Event) -> Decision:
    """The decision when all attempts are used up."""
    decision = machine.decide(snapshot, event)
    while decision.effects and isinstance(decision.effects[0], Wait):
        decision = machine.decide(decision.snapshot, Event("retry.due"))
        decision = machine.decide(decision.snapshot, event)
    return decision


@given(lifecycles())
@settings(max_examples=20, deadline=None)
def test_every_path_shown_is_taken_by_the_machine(lifecycle: Lifecycle) -> None:
    machine = Machine(lifecycle, VOCABULARY)
    for found in analyse(lifecycle, VOCABULARY):
        snapshot = machine.start().snapshot
        visited = [snapshot.state]
        for step in found.path:
            assert snapshot.state == step.state
            guard = step.guard
            data = {guard.key: guard.value} if guard is not None and guard.kind == "data" else {}
            decision = tried_out(machine, snapshot, Event(step.event, data))
            assert decision.ignored == step.ignored
            snapshot = decision.snapshot
            assert snapshot.state == step.target
            visited.append(snapshot.state)
        final = lifecycle.states[snapshot.state].final
        match found.code:
            case "KL016":
                assert machine.decide(snapshot, Event(found.event)).reason == "unhandled"
            case "KL011" | "KL022":
                assert snapshot.state in visited[:-1]
            case "KL019":
                assert final is not None
            case "KL028":
                assert final == "success"
                assert not snapshot.verdict
            case "KL029":
                assert final == ("success" if snapshot.verdict else "failure")


@given(lifecycles())
@settings(max_examples=20, deadline=None)
def test_no_path_could_be_shorter(lifecycle: Lifecycle) -> None:
    product = explore(lifecycle, VOCABULARY, Text(lifecycle, VOCABULARY).activities)
    for node, edges in product.edges.items():
        for edge in edges:
            assert len(product.path(edge.target)) <= len(product.path(node)) + 1


@given(lifecycles())
@settings(max_examples=5, deadline=None)
def test_analysis_is_a_function(lifecycle: Lifecycle) -> None:
    assert analyse(lifecycle, VOCABULARY) == analyse(lifecycle, VOCABULARY)
    assert abort_bound(lifecycle, VOCABULARY) == abort_bound(lifecycle, VOCABULARY)


class World:
    """A session at the mercy of chance: activities end as they like, and what is held may fail at any time.

    Raises AssertionError for what a lifecycle that passed analysis must never do.
    """

    def __init__(self, machine: Machine, random: Random) -> None:
        self.lifecycle = machine.lifecycle
        self.machine = machine
        self.random = random
        self.ledger: set[str] = set()
        self.alive: set[str] = set()
        self.goal = False
        self.transitions = 0

    def run(self) -> None:
        snapshot = self.machine.start().snapshot
        while not self.lifecycle.states[snapshot.state].final:
            snapshot = self.visit(snapshot)
            self.transitions += 1
            assert self.transitions < 200
        final = self.lifecycle.states[snapshot.state].final
        assert not self.ledger
        assert (final == "failure") == bool(snapshot.verdict)
        assert final == "failure" or self.goal

    def visit(self, snapshot: Snapshot) -> Snapshot:
        """What goes on in one state, until it is left."""
        state = self.lifecycle.states[snapshot.state]
        activity = VOCABULARY.activities[state.invoke]
        assert activity.needs <= self.alive
        self.goal = self.goal or state.goal
        made: set[str] = set()
        while True:
            fresh = {name for name in sorted(activity.acquires - made) if self.random.random() < 0.5}
            self.acquire(fresh)
            made |= fresh
            event = self.random.choice(self.possible(state))
            if event.type == "done":
                self.acquire(set(activity.acquires - made))
            lost = self.lost_by(event.type)
            self.alive -= lost
            decision = self.machine.decide(snapshot, event)
            assert decision.reason in ("", "declared"), event
            snapshot = decision.snapshot
            if not decision.effects:
                continue
            if isinstance(decision.effects[0], Wait):
                self.ledger -= made
                self.alive -= made
                made = set()
                snapshot = self.machine.decide(snapshot, Event("retry.due")).snapshot
                continue
            if activity.releases_all and event.type in ("done", "error", "timeout"):
                # What could not be given back is the failure that the lifecycle must tell.
                self.ledger.clear()
                self.alive.clear()
                assert event.type == "done" or self.lifecycle.states[snapshot.state].final == "failure"
            return snapshot

    def acquire(self, names: set[str]) -> None:
        self.ledger |= names
        self.alive |= names

    def lost_by(self, event: str) -> frozenset[str]:
        resource = VOCABULARY.raiser(event)
        if resource is None or event not in resource.loses:
            return frozenset()
        return VOCABULARY.lost_with(resource.name)

    def possible(self, state: State) -> list[Event]:
        types = ["done", "error", "end", "abort"]
        types += ["timeout"] if state.timeout is not None else []
        types += ["idle"] if state.idle is not None else []
        types += [e for name in sorted(self.alive) for e in sorted(VOCABULARY.resources[name].raises)]
        data = {"clean": self.random.random() < 0.5, "transient": self.random.random() < 0.5}
        return [Event(name, data) for name in types]


@given(variants(), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_what_passes_never_goes_wrong(lifecycle: Lifecycle, seed: int) -> None:
    if errors(lifecycle):
        return  # refused, as most are
    machine, random = Machine(lifecycle, VOCABULARY), Random(seed)
    for _ in range(20):
        World(machine, random).run()


@pytest.mark.parametrize("seed", range(5))
def test_standard_never_goes_wrong(seed: int) -> None:
    machine, random = Machine(STANDARD, VOCABULARY), Random(seed)
    for _ in range(200):
        World(machine, random).run()
