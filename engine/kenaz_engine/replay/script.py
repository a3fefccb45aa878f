"""What happens in a made-up session, as frozen values: how long things take, and what goes wrong when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.lifecycle.vocabulary import Activity, Vocabulary

FAULTS: Final = ("error", "transient", "hang", "to-deadline")
"""What can happen to the work that comes to a point: it fails, fails in a way worth another attempt, never
goes on, or goes on at the very moment of the state's deadline."""

REQUESTS: Final = ("end", "abort", "abort-twice", "cancel", "defect", "done", "message")
"""What can happen beside the work, whatever is held: a request to end or to abort, an abort repeated while
the first is carried out, the launcher cancelled, one of its tasks failing, the work of the state being
finished, something coming through the channel."""

EVERY: Final = 0
"""The `nth` of what happens each time."""

AGAIN: Final = 0.03
"""Seconds between the two of `abort-twice`: within the clean-up that the first one causes."""

WORK: Final = 10.0
"""Seconds that the work of a goal takes unless a script says otherwise."""


@dataclass(frozen=True, slots=True)
class Cue:
    """`what` happens `after` seconds from the `nth` time that the session comes to the point `at` (EVERY:
    each time); with an empty `at`, from the session's beginning. `what` is one of FAULTS (which need a
    point), one of REQUESTS, or an event that a resource raises; it comes to nothing where that resource is
    not held."""

    what: str
    at: str = ""
    nth: int = 1
    after: float = 0.0
    data: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Script:
    """How a session goes. `work` is how long the work of a goal takes, None: until something else ends it.
    `takes` are the seconds of other activities. `opposite` turns the order of simultaneous events round."""

    cues: tuple[Cue, ...] = ()
    work: float | None = WORK
    takes: tuple[tuple[str, float], ...] = ()
    opposite: bool = False


def point(state: str, boundary: str) -> str:
    """The name of a point: the state that the session is in, and the boundary that it comes to."""
    return f"{state}/{boundary}"


def made_by(activity: Activity, vocabulary: Vocabulary) -> list[str]:
    """What an activity acquires, in the order in which it does here: that of the vocabulary."""
    return [name for name in vocabulary.resources if name in activity.acquires | activity.replaces]


def activity_of(lifecycle: Lifecycle, vocabulary: Vocabulary, state: str) -> Activity:
    """The activity of a state; one that the vocabulary does not know does nothing but take its time."""
    name = lifecycle.states[state].invoke
    return vocabulary.activities.get(name, Activity(name))


def points_of(lifecycle: Lifecycle, vocabulary: Vocabulary) -> Iterator[str]:
    """All points that a session may come to, in the order of the file."""
    for state in lifecycle.states.values():
        if not state.final:
            activity = activity_of(lifecycle, vocabulary, state.name)
            boundaries = ["begin"]
            for name in made_by(activity, vocabulary):
                boundaries += [f"intent:{name}", f"real:{name}", f"acquired:{name}"]
            boundaries += [*([] if activity.releases_all else ["serve"]), "finish", "cleanup"]
            yield from (point(state.name, boundary) for boundary in boundaries)
        yield from (point(state.name, f"release:{name}") for name in vocabulary.resources)
