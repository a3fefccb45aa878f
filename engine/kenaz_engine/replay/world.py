"""A made-up world for one session: activities that do what their declarations say, on virtual time.

No files, no threads, no waiting: trio's mock clock jumps to the next deadline as soon as every task is
blocked. The runner, its inbox and its ledger are the real ones. Whatever the scheduler does, the same script
gives the same records.

A session comes to points, and a script's cues are played there:

    STATE/begin                              the activity of the state begins
    STATE/intent:R, real:R, acquired:R       it acquires R: written down, made, known by its handle
    STATE/serve, STATE/finish                it works, it is about to return
    STATE/cleanup                            its clean-up, also where it was cancelled
    STATE/release:R                          R is about to be given back, by whatever the session does there
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Final, NamedTuple

import trio

from kenaz_engine.lifecycle.machine import Event, Machine
from kenaz_engine.lifecycle.vocabulary import Activity
from kenaz_engine.replay.laws import Laws
from kenaz_engine.replay.script import AGAIN, EVERY, FAULTS, Cue, Script, made_by, point
from kenaz_engine.session.ledger import AcquireTimeout, Ledger, Made, ReleaseError
from kenaz_engine.session.recorder import Recorder
from kenaz_engine.session.runner import ActivityError, ActivityFunction, Outcome, Runner, Work

TAKES: Final = 1.0
"""Seconds that an activity works unless a script says otherwise; one that acquires only takes what that
takes."""

MAKE: Final = 0.11
CLEANUP: Final = 0.05
RELEASE: Final = 0.07
"""Seconds that making a thing, cleaning up, and giving back what raises events take; anything else is given
back at once. None is a multiple of another, so that what follows from different things seldom falls
together."""

HORIZON: Final = 1e10
"""Seconds after which a session is taken to wait for ever: three hundred years."""

BESIDE: Final = 1e-9
"""Seconds by which a timed cue that looks at the world comes after its moment: what else happens then has
happened, in whichever order."""

ENDINGS: Final[Mapping[str, bool]] = {"vm.stop": True, "vm.kill": False}
"""Activities that end the machine, and whether it ends cleanly."""

MACHINE: Final = "vm"


class Endless(Exception):
    """A session that does not come to an end. Raised into its runner, which then sweeps."""


class Reached(NamedTuple):
    """A point that a session came to. `alive` are the resources that can raise events then, `key` is equal
    for two moments from which everything goes the same way. `again` says that nothing was decided, and no
    time has passed, since the point before: what happens beside the work then is decided at the same moment.
    """

    point: str
    nth: int
    alive: frozenset[str]
    key: tuple[object, ...]
    again: bool


class World:
    """One session. `play` it once; then look at what it left.

    `things` are those that really exist, with their resource. `hampered` are the ledger ids whose last
    release the script spoiled. `aborted` is the moment of the first abort. `served` says that a goal's work
    has begun. `ties` has a key for each time that the order of simultaneous events may have mattered.
    `reached` is filled where `watched` says so, from when the cue `after` was played, if there is one.
    """

    def __init__(
        self,
        laws: Laws,
        machine: Machine,
        script: Script,
        *,
        watched: bool = False,
        after: Cue | None = None,
    ) -> None:
        self.records: list[dict[str, Any]] = []
        self.reached: list[Reached] = []
        self.ties: list[tuple[object, ...]] = []
        self.things: dict[str, str] = {}
        self.hampered: set[int] = set()
        self.aborted = math.inf
        self._cancelled = math.inf
        self.endless = ""
        self.served = False
        self._laws = laws
        self._vocabulary = vocabulary = laws.vocabulary
        self._lifecycle = machine.lifecycle
        self._script = script
        self._watched = watched
        self._after = after
        self._takes = dict(script.takes)
        self._goals = {state.invoke for state in self._lifecycle.states.values() if state.goal}
        self._losses = {
            name: next(iter(sorted(resource.loses)), "") for name, resource in vocabulary.resources.items()
        }
        self._alive: dict[str, int] = {}
        self._made = 0
        self._events = 0
        self._counts: dict[str, int] = {}
        self._cues: dict[tuple[str, int], list[Cue]] = {}
        for cue in script.cues:
            if cue.at:
                self._cues.setdefault((cue.at, cue.nth), []).append(cue)
        self._pending: dict[int, tuple[str, float]] = {}
        self._scheduled = 0
        self._done = trio.Event()
        self._done_data: dict[str, Any] = {}
        self._began = self._left = self._entered = self._touched = 0.0
        self._entry, self._leaving = 1, False
        self._until = math.inf
        self._goal_passed = False
        self._moment: tuple[object, ...] = ()
        recorder = Recorder(self)
        self.ledger = Ledger(recorder, dict.fromkeys(vocabulary.resources, self._unmake))
        table = {
            self._lifecycle.states[name].invoke: self._activity(activity)
            for name, activity in laws.activities.items()
        }
        self.runner = Runner(
            machine,
            table,
            self.ledger,
            recorder,
            settle=True,
            opposite=script.opposite,
            jitter=lambda: 0.5,
        )

    async def play(self) -> Outcome:
        """Runs the session to its end, on a clock that begins at 0 and jumps to the next deadline."""
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._horizon)
            for cue in self._script.cues:
                if not cue.at:
                    self._schedule(cue)
            with trio.CancelScope() as self._scope:
                await self.runner.run()
            self._nursery.cancel_scope.cancel()
        assert self.runner.outcome is not None
        return self.runner.outcome

    async def _horizon(self) -> None:
        await trio.sleep(HORIZON)
        self.endless = "waits for ever"
        self.runner.inbox.put(Event("abort"))

    # --- what the runner writes down ------------------------------------------------------------------------

    def append(self, kind: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Keeps a record, stamped with virtual time. Raises Endless instead of going round for ever."""
        t = trio.current_time()
        record = {"seq": len(self.records), "t": round(t, 6), "wall": round(t, 3), "kind": kind, **fields}
        self.records.append(record)
        match kind:
            case "event":
                self._events += 1
                if fields.get("data", {}).get("by") == "cancel":
                    self._cancelled = math.inf
                if self.runner.inbox.ties > len(self.ties):
                    self.ties.append(self._key(fields["type"]))
                if self._events > self._laws.most_events:
                    self.endless = "goes round for ever"
                if self.endless:
                    raise Endless(self.endless)
            case "decision":
                if fields["entry"] != self._entry:
                    self._entry, self._leaving, self._left = fields["entry"], True, t
            case "entered":
                self._leaving = False
                self._entered = self._touched = t
                self._goal_passed |= self._lifecycle.states[fields["state"]].goal
        return record

    # --- activities -----------------------------------------------------------------------------------------

    def _activity(self, activity: Activity) -> ActivityFunction:
        async def run(work: Work) -> dict[str, Any]:
            state = self.runner.snapshot.state
            self._began = trio.current_time()
            finished = False
            try:
                await self._at(state, "begin")
                data = await self._body(state, activity, work)
                await self._at(state, "finish")
                finished = True
                return data
            except (AcquireTimeout, ReleaseError) as exc:
                raise ActivityError(str(exc)) from exc
            finally:
                with work.cleaning():
                    if not finished:
                        await trio.sleep(CLEANUP)
                    await self._at(state, "cleanup")

        return run

    async def _body(self, state: str, activity: Activity, work: Work) -> dict[str, Any]:
        for name in made_by(activity, self._vocabulary):
            if name in activity.replaces:
                await self.ledger.release(name)
            await self._acquire(state, activity, name)
        if not activity.releases_all:
            self._done, self._done_data = trio.Event(), {}
            await self._at(state, "serve")
            return await self._serve(activity)
        timeout = math.inf if work.timeout is None else work.timeout
        self._until = trio.current_time() + timeout
        if left := await self.ledger.release_all(self._until):
            raise ActivityError("; ".join(f"the {entry.resource} {entry.error}" for entry in left))
        return {}

    async def _acquire(self, state: str, activity: Activity, name: str) -> None:
        self._made += 1
        thing = f"{name}-{self._made}"
        intent = {"name": thing}
        uses = {*activity.needs, self._vocabulary.resources[name].within}

        async def make() -> tuple[Made, None]:
            await self._at(state, f"intent:{name}")
            await trio.sleep(MAKE)
            self.things[thing] = name
            self._alive[name] = self.ledger.last
            await self._at(state, f"real:{name}")
            return Made({"name": thing}, partial(self._unmake, intent)), None

        await self.ledger.acquire(name, name, intent, make, uses=self._ordered(uses))
        await self._at(state, f"acquired:{name}")

    def _ordered(self, names: set[str]) -> list[str]:
        return [name for name in self._vocabulary.resources if name in names]

    async def _unmake(self, intent: Mapping[str, Any]) -> None:
        thing = intent["name"]
        entry = next(entry for entry in self.ledger.entries if entry.intent is intent)
        await self._at(self.runner.snapshot.state, f"release:{entry.resource}", entry.id)
        if self._vocabulary.resources[entry.resource].raises:
            await trio.sleep(RELEASE)
        self.things.pop(thing, None)
        if self._alive.get(entry.resource) == entry.id:
            self._lose(entry.resource)

    async def _serve(self, activity: Activity) -> dict[str, Any]:
        ends = ENDINGS.get(activity.name)
        if ends is not None and MACHINE not in self._alive:
            return {}
        usual: float | None = 0.0 if activity.acquires or activity.replaces else TAKES
        if activity.name in self._goals:
            usual, self.served = self._script.work, True
        seconds = self._takes.get(activity.name, usual)
        if seconds == 0:
            return self._done_data
        with trio.move_on_after(math.inf if seconds is None else seconds):
            await self._done.wait()
        if ends is not None:
            self._lose(MACHINE, clean=ends)
        return self._done_data

    def _lose(self, name: str, **data: Any) -> None:
        """A resource ends by what the session does to it, and its watcher says so."""
        if event := self._losses[name]:
            self._tell(event, data)
        else:
            self._alive.pop(name, None)

    # --- cues -----------------------------------------------------------------------------------------------

    async def _at(self, state: str, boundary: str, ledger_id: int = 0) -> None:
        here = point(state, boundary)
        nth = self._counts[here] = self._counts.get(here, 0) + 1
        if self._watched and self._after is None:
            before, self._moment = self._moment, self._moment_now()
            again = before == self._moment
            self.reached.append(Reached(here, nth, frozenset(self._alive), self._key(here), again))
        for cue in (*self._cues.pop((here, nth), ()), *self._cues.get((here, EVERY), ())):
            if cue.what not in FAULTS:
                self._schedule(cue)
                continue
            if ledger_id and self._lifecycle.states[state].final:
                self.hampered.add(ledger_id)
            await self._fail(cue, state)

    async def _fail(self, cue: Cue, state: str) -> None:
        """What happens to the work that came to the point."""
        if cue.after:
            await trio.sleep(cue.after)
        self._played(cue)
        match cue.what:
            case "error" | "transient":
                data = dict(cue.data)
                message = str(data.pop("message", f"at {cue.at}"))
                raise ActivityError(message, transient=cue.what == "transient", **data)
            case "hang":
                await trio.sleep_forever()
            case "to-deadline":
                timeout = self._lifecycle.states[state].timeout
                if timeout is not None:
                    await trio.sleep_until(self._entered + timeout)

    def _schedule(self, cue: Cue) -> None:
        """Something happens beside the work, now or later."""
        if cue.at and not cue.after:
            self._happen(cue)
            return
        self._scheduled += 1
        at = trio.current_time() + cue.after
        if cue.what not in ("end", "abort", "abort-twice"):
            at += BESIDE * self._scheduled
        self._pending[self._scheduled] = (cue.what, at)
        self._nursery.start_soon(self._later, self._scheduled, at, cue)

    async def _later(self, number: int, at: float, cue: Cue) -> None:
        await trio.sleep_until(at)
        del self._pending[number]
        self._happen(cue)

    def _played(self, cue: Cue) -> None:
        if cue == self._after:
            self._after = None

    def _happen(self, cue: Cue) -> None:
        self._played(cue)
        data = dict(cue.data)
        match cue.what:
            case "end":
                self.runner.inbox.put(Event("end", {"by": "script", **data}))
            case "abort" | "abort-twice":
                self.aborted = min(self.aborted, trio.current_time())
                self.runner.inbox.put(Event("abort", {"by": "script", **data}))
                if cue.what == "abort-twice":
                    self._schedule(Cue("abort", after=AGAIN))
            case "cancel":
                self._cancelled = trio.current_time()
                self.aborted = min(self.aborted, self._cancelled)
                self._scope.cancel()
            case "defect":
                self.runner.inbox.put(Event("internal.error", {"message": "a task failed", **data}))
            case "done":
                self._done_data = data
                self._done.set()
            case "message":
                self._touched = trio.current_time()
                self.runner.touch()
            case _:
                self._tell(cue.what, data)

    def _tell(self, event: str, data: dict[str, Any]) -> None:
        """A resource raises an event, if it can; one that is lost raises nothing more."""
        resource = self._vocabulary.raiser(event)
        if resource is None or resource.name not in self._alive:
            return
        ledger_id = self._alive[resource.name]
        if event in resource.loses:
            for name in self._vocabulary.lost_with(resource.name):
                self._alive.pop(name, None)
        self.runner.inbox.put(Event(event, data, id=ledger_id))

    # --- what explore asks ----------------------------------------------------------------------------------

    def _moment_now(self) -> tuple[object, ...]:
        return trio.current_time(), self._events, self._scheduled, dict(self._alive)

    def _key(self, here: str) -> tuple[object, ...]:
        """All that what follows depends on, with times as they are from now."""
        now = trio.current_time()
        at = self.runner.snapshot
        alive = self._alive
        # What the world's script has in store is only played where work is still to come.
        to_come: object = tuple((at, *map(_what, c)) for (at, nth), c in self._cues.items() if nth == EVERY)
        if at.state in self._laws.hopeful:
            counts = self._counts
            cues = tuple((at, nth - counts.get(at, 0), *map(_what, c)) for (at, nth), c in self._cues.items())
            to_come = (self._script.work, cues, self._done.is_set(), round(now - self._touched, 6))
        return (
            here,
            at.state,
            at.attempt,
            at.waiting,
            bool(at.verdict),
            self._goal_passed or bool(at.verdict),
            *sorted(at.counters.items()),
            *(name for name, lost in at.lost.items() if lost >= at.ids.get(name, 0)),
            *(
                (e.resource, e.handle is not None, bool(e.error), alive.get(e.resource) == e.id)
                for e in self.ledger.entries
            ),
            *sorted(self.things.values()),
            *(
                (round(now - s.at, 6), s.event.type, s.event.id in (None, *alive.values()))
                for s in self.runner.inbox.waiting
                # It is put when trio comes to it, which is no time at all after the cancel.
                if s.event.data.get("by") != "cancel"
            ),
            round(now - self._cancelled, 6),
            round(now - self._left, 6) if self._leaving else -1,
            round(now - self._entered, 6),
            round(now - self._began, 6),
            round(now - self._until, 6),
            # Only the bound of an abort depends on this, and that is a matter of many seconds.
            round(now - self.aborted) if now >= self.aborted else -1,
            *sorted((what, round(now - at, 6)) for what, at in self._pending.values()),
            to_come,
            len(self.hampered),
        )


def _what(cue: Cue) -> tuple[str, float]:
    return cue.what, cue.after
