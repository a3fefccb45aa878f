"""Exploring: every transition of what is shipped is taken, no law is broken, and seeded faults are found."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kenaz_engine.lifecycle.analysis import analyse
from kenaz_engine.lifecycle.loader import from_data, to_data
from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.lifecycle.vocabulary import Activity, Resource, Vocabulary
from kenaz_engine.replay.explore import Found, Report, explore, nominal_worlds
from kenaz_engine.replay.laws import LAWS
from kenaz_engine.replay.scenario import load_scenario
from kenaz_engine.replay.script import EVERY, Cue
from kenaz_engine.replay.shrink import scenario_of, shrink
from kenaz_engine.replay.simulate import run_scenario
from kenaz_engine.session.lifecycles import shipped_lifecycle, shipped_lifecycles
from kenaz_engine.session.vocabulary import VOCABULARY

Data = dict[str, Any]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "standard" else [pytest.mark.slow])
        for name in shipped_lifecycles()
    ],
)
def test_every_transition_is_taken_and_no_law_broken(name: str) -> None:
    """All single faults in all nominal worlds."""
    report = explore(shipped_lifecycle(name))
    assert report.found == ()
    assert report.uncovered == []
    assert all(report.states.values())
    assert sum(report.runs.values()) > 900


def test_without_faults_the_nominal_worlds_are_played(standard: Lifecycle) -> None:
    report = explore(standard, faults=0, processes=1)
    assert list(report.runs) == ["harness-ends", "guest-bye", "idle", "channel-lost", "user-aborts"]
    assert report.endings.keys() == {"ended", "failed"}
    assert "channel-unsteady" in nominal_worlds(shipped_lifecycle("standard-reconnect"))


def one_order(standard: Lifecycle, order: str) -> Report:
    return explore(standard, faults=0, worlds=["harness-ends"], order=order, processes=1)


def test_both_orders_of_simultaneous_events_are_played(standard: Lifecycle) -> None:
    """Whether the machine's exit or the end of `vm.stop` comes first makes a difference."""
    usual, opposite = one_order(standard, "usual"), one_order(standard, "opposite")
    both = one_order(standard, "both")
    assert usual.transitions != opposite.transitions
    assert both.transitions == {t: taken or opposite.transitions[t] for t, taken in usual.transitions.items()}
    assert (sum(usual.runs.values()), sum(both.runs.values())) == (1, 2)


# --- seeded faults ------------------------------------------------------------------------------------------


def leads(state: str, event: str, target: str, **more: str) -> Callable[[Data], None]:
    def change(states: Data) -> None:
        states[state]["on"][event] = {"target": target, **more}

    return change


def deaf(state: str, event: str) -> Callable[[Data], None]:
    def change(states: Data) -> None:
        states[state]["on"].pop(event, None)
        states[state]["ignore"] = [e for e in states[state].get("ignore", []) if e != event]

    return change


def unreleased(states: Data) -> None:
    states["releasing"]["invoke"] = "vm.kill"


MUTANTS: dict[str, tuple[Callable[[Data], None], str, str, int]] = {
    # what is changed, the law that is broken, in which state, with how many faults
    "leak after an error": (leads("running", "error", "failed", fail="no"), "released", "running", 1),
    "leak on request": (leads("allocating", "end", "failed", fail="no"), "released", "allocating", 1),
    "nothing is released": (unreleased, "released", "releasing", 0),
    "killing is the end": (leads("killing", "done", "failed", fail="no"), "released", "killing", 1),
    "untold error": (leads("draining", "error", "stopping"), "told", "draining", 1),
    "untold loss of the machine": (leads("running", "vm.exited", "releasing"), "told", "running", 1),
    "a failure that claims success": (leads("releasing", "done", "ended"), "verdict", "releasing", 1),
    "a success without work": (leads("connecting", "done", "stopping"), "goal", "releasing", 0),
    "a success that claims failure": (leads("releasing", "done", "failed"), "verdict", "releasing", 0),
    "booting without disks": (leads("resolving", "done", "booting"), "needs", "booting", 0),
    "draining what is lost": (
        leads("running", "channel.lost", "draining", warn="no"),
        "needs",
        "draining",
        1,
    ),
    "nobody hears the end": (deaf("running", "end"), "heard", "running", 1),
    "nobody hears the exit": (deaf("stopping", "vm.exited"), "heard", "stopping", 0),
    "power-off for ever": (leads("stopping", "timeout", "stopping", warn="no"), "final", "stopping", 1),
    "abort for ever": (deaf("releasing", "abort"), "final", "releasing", 1),
}


