"""Scenarios that are run: the shipped ones, what failures say, and journals that are always the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import jsonschema
import pytest
import trio

from kenaz_engine.journal.records import decode_all
from kenaz_engine.lifecycle.machine import Machine
from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.lifecycle.recorded import decision_fields, event_from
from kenaz_engine.lifecycle.vocabulary import Activity, Resource, Vocabulary
from kenaz_engine.replay.explore import Faults, nominal_worlds
from kenaz_engine.replay.scenario import Expectation, Scenario, load_scenario
from kenaz_engine.replay.script import EVERY, Cue, Script
from kenaz_engine.replay.simulate import run_scenario
from kenaz_engine.replay.stage import Stage
from kenaz_engine.session.vocabulary import VOCABULARY

SHIPPED = sorted((Path(__file__).parents[2] / "specs" / "scenarios").glob("*.scenario.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_shipped_scenarios_go_as_they_say(path: Path) -> None:
    result = run_scenario(load_scenario(path.read_text("utf-8"), str(path)))
    assert result.failures == ()
    assert result.ok


def test_an_ordinary_session_lasts_as_long_as_its_parts(standard: Lifecycle) -> None:
    result = run_scenario(Scenario("one", standard, Script(work=60.0, takes=(("vm.start", 4.0),))))
    assert [(step.state, step.t, step.event) for step in result.path][:6] == [
        ("resolving", 0.0, ""),
        ("allocating", 0.11, "done"),
        ("booting", 0.44, "done"),
        ("connecting", 4.55, "done"),
        ("running", 4.66, "done"),
        ("draining", 64.66, "done"),
    ]
    assert result.path[-1].state == "ended"
    assert result.path[-1].line == standard.states["releasing"].on["done"][0].line


OWN = """
    initial: making
    states:
      making:
        invoke: make
        goal: true
        timeout: 5s
        on:
          done: cleaning
          error: {target: cleaning, fail: it failed}
          timeout: {target: cleaning, fail: it took too long}
          end: cleaning
          thing.lost: {target: cleaning, fail: it was lost}
      cleaning:
        invoke: clean
        timeout: 20s
        ignore: [end, abort, thing.lost]
        on:
          done: [{target: ended, when: {verdict: success}}, {target: failed}]
          error: {target: failed, fail: cleaning failed}
          timeout: {target: failed, fail: cleaning took too long}
      ended: {final: success}
      failed: {final: failure}
    any:
      abort: {target: cleaning, fail: aborted}
"""
THINGS = Vocabulary(
    {
        "make": Activity("make", acquires=frozenset({"thing"})),
        "clean": Activity("clean", releases_all=True),
    },
    {"thing": Resource("thing", raises=frozenset({"thing.lost"}), loses=frozenset({"thing.lost"}))},
)
"""A vocabulary that is not this product's."""


@pytest.fixture(scope="module")
def own(lifecycle: Callable[[str], Lifecycle]) -> Lifecycle:
    return lifecycle(OWN)


def run(own: Lifecycle, *cues: Cue, work: float | None = 1.0, **expect: object) -> list[str]:
    """The failures of a scenario on the small lifecycle, line by line."""
    scenario = Scenario("one", own, Script(cues, work), Expectation(**expect), vocabulary=THINGS)  # type: ignore[arg-type]  # a test's shorthand
    return [line for failure in run_scenario(scenario).failures for line in failure.splitlines()]


def test_a_diff_shows_both_paths_with_times(own: Lifecycle) -> None:
    assert run(own, Cue("thing.lost", "making/serve", after=0.5), path=("making", "making", "ended")) == [
        "the path is another:",
        "       0s  making",
        "  -        making    was expected",
        "  -        ended     was expected",
        "  + 660ms  cleaning  by thing.lost, line 16",
        "  + 730ms  failed    by done, line 22",
    ]


def test_everything_that_is_otherwise_is_told(own: Lifecycle) -> None:
    assert run(
        own,
        Cue("error", "making/finish", data=(("message", "no"),)),
        state="ended",
        verdict="",
        also=("late",),
        warnings=("slow", "odd"),
        at_least=30.0,
        left=("thing",),
    ) == [
        'the final state: expected "ended", got "failed"',
        'the verdict: expected none, got "it failed: no"',
        'the later failures: expected "late", got none',
        'the warnings: expected "slow"; "odd", got none',
        "it lasts 1s230ms, expected at least 30s",
        'what is left: expected "thing", got none',
    ]
    assert run(own, at_most=1.0) == ["it lasts 1s180ms, expected at most 1s"]


