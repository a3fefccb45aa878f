"""Explain: what would happen, by which line, and why not otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.replay.explain import Considered, Explanation, explain

TEXT = """
    initial: a
    states:
      a:
        invoke: image.ensure
        timeout: none
        idle: 5s
        retry: {attempts: 3, when: {data: {transient: true}}, backoff: {first: 2s, jitter: 0.2}}
        ignore: [guest.bye, abort]
        on:
          done: a
          error: {target: bad, fail: no image}
          idle: [{target: a, when: {below: {rounds: 2}}, count: rounds}, {target: bad, warn: tired}]
          vm.exited:
            - {target: good, when: {data: {clean: true}}}
            - {target: bad, when: {data: {clean: false}}}
          end: [{target: good, when: {verdict: success}}, {target: bad}]
      b: {invoke: image.ensure, timeout: 5s, retry: {attempts: 2}, on: {done: a, timeout: a}}
      good: {final: success}
      bad: {final: failure}
    any: {abort: {target: bad, fail: aborted}, zork: b}
"""


@pytest.fixture
def ask(lifecycle: Callable[[str], Lifecycle]) -> Callable[..., Explanation]:
    built = lifecycle(TEXT)
    return lambda state, event, **given: explain(built, state, event, **given)


Ask = Callable[..., Explanation]


@pytest.mark.parametrize(
    ("state", "event", "given", "result", "leads_to", "line"),
    [
        ("a", "done", {}, "leads to `a`, which invokes image.ensure, entered anew", "a", 14),
        ("a", "error", {}, "leads to `bad`, the end: failure", "bad", 15),
        (
            "a",
            "error",
            {"data": {"transient": True}},
            "stays: attempt 2 of 3 comes after 2s, give or take 20%",
            "",
            0,
        ),
        ("b", "error", {}, "stays: attempt 2 of 2 comes after 1s", "", 0),
        ("a", "retry.due", {}, "stays: image.ensure is started again", "", 0),
        ("a", "idle", {"counters": {"rounds": 1}}, "leads to `a`, which", "a", 16),
        ("a", "idle", {"counters": {"rounds": 2}}, "leads to `bad`", "bad", 16),
        ("a", "vm.exited", {"data": {"clean": True}}, "leads to `good`, the end: success", "good", 18),
        ("a", "vm.exited", {}, "leads to nothing: no guard holds", "", 0),
        ("a", "end", {"failed": True}, "leads to `bad`", "bad", 20),
        ("a", "end", {}, "leads to `good`", "good", 20),
        ("a", "abort", {}, "leads to nothing: the state ignores it", "", 0),
        ("b", "abort", {}, "leads to `bad`", "bad", 24),
        ("b", "end", {}, "leads to nothing: no transition is for it", "", 0),
        ("good", "abort", {}, "leads to nothing: the state is final", "", 0),
        ("good", "retry.due", {}, "leads to nothing: the state is final", "", 0),
    ],
)
def test_what_would_happen(
    ask: Ask, state: str, event: str, given: dict[str, Any], result: str, leads_to: str, line: int
) -> None:
    found = ask(state, event, **given)
    assert found.result.startswith(result)
    assert (found.leads_to, found.line) == (leads_to, line)
    assert str(found).startswith(f"test.yaml:{line or found.state_line}: `{event}` in `{state}` {result}")
    assert json.loads(json.dumps(found.as_data()))["leadsTo"] == (leads_to or None)


def test_nothing_is_due_without_retry(lifecycle: Callable[[str], Lifecycle]) -> None:
    found = explain(lifecycle(TEXT.replace("retry: {attempts: 2}, ", "")), "b", "retry.due")
    assert (found.reason, found.result) == (
        "stale",
        "leads to nothing: the state has no `retry`, so that nothing is due",
    )


def test_a_strict_lifecycle(lifecycle: Callable[[str], Lifecycle]) -> None:
    found = explain(lifecycle("strict: true\n" + TEXT[1:].replace("\n    ", "\n").lstrip()), "b", "guest.bye")
    assert (found.result, found.reason) == ("is a defect: the lifecycle is strict", "unexpected")


def considered(found: Explanation) -> list[tuple[bool, str]]:
    return [(arm.taken, arm.why) for arm in found.considered]


@pytest.mark.parametrize(
    ("state", "event", "given", "expected"),
    [
        (
            "a",
            "idle",
            {},
            [(True, "rounds is 0"), (False, "line 16 came first")],
        ),
        ("a", "idle", {"counters": {"rounds": 2}}, [(False, "rounds is 2"), (True, "it has no guard")]),
        (
            "a",
            "vm.exited",
            {"data": {"clean": False}},
            [(False, "data.clean is false"), (True, "data.clean is false")],
        ),
        ("a", "vm.exited", {"data": {"clean": "true"}}, [(False, "data.clean is 'true'")] * 2),
        ("a", "vm.exited", {}, [(False, "the event has no clean")] * 2),
        (
            "a",
            "end",
            {"failed": True},
            [(False, "the verdict is failure so far"), (True, "it has no guard")],
        ),
        ("a", "end", {}, [(True, "the verdict is success so far"), (False, "line 20 came first")]),
        ("a", "error", {"data": {"transient": True}}, [(False, "retry admits the error, which comes first")]),
        ("a", "abort", {}, [(False, "the state's own entry under `ignore` hides `any`")]),
        ("good", "abort", {}, [(False, "the state is final")]),
        ("b", "zork", {}, [(True, "it has no guard")]),
    ],
)
def test_why_not_otherwise(
    ask: Ask, state: str, event: str, given: dict[str, Any], expected: list[tuple[bool, str]]
) -> None:
    assert considered(ask(state, event, **given)) == expected


def test_own_transitions_hide_any(lifecycle: Callable[[str], Lifecycle]) -> None:
    found = explain(lifecycle(TEXT.replace("done: a, ", "done: a, abort: a, ")), "b", "abort")
    assert found.considered[-1] == Considered(
        24, 'any: to `bad`, fail "aborted"', False, "the state's own entry under `on` hides `any`"
    )


def test_what_a_transition_says(ask: Ask) -> None:
    says = [arm.says for arm in ask("a", "idle").considered]
    assert says == ["to `a`, when rounds is below 2, count rounds", 'to `bad`, warn "tired"']
    assert ask("a", "vm.exited").considered[0].says == "to `good`, when data.clean is true"
    assert ask("a", "end").considered[0].says == "to `good`, when the verdict is success"


@pytest.mark.parametrize(
    ("state", "event", "given", "note"),
    [
        ("a", "vm.exited", {}, "`vm.exited` arises only while vm is held, or may be."),
        ("a", "idel", {}, "Nothing raises `idel` (did you mean `idle`?)."),
        ("a", "qqqqqq", {}, "Nothing raises `qqqqqq` (known: abort, channel.lost,"),
        ("a", "timeout", {}, "The state has no timeout, so that this event cannot arise there."),
        ("b", "idle", {}, "The state has no `idle`, so that this event cannot arise there."),
        ("a", "error", {}, "`retry` admits an error when data.transient is true: --data says so."),
        ("b", "error", {}, "After attempt 2, or when `retry.when` does not hold, these count."),
    ],
)
def test_notes(ask: Ask, state: str, event: str, given: dict[str, Any], note: str) -> None:
    [found] = ask(state, event, **given).notes
    assert found.startswith(note)


def test_it_reads_well(ask: Ask) -> None:
    assert str(ask("a", "vm.exited", data={"clean": False})).splitlines() == [
        "test.yaml:19: `vm.exited` in `a` leads to `bad`, the end: failure",
        "",
        "    line 18   to `good`, when data.clean is true  not taken: data.clean is false",
        "  > line 19   to `bad`, when data.clean is false  taken: data.clean is false",
        "",
        "  `vm.exited` arises only while vm is held, or may be.",
    ]
    assert str(ask("b", "end")).count("\n") == 0
