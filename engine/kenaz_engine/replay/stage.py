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
        """Sessions that know nothing of each other, each from the beginning of time.

        They are played side by side, for what trio does each time that it looks for who can run is most of
        the cost of one. The clock only jumps where all of them wait, so none sees the others.
        """
        played: dict[int, Played] = {}

        async def play(number: int, part: Part) -> None:
            played[number] = await self._play(part)

        async def play_side_by_side() -> None:
            async with trio.open_nursery() as nursery:
                for number, part in enumerate(parts):
                    nursery.start_soon(play, number, part)

        trio.run(play_side_by_side, clock=trio.testing.MockClock(autojump_threshold=0))
        return [played[number] for number in sorted(played)]

    async def _play(self, part: Part) -> Played:
        world = World(self.laws, self._machine, part.script, watched=part.watched, after=part.after)
        outcome = await world.play()
        facts = Facts(
            world.endless, frozenset(world.things.values()), frozenset(world.hampered), world.aborted
        )
        breaches = self.laws.check(world.records, facts)
        return Played(world.records, outcome, breaches, world.ties, world.served, world.reached)
