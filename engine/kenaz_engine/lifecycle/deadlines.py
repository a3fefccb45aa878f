"""The deadlines of one session: the lifecycle's, the spec's own, and the stretch for an emulated guest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kenaz_engine.lifecycle.model import Lifecycle, State
from kenaz_engine.lifecycle.vocabulary import Vocabulary


def with_deadlines(
    lifecycle: Lifecycle, vocabulary: Vocabulary, overrides: Mapping[str, float], scale: float
) -> Lifecycle:
    """The lifecycle as it is run.

    `overrides` maps states to seconds and is taken at its word. The other states whose activity waits for the
    guest get `scale` times their timeout.
    """

    def effective(state: State) -> State:
        if state.name in overrides:
            return replace(state, timeout=overrides[state.name])
        activity = vocabulary.activities.get(state.invoke)
        if state.timeout is None or activity is None or not activity.waits_for_guest:
            return state
        return replace(state, timeout=state.timeout * scale)

    return replace(lifecycle, states={name: effective(state) for name, state in lifecycle.states.items()})
