"""What is wrong with a lifecycle without looking at any path: what each state and each list must say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from kenaz_engine.lifecycle.findings import Finding
from kenaz_engine.lifecycle.model import OUTCOMES, REQUESTS, Arm, Lifecycle, State
from kenaz_engine.lifecycle.product import DEFECT, same
from kenaz_engine.lifecycle.vocabulary import Activity, Vocabulary

OF_A_STATE = (*OUTCOMES, "idle")
"""Events that belong to one entry into one state."""


class Text:
    """A lifecycle beside the vocabulary that it uses. `activities` holds the known activity of each state;
    `to_goal` the states from which some transitions lead to a goal, goals included."""

    def __init__(self, lifecycle: Lifecycle, vocabulary: Vocabulary) -> None:
        self.lifecycle = lifecycle
        self.vocabulary = vocabulary
        raised = {event for resource in vocabulary.resources.values() for event in resource.raises}
        self._events = {*OF_A_STATE, *REQUESTS, DEFECT, *raised}
        self.alarms = {event for resource in vocabulary.resources.values() for event in resource.alarms}
        self.losses = {event for resource in vocabulary.resources.values() for event in resource.loses}
        self.to_goal = self._leading_to_a_goal()
        self.activities: dict[str, Activity] = {}
        self.misspelt: dict[str, str | None] = {}
        for state in lifecycle.states.values():
            if state.final:
                continue
            name: str | None = state.invoke
            if name not in vocabulary.activities:
                self.misspelt[state.name] = name = _nearest(state.invoke, vocabulary.activities)
            if name is not None:
                # A misspelt one is taken for what it was meant to be: one mistake, one finding.
                self.activities[state.name] = vocabulary.activities[name]

    @property
    def working(self) -> Iterator[State]:
        """The states that are not final."""
        return (state for state in self.lifecycle.states.values() if not state.final)

    def findings(self) -> Iterator[Finding]:
        for state in self.working:
            yield from self._state(state)
            for event, arms in state.on.items():
                yield from self._list(state.name, event, arms)
        for event, arms in self.lifecycle.any.items():
            yield from self._list("", event, arms)
        finals = [state for state in self.lifecycle.states.values() if state.final == "success"]
        if finals and not any(state.goal for state in self.lifecycle.states.values()):
            yield Finding(
                "KL027",
                finals[0].name,
                "",
                finals[0].line,
                f"`{finals[0].name}` is a success, but no state says what counts as one",
                "mark the state in which the work gets done with `goal: true`",
            )

    def _state(self, state: State) -> Iterator[Finding]:
        def finding(code: str, event: str, message: str, mend: str, line: int = 0) -> Finding:
            return Finding(code, state.name, event, line or state.line, message, mend)

        if state.name in self.misspelt:
            nearest = self.misspelt[state.name]
            known = ", ".join(sorted(self.vocabulary.activities))
            mend = f"did you mean `{nearest}`?" if nearest else f"known: {known}"
            yield finding("KL013", "", f"there is no activity `{state.invoke}`", mend)
        for event in _due(state):
            if event not in state.on:
                message = f"nothing says what follows on `{event}`"
                yield replace(finding("KL012", event, message, f"add `{event}` under `on`"), under="")
        for event in sorted(state.ignore):
            if (found := self._ignored(state, event)) is not None:
                yield replace(found, under="ignore")
        if (activity := self.activities.get(state.name)) is not None and activity.releases_all:
            yield from self._release(state, finding)

    def _ignored(self, state: State, event: str) -> Finding | None:
        if not self.knows(event):
            return self._unknown(state.name, event, state.line)
        if state.name in self.to_goal:
            message = f"`{event}` is ignored although the session can still reach its goal"
            return Finding("KL017", state.name, event, state.line, message, "handle it under `on`")
        return None

    def _release(self, state: State, finding: Callable[..., Finding]) -> Iterator[Finding]:
        for event in ("error", "timeout"):
            for arm in state.on.get(event, ()):
                if self.lifecycle.states[arm.target].final != "failure":
                    yield finding(
                        "KL020",
                        event,
                        f"something was not released, and yet `{arm.target}` follows",
                        "lead it to a state with `final: failure`",
                        arm.line,
                    )
        if "abort" not in state.ignore and (arms := self.lifecycle.arms(state, "abort")):
            yield finding(
                "KL021",
                "abort",
                "an abort would cut the release short",
                "add `abort` to the state's `ignore`",
                arms[0].line if "abort" in state.on else state.line,
            )

    def _list(self, owner: str, event: str, arms: Sequence[Arm]) -> Iterator[Finding]:
        """What must hold for the transitions of one event, in a state or (no owner) in `any`."""

        def finding(code: str, line: int, message: str, mend: str) -> Finding:
            return Finding(code, owner, event, line, message, mend)

        if not self.knows(event):
            yield self._unknown(owner, event, arms[0].line)
        if arms[-1].when is not None:
            yield finding(
                "KL025",
                arms[-1].line,
                f"nothing follows on `{event}` when no guard holds",
                "end the list with a transition without `when`",
            )
        for index, arm in enumerate(arms):
            if (above := hidden_by(arms, index)) is not None:
                yield finding(
                    "KL023",
                    arm.line,
                    f"the transition to `{arm.target}` is never taken: {above} comes first",
                    "remove it, or move it up",
                )
            if not arm.fail and not arm.warn and self._must_tell(owner, event):
                yield finding(
                    "KL026",
                    arm.line,
                    f"`{event}` leads to `{arm.target}` and nobody is told",
                    "add `fail: text` where it spoils the session, `warn: text` where it does not",
                )

    def _must_tell(self, owner: str, event: str) -> bool:
        if event in ("error", "timeout", DEFECT) or event in self.alarms:
            return True
        if event not in self.losses:
            return False
        if owner:
            return owner in self.to_goal
        return any(
            state.name in self.to_goal and event not in state.on and event not in state.ignore
            for state in self.working
        )

    def knows(self, event: str) -> bool:
        """Whether a transition can name that event."""
        return event in self._events

    def _unknown(self, owner: str, event: str, line: int) -> Finding:
        nearest = _nearest(event, self._events)
        mend = f"did you mean `{nearest}`?" if nearest else f"known: {', '.join(sorted(self._events))}"
        return Finding("KL014", owner, event, line, f"there is no event `{event}`", mend)

    def _leading_to_a_goal(self) -> frozenset[str]:
        """The goals, and the states from which some transitions lead to one."""
        states = self.lifecycle.states
        leading = {state.name for state in states.values() if state.goal}
        grown = True
        while grown:
            more = {
                state.name
                for state in self.working
                if state.name not in leading
                for event in {*state.on, *self.lifecycle.any}
                for arm in self.lifecycle.arms(state, event)
                if arm.target in leading
            }
            leading |= more
            grown = bool(more)
        return frozenset(leading)


def _due(state: State) -> Iterator[str]:
    """The outcomes and timers that a state must handle."""
    yield from ("done", "error")
    if state.timeout is not None:
        yield "timeout"
    if state.idle is not None:
        yield "idle"


def hidden_by(arms: Sequence[Arm], index: int) -> str | None:
    """What stands above that arm and always matches where it would."""
    guard = arms[index].when
    for arm in arms[:index]:
        if arm.when is None:
            return f"the unconditional one to `{arm.target}`"
        if guard is not None and same(arm.when, guard):
            return f"the one to `{arm.target}` with the same guard"
    return None


def _nearest(word: str, known: Iterable[str]) -> str | None:
    from difflib import get_close_matches  # only a file with a fault pays for it

    return next(iter(get_close_matches(word, sorted(known), 1)), None)
