"""Every shipped lifecycle with one thing changed, by rule: who finds it?

Analysis reports a mutant that touches safety. One that it lets pass is run through every single fault, and
must leak nothing and wait for nothing for ever. What still differs then is policy: the manner of the
clean-up, or the words of a verdict; each such kind of change is listed below with why it is harmless.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from kenaz_engine.lifecycle.analysis import analyse
from kenaz_engine.lifecycle.loader import from_data, to_data
from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.replay.explore import explore
from kenaz_engine.session.lifecycles import shipped_lifecycle, shipped_lifecycles
from kenaz_engine.session.vocabulary import VOCABULARY
from kenaz_engine.spec.faults import InvalidFile

Data = dict[str, Any]

SAMPLE = 30
"""Mutants of each lifecycle that a short run looks at."""

POLICY = (
    # Another way through the clean-up. The transition says the same `fail`, and a release still follows.
    # Whether a guest is asked before it is killed is pinned by the golden journals of tests/journals.
    (r"led to (draining|stopping|killing|releasing): .*", "the manner of the clean-up"),
    (r"left out (draining|stopping)", "the manner of the clean-up"),
    # Ignored, the activity's own end or the state's deadline leads on, no later than it would without the
    # event. Ending a machine that is gone does nothing.
    (r"ignored (draining|stopping|killing) .*", "waits for its own end or deadline"),
    # A failure is remembered first, and a counter bounds how often: the session goes on, but never succeeds.
    (r"led to (resolving|allocating|booting|connecting|reconnecting): .*", "another start, bounded"),
    # The first failed attempt is the last.
    (r"without retry: resolving", "fewer attempts"),
    # The activity's needs are met, and what it acquires is released. What the work of a state is for, nothing
    # but the lifecycle says: whole sessions (tests/integration/test_lifecycle_*.py) hold that.
    (r"invoking .*", "other work"),
    # The goal was passed: whether what comes after makes the session a failure is for the lifecycle to say.
    # The exit codes of tests/integration/test_lifecycle_exec.py and the golden journals hold these.
    (r"without fail: (running (done\[1\]|end|guest\.bye)|draining vm\.exited\[1\])", "the word for an end"),
)
"""What analysis lets pass, by name, and why nothing can leak or lie by it."""

EXPLORED = ("final", "deadline", "abort", "heard", "order", "released", "left", "forgotten", "internal")
"""The laws of safety that a survivor must keep (kenaz_engine.replay.laws); others are about its verdict."""


@dataclass(frozen=True)
class Mutant:
    """`what` was done to `state`, and to its `event` where there is one."""

    what: str
    state: str
    event: str
    data: Data

    def __str__(self) -> str:
        return f"{self.what} {self.state} {self.event}".strip()


def mutants(lifecycle: Lifecycle) -> Iterator[Mutant]:
    """One change each, in the order of the file."""
    whole = to_data(lifecycle)

    def changed(what: str, state: str, event: str = "") -> tuple[Mutant, Data]:
        mutant = Mutant(what, state, event, copy.deepcopy(whole))
        return mutant, mutant.data["states"][state]

    working = [name for name, state in whole["states"].items() if "final" not in state]
    for name in working:
        state = whole["states"][name]
        for event, arms in state["on"].items():
            mutant, there = changed("dropped", name, event)
            del there["on"][event]
            yield mutant
            mutant, there = changed("ignored", name, event)
            del there["on"][event]
            there["ignore"] = [*there.get("ignore", []), event]
            yield mutant
            for nth, arm in enumerate(arms):
                where = f"{event}[{nth}]" if len(arms) > 1 else event
                for target in (name, *whole["states"]):
                    if target != arm["target"] and (target != name or "final" not in state):
                        mutant, there = changed(f"led to {target}:", name, where)
                        there["on"][event][nth]["target"] = target
                        yield mutant
                for key in ("fail", "warn", "when", "count"):
                    if key in arm:
                        mutant, there = changed(f"without {key}:", name, where)
                        del there["on"][event][nth][key]
                        yield mutant
            if len(arms) > 1:
                mutant, there = changed("turned round:", name, event)
                there["on"][event].reverse()
                yield mutant
        for event in state.get("ignore", ()):
            mutant, there = changed("heeding:", name, event)
            there["ignore"].remove(event)
            yield mutant
        for key in ("timeout", "idle", "retry", "goal"):
            if key in state and state[key] != "none":
                mutant, there = changed(f"without {key}:", name)
                del there[key]
                yield mutant
        for activity in sorted(VOCABULARY.activities):
            if activity != state["invoke"]:
                mutant, there = changed(f"invoking {activity}:", name)
                there["invoke"] = activity
                yield mutant
    for name in working:
        mutant, _ = changed("left out", name)
        mutant.data["states"] = without_state(whole["states"], name)
        if mutant.data["initial"] == name:
            mutant.data["initial"] = done_target(whole["states"][name])
        yield mutant
    for event in whole["any"]:
        mutant = Mutant("dropped", "any", event, copy.deepcopy(whole))
        del mutant.data["any"]
        yield mutant


def done_target(state: Data) -> str:
    return str(state["on"]["done"][0]["target"])


def without_state(states: Data, name: str) -> Data:
    """Whoever led there leads to where its work led."""
    heir = done_target(states[name])
    kept = copy.deepcopy({other: state for other, state in states.items() if other != name})
    for state in kept.values():
        for arms in state.get("on", {}).values():
            for arm in arms:
                if arm["target"] == name:
                    arm["target"] = heir
    return kept


def load(mutant: Mutant) -> Lifecycle | None:
    """The lifecycle, where it is not refused as it is read."""
    try:
        return from_data(mutant.data)
    except InvalidFile:
        return None


def survivors(lifecycle: Lifecycle) -> list[tuple[Mutant, Lifecycle]]:
    found = []
    for mutant in mutants(lifecycle):
        loaded = load(mutant)
        if loaded is not None and not analyse(loaded, VOCABULARY):
            found.append((mutant, loaded))
    return found


def policy(mutant: Mutant) -> str:
    """Why analysis may let it pass; empty where nobody has said so."""
    return next((why for pattern, why in POLICY if re.fullmatch(pattern, str(mutant))), "")


def is_found(lifecycle: Lifecycle | None) -> bool:
    return lifecycle is None or bool(analyse(lifecycle, VOCABULARY))


@cache
def sample(name: str) -> tuple[list[Mutant], list[Mutant]]:
    """The same ones each time, of all kinds: those that are found, and those that pass."""
    chosen = random.Random(name).sample(list(mutants(shipped_lifecycle(name))), SAMPLE)
    found = [mutant for mutant in chosen if is_found(load(mutant))]
    return found, [mutant for mutant in chosen if mutant not in found]


def leaks(lifecycle: Lifecycle, **how: Any) -> list[str]:
    """What a survivor does wrong under any single fault."""
    report = explore(lifecycle, processes=1, order="usual", **how)
    assert sum(report.runs.values()) > 100
    return [str(found.breach) for found in report.found if found.breach.law in EXPLORED]


shipped = pytest.mark.parametrize("name", shipped_lifecycles())


@shipped
def test_a_mutant_is_found_or_is_policy(name: str) -> None:
    found, passed = sample(name)
    assert len(found) > SAMPLE // 2
    assert [str(mutant) for mutant in passed if not policy(mutant)] == []


# What must never pass, whatever else does: it would leak, hang or lie.
NEVER = (
    r"dropped .*",
    r"led to (ended|failed): (?!releasing).*",
    r"invoking .*: releasing",
    r"left out (killing|releasing|resolving|allocating|booting|connecting|running)",
    r"without (timeout|idle|goal): .*",
    r"without (when|count): .*",
    r"heeding: .* (abort|end|vm\.exited|channel\.lost|guest\.bye|guest\.panic)",
    r"led to (\w+): \1 (done|error|timeout|idle|end)",
    r"without (fail|warn): \w+ (error|timeout)",
)


@pytest.mark.slow
@shipped
def test_every_mutant_that_touches_safety_is_found(name: str) -> None:
    for mutant in mutants(shipped_lifecycle(name)):
        if not is_found(load(mutant)):
            assert policy(mutant), mutant
            assert not any(re.fullmatch(pattern, str(mutant)) for pattern in NEVER), mutant


@pytest.mark.slow
@shipped
def test_no_mutant_that_passes_leaks(name: str) -> None:
    """Every sixth of them: each is some thousand sessions."""
    for mutant, loaded in list(survivors(shipped_lifecycle(name)))[::6]:
        assert leaks(loaded, worlds=["harness-ends"]) == [], mutant