QUICK = ("leak after an error",)
"""Of the mutants that take a fault to show, those that every commit waits for: some hundred sessions each."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if not faults or name in QUICK else [pytest.mark.slow])
        for name, (_, _, _, faults) in MUTANTS.items()
    ],
)
def test_a_seeded_fault_is_found_and_shrunk(standard: Lifecycle, name: str, tmp_path: Path) -> None:
    """What the analysis refuses breaks a law when it is run, and the file that says how fails."""
    change, law, state, faults = MUTANTS[name]
    data = copy.deepcopy(to_data(standard))
    change(data["states"])
    mutant = from_data(data)
    assert any(finding.level == "error" for finding in analyse(mutant, VOCABULARY))
    found = explore(mutant, worlds=["harness-ends"], order="usual", faults=faults).found
    (first,) = [one for one in found if (one.breach.law, one.breach.state) == (law, state)]
    small = shrink(mutant, first)
    assert len(small.script.cues) == faults
    fails(small, mutant, tmp_path)


def fails(found: Found, lifecycle: Lifecycle, directory: Path) -> None:
    """The written scenario breaks the law on this lifecycle, and goes well on the one that is right."""
    for name, loaded in (("standard", shipped_lifecycle("standard")), ("mutant", lifecycle)):
        written = scenario_of(found, "one", "standard")
        scenario = load_scenario(written, str(directory / "one.yaml"))
        result = run_scenario(replace(scenario, lifecycle=loaded))
        assert result.ok == (name == "standard")
        broken = {breach.law for breach in result.breaches}
        assert broken == set() if name == "standard" else found.breach.law in broken


@pytest.mark.slow
def test_a_pair_is_shrunk_to_what_is_needed(standard: Lifecycle) -> None:
    data = copy.deepcopy(to_data(standard))
    leads("running", "error", "failed", fail="no")(data["states"])
    mutant = from_data(data)
    (found,) = explore(mutant, worlds=["harness-ends"], order="usual").found
    cues = (
        Cue("transient", "resolving/begin"),
        Cue("error", "running/serve", EVERY, 0.03, (("message", "no"),)),
        Cue("abort-twice", "failed/release:vm"),
    )
    script = replace(found.script, cues=cues, work=None, opposite=True)
    small = shrink(mutant, found._replace(script=script))
    assert small.script == replace(found.script, cues=(Cue("error", "running/serve"),), opposite=False)


# --- the laws themselves, and pruning -----------------------------------------------------------------------

ACTIVITIES = Vocabulary(
    {
        "make": Activity("make", acquires=frozenset({"thing"})),
        "work": Activity("work", needs=frozenset({"thing"})),
        "remake": Activity("remake", replaces=frozenset({"thing"})),
        "clean": Activity("clean", releases_all=True),
    },
    {
        "thing": Resource(
            "thing",
            raises=frozenset({"thing.lost", "thing.alarm"}),
            loses=frozenset({"thing.lost"}),
            alarms=frozenset({"thing.alarm"}),
        ),
    },
)

REMAKING = """
    initial: making
    states:
      making:
        invoke: make
        timeout: 5s
        on:
          done: working
          error: {target: cleaning, fail: it failed}
          timeout: {target: cleaning, fail: it took too long}
          end: {target: cleaning, fail: ended early}
          thing.lost: {target: cleaning, fail: it was lost}
          thing.alarm: {target: cleaning, fail: it gave alarm}
      working:
        invoke: work
        goal: true
        timeout: 20s
        on:
          done: cleaning
          error: {target: cleaning, fail: it failed}
          timeout: {target: cleaning, fail: it took too long}
          end: cleaning
          thing.lost:
            - {target: remaking, when: {below: {lost: 1}}, count: lost, warn: it was lost}
            - {target: cleaning, fail: it was lost again}
          thing.alarm: {target: cleaning, fail: it gave alarm}
      remaking:
        invoke: remake
        timeout: 5s
        on:
          done: working
          error: {target: cleaning, fail: it failed}
          timeout: {target: cleaning, fail: it took too long}
          end: {target: cleaning, fail: ended early}
          thing.lost: {target: cleaning, fail: it was lost}
          thing.alarm: {target: cleaning, fail: it gave alarm}
      cleaning:
        invoke: clean
        timeout: 20s
        ignore: [end, abort, thing.lost, thing.alarm]
        on:
          done: [{target: ended, when: {verdict: success}}, {target: failed}]
          error: {target: failed, fail: cleaning failed}
          timeout: {target: failed, fail: cleaning took too long}
      ended: {final: success}
      failed: {final: failure}
    any:
      abort: {target: cleaning, fail: aborted}
"""


def same(pruned: Report, whole: Report) -> None:
    """Pruning leaves out sessions, and nothing that they could have shown."""
    assert pruned.found == whole.found == ()
    assert (pruned.states, pruned.transitions) == (whole.states, whole.transitions)
    assert pruned.endings.keys() == whole.endings.keys()
    assert sum(pruned.runs.values()) < sum(whole.runs.values()) / 2


def check_pruning(own: Lifecycle) -> None:
    assert analyse(own, ACTIVITIES) == []
    pruned, whole = (
        explore(own, faults=2, worlds=["harness-ends"], order="usual", vocabulary=ACTIVITIES, pruned=pruned)
        for pruned in (True, False)
    )
    same(pruned, whole)


@pytest.mark.slow
def test_pruned_pairs_show_what_all_pairs_show(lifecycle: Callable[[str], Lifecycle]) -> None:
    """On a lifecycle and a vocabulary that are not this product's."""
    data = to_data(lifecycle(REMAKING))
    del data["states"]["remaking"]
    data["states"]["working"]["on"]["thing.lost"] = {"target": "cleaning", "fail": "it was lost"}
    check_pruning(from_data(data))


@pytest.mark.slow
def test_pruned_pairs_with_a_counted_cycle_show_what_all_pairs_show(
    lifecycle: Callable[[str], Lifecycle],
) -> None:
    check_pruning(lifecycle(REMAKING))


@pytest.mark.slow
def test_the_number_of_processes_does_not_show(lifecycle: Callable[[str], Lifecycle]) -> None:
    own = lifecycle(REMAKING)
    one, two = (explore(own, vocabulary=ACTIVITIES, processes=number) for number in (1, 2))
    assert one == two
    assert one.runs.keys() == nominal_worlds(own).keys()


@pytest.mark.slow
def test_all_pairs_of_faults_break_no_law(standard: Lifecycle) -> None:
    """In one world: the others take as long again, each."""
    assert explore(standard, faults=2, worlds=["harness-ends"]).found == ()


def test_every_law_is_described() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reference" / "scenario.md").read_text("utf-8")
    for law, what in LAWS.items():
        assert f"| `{law}` | {what}" in text
