"""Plays a lifecycle through every fault at every point: all single ones, and all pairs.

The nominal worlds differ in what ends the work. In each, every fault is played at every point that the
session comes to; for pairs, every second fault at every point that it comes to after the first. Two moments
from which everything goes the same way are gone on from once (`Reached.key`). Where events fell together, the
opposite order is played too. What is found does not depend on the number of processes.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import chain
from typing import Final, NamedTuple

from kenaz_engine.lifecycle.machine import Table
from kenaz_engine.lifecycle.model import Arm, Lifecycle, State
from kenaz_engine.lifecycle.vocabulary import Vocabulary
from kenaz_engine.replay.laws import Breach
from kenaz_engine.replay.script import EVERY, WORK, Cue, Script, point
from kenaz_engine.replay.stage import Part, Played, Stage
from kenaz_engine.replay.world import Reached
from kenaz_engine.session.vocabulary import VOCABULARY

DELAY: Final = 0.03
"""Seconds by which a delayed fault comes after its point: while what began there is under way."""

INTO: Final = 5.0
"""Seconds into the work of a goal at which a nominal world ends it."""

BATCH: Final = 48
"""Sessions that a process plays side by side before it says how they went."""

ORDERS: Final = ("both", "usual", "opposite")


@dataclass(frozen=True, slots=True, order=True)
class Transition:
    """The `nth` transition (from 0) of an event in a state, or, with an empty `state`, under `any`."""

    state: str
    event: str
    nth: int
    target: str
    line: int

    def __str__(self) -> str:
        number = f"[{self.nth}]" if self.nth else ""
        return f"{self.state or 'any'} --{self.event}{number}--> {self.target}"


class Found(NamedTuple):
    """A breach, and the script that leads to it."""

    breach: Breach
    script: Script
    world: str
    events: int

    @property
    def size(self) -> tuple[int, int, float, bool, int]:
        """How hard it is to understand: fewer cues, then fewer events, no waits, the usual order."""
        cues = self.script.cues
        return len(cues), self.events, sum(cue.after for cue in cues), self.script.opposite, len(repr(cues))


@dataclass(frozen=True, slots=True)
class Report:
    """What was explored. `runs` counts the sessions played in each world. `found` has one entry for each
    kind of breach, the simplest script that showed it."""

    lifecycle: Lifecycle
    runs: Mapping[str, int]
    states: Mapping[str, bool]
    transitions: Mapping[Transition, bool]
    endings: Mapping[str, int]
    found: tuple[Found, ...]

    @property
    def uncovered(self) -> list[Transition]:
        """The transitions that no session took."""
        return [transition for transition, taken in self.transitions.items() if not taken]


def nominal_worlds(lifecycle: Lifecycle) -> dict[str, Script]:
    """The worlds without a fault, by name."""
    serving = [point(state.name, "serve") for state in lifecycle.states.values() if state.goal]
    often = range(1, _highest_bound(lifecycle) + 2)

    def each(what: str, times: Iterable[int] = (1,)) -> tuple[Cue, ...]:
        return tuple(Cue(what, at, nth, INTO) for at in serving for nth in times)

    # What the work must come to for its first transition to be taken, where that asks for something.
    done = tuple(
        Cue("done", point(state.name, "serve"), 1, WORK - DELAY, ((arm.when.key, arm.when.value),))
        for state in lifecycle.states.values()
        for arm in state.on.get("done", ())[:1]
        if state.goal and arm.when and arm.when.kind == "data"
    )
    worlds = {
        "harness-ends": Script(done),
        "guest-bye": Script(each("guest.bye"), work=None),
        "idle": Script(work=None),
        "channel-lost": Script(each("channel.lost")),
        "user-aborts": Script(each("abort"), work=None),
    }
    if len(often) > 1:
        worlds["channel-unsteady"] = Script(each("channel.lost", often))
    return worlds


def _highest_bound(lifecycle: Lifecycle) -> int:
    arms = [arm for _, _, _, arm in _all_arms(lifecycle)]
    return max((arm.when.value for arm in arms if arm.when and arm.when.kind == "below"), default=0)


def explore(
    lifecycle: Lifecycle,
    *,
    faults: int = 1,
    worlds: Iterable[str] | None = None,
    order: str = "both",
    pruned: bool = True,
    processes: int | None = None,
    vocabulary: Vocabulary = VOCABULARY,
) -> Report:
    """Plays all sessions with up to `faults` (0, 1, 2) faults in the nominal `worlds` (default: all).

    `order` is that of simultaneous events, one of ORDERS. `processes` defaults to the processors there are.
    """
    numbered, transitions = _numbered(lifecycle)
    scripts = nominal_worlds(lifecycle)
    stage = Stage(numbered, vocabulary, Table)
    with _players(stage, processes or _processors()) as players:
        explorer = _Explorer(stage, players, order=order, pruned=pruned)
        for name in scripts if worlds is None else worlds:
            explorer.explore(name, scripts[name], faults)
    return Report(
        lifecycle,
        explorer.runs,
        {state: state in explorer.states for state in lifecycle.states},
        {transition: number in explorer.arms for number, transition in transitions.items()},
        dict(sorted(explorer.endings.items())),
        tuple(sorted(explorer.found.values(), key=lambda found: (found.size, found.breach))),
    )


def _all_arms(lifecycle: Lifecycle) -> Iterator[tuple[str, str, int, Arm]]:
    tables = [("", lifecycle.any), *((state.name, state.on) for state in lifecycle.states.values())]
    for owner, table in tables:
        for event, arms in table.items():
            for nth, arm in enumerate(arms):
                yield owner, event, nth, arm


def _numbered(lifecycle: Lifecycle) -> tuple[Lifecycle, dict[int, Transition]]:
    """The lifecycle with numbers for lines, which tell apart what stands on one line."""
    transitions: dict[int, Transition] = {}
    numbers: dict[tuple[str, str, int], int] = {}
    for number, (owner, event, nth, arm) in enumerate(_all_arms(lifecycle), start=1):
        transitions[number] = Transition(owner, event, nth, arm.target, arm.line)
        numbers[owner, event, nth] = number

    def table(owner: str, arms: Mapping[str, tuple[Arm, ...]]) -> dict[str, tuple[Arm, ...]]:
        return {
            event: tuple(replace(arm, line=numbers[owner, event, nth]) for nth, arm in enumerate(each))
            for event, each in arms.items()
        }

    states = {name: replace(s, on=table(name, s.on)) for name, s in lifecycle.states.items()}
    return replace(lifecycle, states=states, any=table("", lifecycle.any)), transitions


# --- what to play -------------------------------------------------------------------------------------------


def _cyclic(lifecycle: Lifecycle) -> frozenset[str]:
    """The states that some transitions lead back to, or that try more than once."""
    states = lifecycle.states
    onward = {
        name: {arm.target for event in {*state.on, *lifecycle.any} for arm in lifecycle.arms(state, event)}
        for name, state in states.items()
    }
    cyclic = {name for name, state in states.items() if state.retry is not None}
    for name in states:
        reached, ahead = set[str](), list(onward[name])
        while ahead:
            state = ahead.pop()
            if state not in reached:
                reached.add(state)
                ahead += onward[state]
        if name in reached:
            cyclic.add(name)
    return frozenset(cyclic)


_Data = tuple[tuple[str, object], ...]


class Faults:
    """What can go wrong at a point of a lifecycle."""

    def __init__(self, lifecycle: Lifecycle, vocabulary: Vocabulary) -> None:
        self._lifecycle = lifecycle
        self._resources = vocabulary.resources
        self._cyclic = _cyclic(lifecycle)
        self._data: dict[str, list[_Data]] = {}
        for _, event, _, arm in _all_arms(lifecycle):
            if arm.when is not None and arm.when.kind == "data":
                variant = ((arm.when.key, arm.when.value),)
                if variant not in self._data.setdefault(event, []):
                    self._data[event].append(variant)

    def at(self, reached: Reached, *, lasting: bool, pruned: bool) -> Iterator[Cue]:
        """Every fault that makes a difference there; with `lasting` also those that come each time. With
        `pruned` none of those that the point before has had, for they come to the same."""
        state, _, boundary = reached.point.partition("/")

        def cue(what: str, after: float = 0.0, data: _Data = ()) -> Cue:
            return Cue(what, reached.point, reached.nth, after, data)

        declared = self._lifecycle.states[state]
        yield from (cue(what) for what in self._of_the_work(declared, boundary))
        if lasting and reached.nth == 1:
            if boundary.startswith("release"):
                yield Cue("error", reached.point, EVERY)
            elif state in self._cyclic:
                yield from (Cue(what, reached.point, EVERY) for what in ("error", "hang", "end", "abort"))
        beside = not (pruned and reached.again)
        if declared.final:
            if beside:
                yield cue("cancel")
            return
        if not boundary.startswith(("release", "cleanup")):
            yield from (cue("error", 0.0, data) for data in self._data.get("error", ()))
        if boundary == "serve":
            done = self._data.get("done", [])
            yield from (cue("done", 0.0, data) for data in (*done, *([()] if done else [])))
        if not beside:
            return
        yield from (cue(what) for what in ("abort-twice", "cancel", "defect"))
        happenings: list[tuple[str, list[_Data]]] = [("end", []), ("abort", [])]
        for name, resource in self._resources.items():
            if name in reached.alive:
                happenings += [(event, self._data.get(event, [])) for event in sorted(resource.raises)]
        for event, data in happenings:
            yield from (cue(event, 0.0, each) for each in ((), *data))
            # One that the state ignores only matters in the next one, and is played at its points.
            if event not in declared.ignore:
                yield cue(event, DELAY)

    def _of_the_work(self, state: State, boundary: str) -> Iterator[str]:
        yield from ("error", "hang")
        if not boundary.startswith(("release", "cleanup")) and not state.final:
            if state.retry is not None:
                yield "transient"
            if state.timeout is not None:
                yield "to-deadline"


class _Job(NamedTuple):
    """A session to play; `fault` is the cue that its script has beyond that of the session it comes from."""

    script: Script
    fault: Cue | None
    watched: bool


class _Ran(NamedTuple):
    """What is kept of a session."""

    job: _Job
    breaches: tuple[Breach, ...]
    arms: frozenset[int]
    states: frozenset[str]
    ending: str
    events: int
    served: bool
    ties: tuple[bytes, ...]
    reached: tuple[tuple[Reached, bytes], ...]


_Players = Callable[[list[_Job]], Iterable[_Ran]]


class _Explorer:
    def __init__(self, stage: Stage, players: _Players, *, order: str, pruned: bool) -> None:
        self.runs: dict[str, int] = {}
        self.states: set[str] = set()
        self.arms: set[int] = set()
        self.endings: dict[str, int] = {}
        self.found: dict[tuple[str, str], Found] = {}
        self._stage = stage
        self._faults = Faults(stage.lifecycle, stage.vocabulary)
        self._players = players
        self._order = order
        self._pruned = pruned
        self._seen: set[bytes] = set()
        self._settled: set[Cue] = set()

    def explore(self, world: str, script: Script, faults: int) -> None:
        self.runs[world] = 0
        script = replace(script, opposite=self._order == "opposite")
        before = self._play(world, [_Job(script, None, faults > 0)])
        for depth in range(1, faults + 1):
            jobs = [
                _Job(
                    replace(ran.job.script, cues=(*ran.job.script.cues, fault)),
                    fault,
                    # What comes each time has a second time of its own.
                    depth < faults and fault.nth != EVERY,
                )
                for ran in before
                for fault in self._next(ran)
                if depth > 1 or fault not in self._settled
            ]
            before = self._play(world, jobs)
            if depth == 1 and self._pruned:
                # Worlds differ in their work: what never comes to it goes the same way in all of them.
                self._settled |= {ran.job.fault for ran in before if ran.job.fault and not ran.served}

    def _play(self, world: str, jobs: list[_Job]) -> list[_Ran]:
        """Plays the jobs, and once more with the opposite order of events where the order may matter."""
        rans = list(self._players(jobs))
        if self._order == "both":
            tied = [ran.job for ran in rans if self._unseen(ran.ties)]
            rans += self._players(
                [job._replace(script=replace(job.script, opposite=not job.script.opposite)) for job in tied]
            )
        for ran in rans:
            self._note(world, ran)
        return rans

    def _unseen(self, keys: Iterable[bytes]) -> bool:
        """Whether the session of one of them goes on in a way that was not gone yet."""
        new = set(keys) if not self._pruned else set(keys) - self._seen
        self._seen |= new
        return bool(new)

    def _next(self, ran: _Ran) -> Iterator[Cue]:
        for reached, key in ran.reached:
            if self._unseen([key]):
                yield from self._faults.at(reached, lasting=ran.job.fault is None, pruned=self._pruned)

    def _note(self, world: str, ran: _Ran) -> None:
        self.runs[world] += 1
        self.states |= ran.states
        self.arms |= ran.arms
        self.endings[ran.ending] = self.endings.get(ran.ending, 0) + 1
        for breach in ran.breaches:
            found = Found(breach, ran.job.script, world, ran.events)
            kind = (breach.law, breach.state)
            if kind not in self.found or found.size < self.found[kind].size:
                self.found[kind] = found


# --- playing ------------------------------------------------------------------------------------------------


def _batches(jobs: list[_Job]) -> Iterator[list[_Job]]:
    return (jobs[start : start + BATCH] for start in range(0, len(jobs), BATCH))


def _play_batch(stage: Stage, jobs: list[_Job]) -> list[_Ran]:
    played = stage.play_all(Part(job.script, job.watched, job.fault) for job in jobs)
    return list(map(_ran, jobs, played))


def _ran(job: _Job, played: Played) -> _Ran:
    decisions = [record for record in played.records if record["kind"] == "decision"]
    left = ", ".join(entry.resource for entry in played.outcome.left)
    return _Ran(
        job,
        tuple(played.breaches),
        frozenset(record["arm"] for record in decisions if "arm" in record),
        frozenset(state for state, _ in played.path),
        f"{played.outcome.state}{f', leaving {left}' if left else ''}",
        len(decisions),
        played.served,
        tuple(map(_digest, played.ties)),
        tuple((reached._replace(key=()), _digest(reached.key)) for reached in played.reached),
    )


def _digest(key: tuple[object, ...]) -> bytes:
    """Equal for equal keys, also of another process."""
    return blake2b(repr(key).encode(), digest_size=12).digest()


_stage: Stage | None = None
"""What a process of the pool plays on."""


def _start(lifecycle: Lifecycle, vocabulary: Vocabulary) -> None:
    """Begins a process of the pool. A Ctrl-C is its parent's to handle."""
    global _stage  # noqa: PLW0603  # what a pool's processes keep can be nowhere else
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _stage = Stage(lifecycle, vocabulary, Table)
    # Sessions make much garbage and keep little: looking for it less often is a tenth faster.
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def _play(jobs: list[_Job]) -> list[_Ran]:
    assert _stage is not None
    return _play_batch(_stage, jobs)


def _processors() -> int:
    ours = getattr(os, "sched_getaffinity", None)
    return len(ours(0)) if ours else os.cpu_count() or 1


@contextmanager
def _players(stage: Stage, processes: int) -> Iterator[_Players]:
    if processes == 1:
        yield lambda jobs: chain.from_iterable(map(partial(_play_batch, stage), _batches(jobs)))
        return
    # Nothing of ours runs in threads before the pool is there, which makes forking safe; elsewhere it is not.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with context.Pool(processes, _start, (stage.lifecycle, stage.vocabulary)) as pool:
        yield lambda jobs: chain.from_iterable(pool.imap(_play, _batches(jobs)))
