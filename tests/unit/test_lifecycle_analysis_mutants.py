"""The shipped lifecycle with one thing changed: what touches safety is found, and with the expected code."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import pytest

from kenaz_engine.lifecycle.analysis import abort_bound, analyse
from kenaz_engine.lifecycle.analysis.text import Text
from kenaz_engine.lifecycle.findings import Finding, route
from kenaz_engine.lifecycle.loader import from_data, load_lifecycle, to_data
from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.lifecycle.product import explore
from kenaz_engine.lifecycle.vocabulary import Activity, Vocabulary
from kenaz_engine.session.vocabulary import VOCABULARY

Data = dict[str, Any]
Change = Callable[[Data], None]


@pytest.fixture(scope="module")
def standard() -> Lifecycle:
    file = files("kenaz_specs").joinpath("lifecycles", "standard.yaml")
    return load_lifecycle(file.read_bytes(), "standard.yaml")


def without(state: str, event: str) -> Change:
    def change(states: Data) -> None:
        del states[state]["on"][event]

    return change


def leading(state: str, event: str, *arms: Data) -> Change:
    def change(states: Data) -> None:
        states[state]["on"][event] = list(arms)
        states[state]["ignore"] = [e for e in states[state].get("ignore", []) if e != event]

    return change


def retargeted(state: str, event: str, target: str, index: int = 0) -> Change:
    def change(states: Data) -> None:
        states[state]["on"][event][index]["target"] = target

    return change


def silent(state: str, event: str, index: int = 0) -> Change:
    def change(states: Data) -> None:
        arm = states[state]["on"][event][index]
        arm.pop("fail", None)
        arm.pop("warn", None)

    return change


def heeding(state: str, event: str) -> Change:
    def change(states: Data) -> None:
        states[state]["ignore"].remove(event)

    return change


def ignoring(state: str, event: str) -> Change:
    def change(states: Data) -> None:
        states[state]["ignore"] = [*states[state].get("ignore", []), event]
        states[state]["on"].pop(event, None)

    return change


def given(state: str, **fields: Any) -> Change:
    def change(states: Data) -> None:
        states[state].update(fields)

    return change


def both(one: Change, other: Change) -> Change:
    def change(states: Data) -> None:
        one(states)
        other(states)

    return change


MUTANTS: dict[str, tuple[Change, set[str]]] = {
    "no way on when done": (
        without("resolving", "done"),
        {"KL010", "KL012", "KL015", "KL024"},
    ),
    "no answer to an error": (without("booting", "error"), {"KL012"}),
    "no answer to the deadline": (without("stopping", "timeout"), {"KL012"}),
    "no answer to idleness": (without("running", "idle"), {"KL012"}),
    "no answer to end": (without("connecting", "end"), {"KL016"}),
    "no answer to a panic": (without("running", "guest.panic"), {"KL016"}),
    "no answer to the loss of the machine": (without("booting", "vm.exited"), {"KL016", "KL018"}),
    "no answer to the loss of the channel": (without("draining", "channel.lost"), {"KL016"}),
    "end ignored at work": (ignoring("running", "end"), {"KL017"}),
    "loss ignored while connecting": (ignoring("connecting", "channel.lost"), {"KL017", "KL018"}),
    "abort heard in the release": (heeding("releasing", "abort"), {"KL021", "KL022"}),
    "abort heard while killing": (heeding("killing", "abort"), {"KL022"}),
    "farewell unheard in the release": (heeding("releasing", "guest.bye"), {"KL016"}),
    "disks left out": (retargeted("resolving", "done", "booting"), {"KL010", "KL018"}),
    "machine left out": (retargeted("allocating", "done", "connecting"), {"KL010", "KL018"}),
    "work before the channel": (retargeted("booting", "done", "running"), {"KL010", "KL018"}),
    "work although the handshake failed": (
        leading("connecting", "error", {"target": "running", "warn": "handshake failed"}),
        {"KL018"},
    ),
    "release left out after power-off": (retargeted("stopping", "done", "ended"), {"KL019", "KL029"}),
    "release left out after a crash": (retargeted("running", "vm.exited", "failed"), {"KL019"}),
    "release left out before anything was made": (retargeted("resolving", "error", "failed"), {"KL019"}),
    "release replaced": (given("releasing", invoke="vm.kill"), {"KL019"}),
    "failed release tried again": (retargeted("releasing", "error", "releasing"), {"KL020", "KL022"}),
    "failed release called a success": (retargeted("releasing", "timeout", "ended"), {"KL020", "KL029"}),
    "release left early": (
        leading("releasing", "vm.exited", {"target": "failed", "fail": "VM exited"}),
        {"KL019"},
    ),
    "idle goes round": (retargeted("running", "idle", "connecting"), {"KL022"}),
    "power-off tried for ever": (retargeted("stopping", "timeout", "stopping"), {"KL022"}),
    "killing and stopping in turn": (retargeted("killing", "error", "stopping"), {"KL022"}),
    "unconditional first": (
        leading("releasing", "done", {"target": "failed"}, {"target": "ended"}),
        {"KL010", "KL023", "KL029"},
    ),
    "guard left out": (leading("releasing", "done", {"target": "ended"}), {"KL029"}),
    "last arm left out": (
        leading("releasing", "done", {"target": "ended", "when": {"verdict": "success"}}),
        {"KL025"},
    ),
    "verdict turned round": (
        leading(
            "releasing",
            "done",
            {"target": "ended", "when": {"verdict": "failure"}},
            {"target": "failed"},
        ),
        {"KL029"},
    ),
    "error forgotten": (silent("booting", "error"), {"KL026", "KL028"}),
    "late drain forgotten": (silent("draining", "timeout"), {"KL026"}),
    "panic forgotten": (silent("stopping", "guest.panic"), {"KL026"}),
    "crash forgotten": (silent("running", "vm.exited"), {"KL026"}),
    "early end forgotten": (silent("resolving", "end"), {"KL028"}),
    "early farewell forgotten": (silent("connecting", "guest.bye"), {"KL028"}),
    "failed release forgotten": (silent("releasing", "error"), {"KL026", "KL029"}),
    "no goal": (given("running", goal=False), {"KL027"}),
    "goal too late": (
        both(given("running", goal=False), given("stopping", goal=True)),
        {"KL017", "KL026", "KL028"},
    ),
    "activity misspelt": (given("booting", invoke="vm.starts"), {"KL013"}),
    "activity unknown": (given("booting", invoke="xyz"), {"KL013"}),
    "event unknown and ignored": (ignoring("killing", "xyz"), {"KL014"}),
    "event misspelt": (
        leading("running", "guest.paniced", {"target": "killing", "fail": "guest panicked"}),
        {"KL014"},
    ),
    "event out of place": (
        leading("allocating", "vm.exited", {"target": "releasing", "fail": "VM exited"}),
        {"KL015"},
    ),
    "nothing leads there": (
        lambda states: states.update(copy.deepcopy({"spare": states["stopping"]})),
        {"KL010"},
    ),
}  # fmt: skip


def mutate(lifecycle: Lifecycle, change: Change) -> list[Finding]:
    data = copy.deepcopy(to_data(lifecycle))
    change(data["states"])
    return analyse(from_data(data), VOCABULARY)


def test_standard_has_no_findings(standard: Lifecycle) -> None:
    assert analyse(standard, VOCABULARY) == []


@pytest.mark.parametrize("name", MUTANTS)
def test_the_mutant_is_found(standard: Lifecycle, name: str) -> None:
    change, expected = MUTANTS[name]
    assert {finding.code for finding in mutate(standard, change)} == expected


def test_abort_heard_nowhere_is_told_for_every_state(standard: Lifecycle) -> None:
    data = to_data(standard)
    del data["any"]
    found = analyse(from_data(data), VOCABULARY)
    assert {(f.code, f.event) for f in found} == {("KL016", "abort")}
    ignoring_it = {"killing", "releasing", "ended", "failed"}
    assert {f.state for f in found} == standard.states.keys() - ignoring_it


def test_the_path_is_the_shortest(standard: Lifecycle) -> None:
    found = mutate(standard, retargeted("stopping", "done", "ended"))
    assert [route(f.path) for f in found if f.code == "KL019"] == [
        "resolving --done--> allocating --done--> booting --done--> connecting --end--> stopping"
        " --done--> ended"
    ]


def test_the_bound_of_an_abort_adds_up_what_is_still_to_come(standard: Lifecycle) -> None:
    bound = abort_bound(standard, VOCABULARY)
    # clean-up of the state it found, killing and its clean-up, releasing and its clean-up, the sweep
    assert bound.seconds == 5 + (5 + 5) + (60 + 5) + 10
    assert route(bound.path) == "resolving --abort--> killing --done--> releasing --done--> failed"


def test_an_ignored_abort_counts_from_the_state_that_ignores_it(standard: Lifecycle) -> None:
    data = to_data(standard)
    data["states"]["stopping"]["ignore"].append("abort")
    bound = abort_bound(from_data(data), VOCABULARY)
    assert bound.seconds == (20 + 5) + (5 + 5) + (60 + 5) + 10
    assert route(bound.path) == "stopping --error--> killing --done--> releasing --done--> failed"


def test_an_abort_that_may_go_round_has_no_bound(standard: Lifecycle) -> None:
    data = to_data(standard)
    data["states"]["killing"]["ignore"].remove("abort")
    bound = abort_bound(from_data(data), VOCABULARY)
    assert bound.seconds == float("inf")
    assert bound.path[-1].state == bound.path[-1].target == "killing"


def test_a_session_that_begins_at_its_end_has_only_the_sweep(standard: Lifecycle) -> None:
    bound = abort_bound(from_data({**to_data(standard), "initial": "failed"}), VOCABULARY)
    assert (bound.seconds, bound.path) == (10, ())


def test_guards_on_one_and_on_true_are_two(standard: Lifecycle) -> None:
    def arm(value: object) -> Data:
        return {"target": "stopping", "when": {"data": {"code": value}}, "warn": f"error {value}"}

    last = {"target": "stopping", "fail": "protocol violated"}
    assert mutate(standard, leading("running", "error", arm(1), arm(True), last)) == []
    twice = mutate(standard, leading("running", "error", arm(1), arm(1), last))
    assert [found.code for found in twice] == ["KL023"]


def test_a_defect_of_the_engine_may_be_named(standard: Lifecycle) -> None:
    told = {"target": "stopping", "fail": "internal error"}
    assert mutate(standard, leading("running", "internal.error", told)) == []
    untold = mutate(standard, leading("running", "internal.error", {"target": "stopping"}))
    assert [found.code for found in untold] == ["KL026"]
    skipping = mutate(standard, leading("running", "internal.error", {**told, "target": "failed"}))
    assert [found.code for found in skipping] == ["KL019"]


def test_a_finding_without_a_line_stands_for_the_whole_file(standard: Lifecycle) -> None:
    [found] = mutate(standard, given("running", goal=False))
    assert str(found.fault("standard.yaml")).startswith("standard.yaml: states.ended: ")
    assert route(()) == ""


REACCEPT = Activity("channel.reaccept", needs=frozenset({"vm"}), replaces=frozenset({"channel"}))
RECONNECTING = Vocabulary({**VOCABULARY.activities, REACCEPT.name: REACCEPT}, VOCABULARY.resources)


def reconnecting(lifecycle: Lifecycle, **fields: Any) -> Lifecycle:
    """Standard, where the channel may be lost and come back five times."""
    data = to_data(lifecycle)
    data["states"]["running"]["on"]["channel.lost"] = [
        {
            "target": "reconnecting",
            "when": {"below": {"reconnects": 5}},
            "count": "reconnects",
            "warn": "channel lost",
        },
        {"target": "stopping", "fail": "channel lost too often"},
    ]
    gone = {"target": "stopping", "fail": "channel did not come back"}
    data["states"]["reconnecting"] = {
        "invoke": REACCEPT.name,
        "timeout": "60s",
        "on": {
            "done": "running",
            "error": gone,
            "timeout": gone,
            "channel.lost": gone,
            "end": "stopping",
            "guest.bye": "stopping",
            "guest.panic": {"target": "killing", "fail": "guest panicked"},
            "vm.exited": {"target": "releasing", "fail": "VM exited"},
            **fields,
        },
    }
    return from_data(data)


def test_a_channel_that_is_replaced_is_held_again(standard: Lifecycle) -> None:
    assert analyse(reconnecting(standard), RECONNECTING) == []
    assert abort_bound(reconnecting(standard), RECONNECTING).seconds == 90


def test_a_channel_that_did_not_come_back_is_not_held(standard: Lifecycle) -> None:
    late = {"target": "running", "warn": "late"}
    found = analyse(reconnecting(standard, timeout=late), RECONNECTING)
    assert [(f.code, f.message) for f in found] == [
        ("KL018", "`running` runs session.serve, but the channel may not be held"),
    ]


def test_a_counter_that_is_not_counted_bounds_nothing(standard: Lifecycle) -> None:
    data = to_data(reconnecting(standard))
    del data["states"]["running"]["on"]["channel.lost"][0]["count"]
    found = analyse(from_data(data), RECONNECTING)
    assert {(f.code, f.state, f.event) for f in found} == {
        ("KL022", "reconnecting", "done"),
        ("KL024", "running", "channel.lost"),
    }


def test_standard_is_analysed_in_few_nodes(standard: Lifecycle) -> None:
    product = explore(standard, VOCABULARY, Text(standard, VOCABULARY).activities)
    assert len(product.edges) < 60


def test_analysis_imports_nothing_heavy() -> None:
    code = (
        "import sys; import kenaz_engine.lifecycle.analysis, kenaz_engine.lifecycle.diagram;"
        "print(*({'yaml', 'trio', 'transitions', 'jsonschema', 'difflib'} & sys.modules.keys()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""
