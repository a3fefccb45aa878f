"""Plays scripts on one lifecycle, and holds each session against the laws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kenaz_engine.lifecycle.machine import Machine
from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.lifecycle.vocabulary import Vocabulary
from kenaz_engine.replay.laws import Breach, Facts, Laws
from kenaz_engine.replay.script import Cue, Script
from kenaz_engine.replay.world import Reached, World
from kenaz_engine.session.runner import Outcome
from kenaz_engine.session.vocabulary import VOCABULARY


@dataclass(frozen=True, slots=True)
class Played:
    """A session that was played. `ties` has a key for each time that the order of simultaneous events may
    have mattered. `served` says that a goal's work had begun. `reached` is empty unless it was asked for."""

    records: list[dict[str, Any]]
    outcome: Outcome
    breaches: list[Breach]
    ties: list[tuple[object, ...]]
    served: bool
    reached: list[Reached]

    @property
    def path(self) -> list[tuple[str, float]]:
        """The states and when they were entered (virtual seconds), the final one last."""
        entered = [(record["state"], record["t"]) for record in self.records if record["kind"] == "entered"]
        end = self.records[-1]
        return entered if entered[-1][0] == end["state"] else [*entered, (end["state"], end["t"])]


class Stage:
    """A lifecycle on which any number of scripts can be played. `decider` is what decides: the machine of
    real sessions, or `Table`, its quicker equal."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        vocabulary: Vocabulary = VOCABULARY,
        decider: type[Machine] = Machine,
    ) -> None:
        self.lifecycle = lifecycle
        self.vocabulary = vocabulary
        self.laws = Laws(lifecycle, vocabulary)
        self._machine = decider(lifecycle, vocabulary)

    def play(self, script: Script, *, watched: bool = False, after: Cue | None = None) -> Played:
        """One session; with `watched` also the points that it came to after the cue `after`."""
        world = World(self.laws, self._machine, script, watched=watched, after=after)
        outcome = world.play()
        facts = Facts(
            world.endless, frozenset(world.things.values()), frozenset(world.hampered), world.aborted
        )
        breaches = self.laws.check(world.records, facts)
        return Played(world.records, outcome, breaches, world.ties, world.served, world.reached)
