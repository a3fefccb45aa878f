"""Plays scripts on one lifecycle, and holds each session against the laws."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import trio
import trio.testing

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


class Part(NamedTuple):
    """A script to play. With `watched` the points are told that it comes to, from when the cue `after` was
    played, if there is one."""

    script: Script
    watched: bool = False
    after: Cue | None = None


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

    def play(self, script: Script, *, watched: bool = False) -> Played:
        """One session."""
        (played,) = self.play_all([Part(script, watched)])
        return played

    def play_all(self, parts: Iterable[Part]) -> list[Played]:
        """One session after the other, each from the beginning of time."""
        clock = trio.testing.MockClock(autojump_threshold=0)

        async def play() -> list[Played]:
            played = []
            for part in parts:
                _rewind(clock)
                played.append(await self._play(part))
            return played

        return trio.run(play, clock=clock)

    async def _play(self, part: Part) -> Played:
        world = World(self.laws, self._machine, part.script, watched=part.watched, after=part.after)
        outcome = await world.play()
        facts = Facts(
            world.endless, frozenset(world.things.values()), frozenset(world.hampered), world.aborted
        )
        breaches = self.laws.check(world.records, facts)
        return Played(world.records, outcome, breaches, world.ties, world.served, world.reached)


def _rewind(clock: trio.testing.MockClock) -> None:
    """Sets the clock back to 0, where no task has a deadline left. A trio for each session would cost a fifth
    of its time, and a clock of our own cannot jump (trio's issue 1587)."""
    clock._virtual_base = 0.0
    assert clock.current_time() == 0.0
