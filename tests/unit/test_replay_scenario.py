"""Scenarios: what a file may say, what is told of one that is wrong, and back to a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from kenaz_engine.replay.scenario import Expectation, Scenario, load_scenario, to_yaml
from kenaz_engine.replay.script import EVERY, Cue, Script
from kenaz_engine.spec.faults import InvalidFile
from kenaz_engine.spec.files import STDIN

HEAD = "apiVersion: kenaz.dev/v1\nkind: Scenario\nmetadata: {name: test}\nlifecycle: standard\n"


def load(body: str = "", head: str = HEAD) -> Scenario:
    return load_scenario(head + body, "test.yaml")


def faults_of(body: str, head: str = HEAD) -> list[str]:
    with pytest.raises(InvalidFile) as raised:
        load(body, head)
    return [str(fault) for fault in raised.value.faults]


def test_a_scenario_need_say_little() -> None:
    scenario = load()
    assert scenario.lifecycle.name == "standard"
    assert (scenario.name, scenario.script, scenario.expect) == ("test", Script(), Expectation())


def test_everything_that_a_scenario_can_say() -> None:
    scenario = load(
        """
world: {work: none, takes: {vm.start: 4s}, simultaneous: opposite}
script:
  - {at: 30s, event: end}
  - {at: running/serve, nth: 2, after: 5s, event: vm.exited, data: {clean: true}}
faults:
  - {at: failed/release:disk, always: true, fault: error, message: busy}
expect:
  path: [resolving, releasing, failed]
  state: failed
  verdict: aborted
  also: [a]
  warnings: [b, c]
  elapsed: {min: 1s, max: 2m}
  left: [disk]
"""
    )
    assert scenario.script == Script(
        (
            Cue("end", after=30.0),
            Cue("vm.exited", "running/serve", 2, 5.0, (("clean", True),)),
            Cue("error", "failed/release:disk", EVERY, 0.0, (("message", "busy"),)),
        ),
        None,
        (("vm.start", 4.0),),
        opposite=True,
    )
    assert scenario.expect == Expectation(
        ("resolving", "releasing", "failed"), "failed", "aborted", ("a",), ("b", "c"), 1.0, 120.0, ("disk",)
    )


def test_all_faults_are_told_at_once_and_in_place() -> None:
    told = faults_of(
        """
world: {takes: {vm.strat: 4s}, work: 5}
script:
  - {at: soon, event: end}
  - {at: 5s, after: 1s, nth: 2, event: guest.by}
  - {at: running/server, event: guest.bye}
faults:
  - {at: 5s, fault: error}
  - {at: running/serve, fault: boom, nth: 2, always: true}
  - {at: 7, fault: hang}
  - nothing
expect: {path: [resolving, runing], state: running}
"""
    )
    assert told == [
        'test.yaml:6:17: world.takes["vm.strat"]: the lifecycle `standard` invokes no `vm.strat` '
        "(did you mean `vm.start`?)",
        "test.yaml:6:38: world.work: must be a text, not a number (state the unit, like `5s`)",
        "test.yaml:8:10: script[0].at: `soon` is neither a time nor a point (write 30s, or STATE/BOUNDARY)",
        "test.yaml:9:14: script[1].after: goes with a point, not with a time (remove it)",
        "test.yaml:9:25: script[1].nth: goes with a point, not with a time (remove it)",
        "test.yaml:9:40: script[1].event: nothing raises `guest.by` (did you mean `guest.bye`?)",
        "test.yaml:10:10: script[2].at: there is no point `running/server` (did you mean `running/serve`?)",
        "test.yaml:12:10: faults[0].at: must be a point: a fault happens to the work that comes there "
        "(write STATE/BOUNDARY)",
        "test.yaml:13:32: faults[1].fault: must be one of error, transient, hang, to-deadline, not `boom`",
        "test.yaml:13:38: faults[1].nth: does not go with `always` (remove one of the two)",
        'test.yaml:14:10: faults[2].at: must be a text, not a number (quote it: "7")',
        "test.yaml:15:5: faults[3]: must be a mapping, not a text",
        "test.yaml:16:28: expect.path[1]: the lifecycle `standard` has no state `runing` "
        "(did you mean `running`?)",
        "test.yaml:16:44: expect.state: `running` is no final state (known: ended, failed)",
    ]


@pytest.mark.parametrize(
    ("head", "told"),
    [
        (HEAD.replace("Scenario", "Session"), "test.yaml:2:7: kind: must be `Scenario` here, not `Session`"),
        (
            HEAD.replace("standard", "standart"),
            "test.yaml:4:12: lifecycle: there is no lifecycle `standart` (did you mean `standard`?)",
        ),
        (HEAD.replace("standard", "./none.yaml"), "none.yaml: does not exist (is the path right?)"),
        (
            HEAD.replace("standard", "1"),
            'test.yaml:4:12: lifecycle: must be a text, not a number (quote it: "1")',
        ),
    ],
)
def test_without_its_lifecycle_a_scenario_is_nothing(head: str, told: str) -> None:
    assert faults_of("", head) == [told]


def test_a_lifecycle_is_found_beside_the_scenario(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(
        "apiVersion: kenaz.dev/v1\nkind: Lifecycle\nmetadata: {name: own}\ninitial: ended\n"
        "states: {ended: {final: success}}\n"
    )
    text = HEAD.replace("standard", "own.yaml")
    assert load_scenario(text, str(tmp_path / "one.yaml")).lifecycle.name == "own"
    with pytest.raises(InvalidFile, match=r"own\.yaml: does not exist"):
        load_scenario(text, STDIN)


@pytest.mark.parametrize(
    "script",
    [
        Script(),
        Script(
            (Cue("end", after=1.5), Cue("guest.bye", "running/serve", 3, 0.03)), None, (("vm.stop", 2.0),)
        ),
        Script((Cue("error", "booting/real:vm", EVERY, 0.0, (("message", "no"), ("code", 3))),), 2.5),
        Script((Cue("vm.exited", "draining/begin", data=(("clean", True),)),), opposite=True),
    ],
)
def test_what_is_written_is_what_is_read(script: Script) -> None:
    text = to_yaml("one", "standard", script, description="d", comment="first\nsecond")
    scenario = load_scenario(text, "one.yaml")
    assert (scenario.script, scenario.name, scenario.description) == (script, "one", "d")
    assert text.startswith("# first\n# second\napiVersion")
