"""What a lifecycle can talk about: activities, resources, and the events that these raise.

The values here are declarations; `session` holds the ones of this product and the code behind them. Analysis
proves things about YAML from them, and the machine tells a stale event from a current one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Resource:
    """Something that a session holds and must give back.

    `raises` are the events that may arise while it is held, or may be held; those in `loses` say that it is
    gone, those in `alarms` that something went wrong in it. `within` names the resource whose loss takes this
    one with it.
    """

    name: str
    raises: frozenset[str] = frozenset()
    loses: frozenset[str] = frozenset()
    alarms: frozenset[str] = frozenset()
    within: str = ""


@dataclass(frozen=True, slots=True)
class Activity:
    """Work that a state can invoke.

    `needs` must surely be held when it starts. `acquires` are surely held after `done`, and maybe held after
    any other end. `replaces` are given back and made again. `releases_all` marks the one that gives back
    everything. `waits_for_guest` says that its deadline grows with `Capabilities.deadline_scale`.
    """

    name: str
    needs: frozenset[str] = frozenset()
    acquires: frozenset[str] = frozenset()
    replaces: frozenset[str] = frozenset()
    releases_all: bool = False
    waits_for_guest: bool = False


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """All activities and resources, by name."""

    activities: Mapping[str, Activity]
    resources: Mapping[str, Resource]

    def raiser(self, event: str) -> Resource | None:
        """The resource that raises `event`, if any does."""
        return next((r for r in self.resources.values() if event in r.raises), None)

    def lost_with(self, name: str) -> frozenset[str]:
        """The resource of that name and everything that lies within it."""
        lost = {name}
        while more := {r.name for r in self.resources.values() if r.within in lost} - lost:
            lost |= more
        return frozenset(lost)