@pytest.mark.parametrize(
    ("cues", "work", "state", "verdict", "seconds"),
    [
        ((), 1.0, "ended", "", 1.18),
        ((), None, "failed", "it took too long", 5.12),
        ((Cue("hang", "making/real:thing"),), 1.0, "failed", "it took too long", 10.07),
        (
            (Cue("transient", "making/intent:thing"),),
            1.0,
            "failed",
            "it failed: at making/intent:thing",
            0.12,
        ),
        ((Cue("to-deadline", "making/serve"),), 0.0, "ended", "", 5.07),
        ((Cue("end", after=0.5),), None, "ended", "", 0.62),
        ((Cue("abort-twice", "making/begin"),), 1.0, "failed", "aborted", 0.1),
        ((Cue("cancel", "making/serve"),), 1.0, "failed", "aborted", 0.23),
        ((Cue("defect", "making/serve"),), 1.0, "failed", "aborted: a task failed", 0.23),
        ((Cue("done", "making/serve"),), None, "ended", "", 0.18),
        ((Cue("message", "making/serve"),), 1.0, "ended", "", 1.18),
        ((Cue("thing.lost", "making/begin"),), 1.0, "ended", "", 1.18),
    ],
)
def test_what_can_happen(
    own: Lifecycle, cues: tuple[Cue, ...], work: float | None, state: str, verdict: str, seconds: float
) -> None:
    result = run_scenario(Scenario("one", own, Script(cues, work), vocabulary=THINGS))
    outcome = result.outcome
    assert (outcome.state, outcome.verdict, round(outcome.seconds, 3)) == (state, verdict, seconds)
    assert result.ok


def test_what_cannot_be_released_is_expected_or_a_failure(own: Lifecycle) -> None:
    stuck = (
        Cue("error", "cleaning/release:thing", EVERY),
        Cue("error", "failed/release:thing", EVERY, data=(("message", "busy"),)),
    )
    assert run(own, *stuck, left=("thing",)) == []
    assert run(own, *stuck) == []  # the script spoils every release of it
    assert run(own, *stuck, left=()) == ['what is left: expected none, got "thing"']


def test_a_journal_is_one_that_can_be_read_and_decided_again(
    standard: Lifecycle, record_schema: jsonschema.Draft202012Validator
) -> None:
    script = Script((Cue("guest.panic", "running/serve", after=20.0),), None)
    records, torn = decode_all(run_scenario(Scenario("one", standard, script)).journal())
    assert not torn
    for record in records:
        record_schema.validate(record)
    machine = Machine(standard, VOCABULARY)
    at = machine.start().snapshot
    decided = []
    for record in records:
        if record["kind"] == "event":
            decision = machine.decide(at, event_from(record))
            at = decision.snapshot
            decided.append(json.loads(json.dumps(decision_fields(decision))))
        elif record["kind"] == "decision":
            assert decided[-1].items() <= record.items()
    assert len(decided) > 5


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes trio's scheduler draw from a seed."""
    monkeypatch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    return trio._core._run._r.seed


@pytest.mark.parametrize("world", ["harness-ends", "channel-lost", "idle", "user-aborts"])
def test_the_order_of_tasks_does_not_show_in_a_journal(
    standard: Lifecycle, seeded: Callable[[int], None], world: str
) -> None:
    """Three seeds of the scheduler, byte for byte, for a sample of single faults."""
    nominal = nominal_worlds(standard)[world]
    faults = Faults(standard, VOCABULARY)
    reached = Stage(standard).play(nominal, watched=True).reached
    sample = [cue for point in reached for cue in faults.at(point, lasting=True, pruned=True)][::47]
    for cue in sample:
        scenario = Scenario("one", standard, Script((*nominal.cues, cue), nominal.work))
        journals = set()
        for seed in range(3):
            seeded(seed)
            journals.add(run_scenario(scenario).journal())
        assert len(journals) == 1, cue


def test_simultaneous_events_in_the_opposite_order(standard: Lifecycle) -> None:
    """The machine that was asked to power off has gone, and the request is done: which comes first?"""
    scenario = "apiVersion: kenaz.dev/v1\nkind: Scenario\nmetadata: {name: one}\nlifecycle: standard\n"
    usual = run_scenario(load_scenario(scenario, "one.yaml"))
    text = dedent(scenario) + "world: {simultaneous: opposite}\n"
    opposite = run_scenario(load_scenario(text, "one.yaml"))
    assert [step.event for step in usual.path if step.state == "releasing"] == ["vm.exited"]
    assert [step.event for step in opposite.path if step.state == "releasing"] == ["done"]
    assert usual.ok
    assert opposite.ok
