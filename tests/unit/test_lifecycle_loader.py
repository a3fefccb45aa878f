from __future__ import annotations

import json
from importlib.resources import files

import pytest

from kenaz_engine.lifecycle.loader import from_data, load_lifecycle, to_data
from kenaz_engine.lifecycle.model import Arm, Backoff, Guard, Lifecycle, Retry, State
from kenaz_engine.spec.faults import InvalidFile, Place
from kenaz_engine.spec.schema import shipped
from kenaz_engine.spec.units import parse_duration

TEXT = """\
apiVersion: kenaz.dev/v1
kind: Lifecycle
metadata: {name: tiny, description: Two steps.}
initial: work
strict: true
states:
  work:
    invoke: session.serve
    timeout: none
    idle: 30m
    cleanup: 2s
    goal: true
    ignore: [guest.bye]
    retry: {attempts: 3, when: {data: {transient: true}}, backoff: {first: 500ms, max: 1m, jitter: 0.5}}
    on:
      done: ended
      idle: {target: ended, count: idles, when: {below: {idles: 5}}}
      error:
        - {target: ended, warn: well, when: {verdict: success}}
        - target: failed
          fail: broken
  ended: {final: success}
  failed: {final: failure}
any: {abort: {target: failed, fail: aborted}}
"""


def standard() -> str:
    return files("kenaz_specs").joinpath("lifecycles", "standard.yaml").read_text("utf-8")


def test_everything_arrives() -> None:
    lifecycle = load_lifecycle(TEXT, "tiny.yaml")
    assert lifecycle == Lifecycle(
        name="tiny",
        description="Two steps.",
        initial="work",
        strict=True,
        file="tiny.yaml",
        states={
            "work": State(
                name="work",
                invoke="session.serve",
                timeout=None,
                idle=1800.0,
                cleanup=2.0,
                goal=True,
                ignore=frozenset({"guest.bye"}),
                retry=Retry(3, Guard("data", "transient", True), Backoff(0.5, 2.0, 60.0, 0.5)),
                on={
                    "done": (Arm("ended", line=16),),
                    "idle": (Arm("ended", Guard("below", "idles", 5), count="idles", line=17),),
                    "error": (
                        Arm("ended", Guard("verdict", "", "success"), warn="well", line=19),
                        Arm("failed", fail="broken", line=20),
                    ),
                },
                line=7,
            ),
            "ended": State("ended", final="success", line=22),
            "failed": State("failed", final="failure", line=23),
        },
        any={"abort": (Arm("failed", fail="aborted", line=24),)},
    )


def test_the_schema_s_defaults_are_those_of_the_model() -> None:
    state = shipped("Lifecycle")["$defs"]["state"]["properties"]
    assert parse_duration(state["cleanup"]["default"]) == State("x").cleanup
    backoff = {
        name: inner["default"]
        for name, inner in state["retry"]["properties"]["backoff"]["properties"].items()
    }
    plain = Backoff()
    assert (parse_duration(backoff["first"]), backoff["factor"]) == (plain.first, plain.factor)
    assert (parse_duration(backoff["max"]), backoff["jitter"]) == (plain.maximum, plain.jitter)


def test_a_lifecycle_survives_a_journal() -> None:
    lifecycle = load_lifecycle(TEXT, "tiny.yaml")
    stored = json.loads(json.dumps(to_data(lifecycle)))
    again = from_data(stored, lambda _: Place("journal.jsonl", 1))
    assert again.file == "journal.jsonl"
    assert {arm.line for state in again.states.values() for arms in state.on.values() for arm in arms} == {1}
    assert to_data(again) == stored
    assert from_data(stored).states["work"].retry == lifecycle.states["work"].retry


def test_damaged_data_are_refused() -> None:
    stored = to_data(load_lifecycle(TEXT, "tiny.yaml"))
    stored["states"]["work"]["on"]["done"] = "nowhere"
    with pytest.raises(InvalidFile, match=r"<data>: states.work.on.done: there is no state `nowhere`.*KL002"):
        from_data(stored)
    with pytest.raises(InvalidFile, match="is no Lifecycle file: empty"):
        from_data(None)


@pytest.mark.parametrize("event", ["done", "error", "timeout", "idle", "retry.due"])
def test_neither_outcomes_nor_timers_are_ignored(event: str) -> None:
    with pytest.raises(InvalidFile, match=f"`{event}` cannot be ignored.*KL009"):
        load_lifecycle(TEXT.replace("[guest.bye]", f"[guest.bye, {event}]"), "f")


def test_faults_of_the_yaml_come_with_those_of_the_lifecycle() -> None:
    with pytest.raises(InvalidFile) as caught:
        load_lifecycle(TEXT.replace("done: ended", "done: endd\n      done: ended"), "f")
    assert [fault.code for fault in caught.value.faults] == ["KL002", ""]


def test_the_standard_lifecycle() -> None:
    lifecycle = load_lifecycle(standard(), "standard.yaml")
    assert lifecycle.initial == "resolving"
    assert [state.name for state in lifecycle.states.values() if state.goal] == ["running"]
    assert {name: state.final for name, state in lifecycle.states.items() if state.final} == {
        "ended": "success",
        "failed": "failure",
    }
    lines = standard().splitlines()
    for state in lifecycle.states.values():
        assert lines[state.line - 1].strip().startswith(f"{state.name}:")
        for arms in state.on.values():
            for arm in arms:
                assert arm.target in lines[arm.line - 1]
