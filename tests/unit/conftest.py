"""What tests of the core share: lifecycles from short text, a journal in memory, and a small session."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from textwrap import dedent
from typing import Any

import jsonschema
import pytest
import trio

from kenaz_drivers.contract import Driver
from kenaz_engine.journal.reader import Recording, read_journal
from kenaz_engine.journal.records import GENESIS, encode
from kenaz_engine.lifecycle.loader import load_lifecycle
from kenaz_engine.lifecycle.machine import Event, Machine
from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.lifecycle.recorded import lifecycle_fields
from kenaz_engine.lifecycle.vocabulary import Resource, Vocabulary
from kenaz_engine.replay.replayer import replay
from kenaz_engine.session import launch
from kenaz_engine.session.launch import Result
from kenaz_engine.session.ledger import Ledger, Made
from kenaz_engine.session.leftovers import leftovers
from kenaz_engine.session.prepare import prepare
from kenaz_engine.session.prepared import Prepared
from kenaz_engine.session.recorder import Observer, Recorder
from kenaz_engine.session.runner import ActivityFunction, Outcome, Runner, Work
from kenaz_engine.spec.resolve import load_session

HEADER = "apiVersion: kenaz.dev/v1\nkind: Lifecycle\nmetadata: {name: test}\n"

SMALL = """
    initial: working
    states:
      working:
        invoke: work
        timeout: 10s
        goal: true
        on:
          done: cleaning
          error: {target: cleaning, fail: it failed}
          timeout: {target: cleaning, fail: it took too long}
          end: cleaning
          thing.lost: {target: cleaning, fail: it was lost}
      cleaning:
        invoke: clean
        timeout: 20s
        ignore: [end, abort, thing.lost, thing.alarm]
        on:
          done: [{target: ended, when: {verdict: success}}, {target: failed}]
          error: {target: failed, fail: cleaning failed}
          timeout: {target: failed, fail: cleaning took too long}
      ended: {final: success}
      failed: {final: failure}
    any:
      abort: {target: cleaning, fail: aborted}
"""
"""One state that works, one that cleans, and two ends."""

THINGS = Vocabulary(
    {},
    {
        "thing": Resource(
            "thing", raises=frozenset({"thing.lost", "thing.alarm"}), loses=frozenset({"thing.lost"})
        )
    },
)


class MemoryJournal:
    """A journal in memory, on trio's clock; `broken` is the error of every append from then on."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.records: list[dict[str, Any]] = []
        self.broken: Exception | None = None
        self._prev = GENESIS

    def append(self, kind: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.broken is not None:
            raise self.broken
        t = round(trio.current_time(), 6)
        record = {"seq": len(self.lines), "t": t, "wall": 0.0, "kind": kind, **fields}
        line, self._prev = encode(record, self._prev)
        self.lines.append(line)
        self.records.append(json.loads(line))
        return record

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        """The records of these kinds, in order."""
        return [record for record in self.records if record["kind"] in kinds]

    def path(self) -> list[tuple[str, float]]:
        """The states in the order in which they were entered, and when."""
        return [(record["state"], record["t"]) for record in self.of("entered")]


@dataclass
class Session:
    """A runner and all that it stands on, before it runs."""

    runner: Runner
    ledger: Ledger
    recorder: Recorder
    journal: MemoryJournal
    lifecycle: Lifecycle
    released: list[str] = field(default_factory=list)

    def put(self, kind: str, *, id: int | None = None, **data: Any) -> None:
        """Puts an event from outside."""
        self.runner.inbox.put(Event(kind, data, id=id))

    async def run(self, *script: tuple[float, Callable[[], Any]]) -> Outcome:
        """Runs the session; each call of the script is made at its time (seconds from now)."""
        start = trio.current_time()

        async def at(moment: float, call: Callable[[], Any]) -> None:
            await trio.sleep_until(start + moment)
            call()

        async with trio.open_nursery() as nursery:
            for moment, call in script:
                nursery.start_soon(at, moment, call)
            with trio.fail_after(100_000):
                outcome = await self.runner.run()
            nursery.cancel_scope.cancel()
        return outcome

    async def make(
        self,
        name: str,
        *,
        takes: float = 0.0,
        fails: Exception | None = None,
        release_takes: float = 0.0,
        release_fails: Exception | None = None,
        uses: tuple[str, ...] = (),
        bound: float = 5.0,
    ) -> str:
        """Acquires a resource whose release notes its name in `released`."""

        async def release() -> None:
            await trio.sleep(release_takes)
            if release_fails:
                raise release_fails
            self.released.append(name)

        async def make() -> tuple[Made, str]:
            await trio.sleep(takes)
            if fails:
                raise fails
            return Made({"name": name}, release), name

        return await self.ledger.acquire(name, "thing", {"name": name}, make, uses=uses, bound=bound)


async def _nothing(work: Work) -> None:
    """An activity that has nothing to do."""


@pytest.fixture(scope="session")
def record_schema() -> jsonschema.Draft202012Validator:
    """The schema of one journal record."""
    source = resources.files("kenaz_specs") / "schemas" / "journal.schema.json"
    schema = json.loads(source.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture(scope="session")
def standard() -> Lifecycle:
    """The shipped lifecycle `standard`."""
    source = resources.files("kenaz_specs") / "lifecycles" / "standard.yaml"
    return load_lifecycle(source.read_text("utf-8"), "standard.yaml")


@pytest.fixture(scope="session")
def lifecycle() -> Callable[[str], Lifecycle]:
    """Makes a lifecycle from the part of its file below the metadata."""

    def build(text: str = SMALL) -> Lifecycle:
        return load_lifecycle(HEADER + dedent(text), "test.yaml")

    return build


@pytest.fixture(scope="session")
def small() -> str:
    """The text of the lifecycle that sessions have unless they are given another."""
    return SMALL


@pytest.fixture
def session(
    lifecycle: Callable[[str], Lifecycle], record_schema: jsonschema.Draft202012Validator
) -> Iterator[Callable[..., Session]]:
    """Makes sessions; every record that they wrote is held against the schema in the end, and replayed."""
    made: list[Session] = []

    def build(
        text: str = SMALL,
        *,
        observers: tuple[Observer, ...] = (),
        jitter: Callable[[], float] = lambda: 0.5,
        by_intent: Callable[[Mapping[str, Any]], Awaitable[None]] | None = None,
        **activities: ActivityFunction,
    ) -> Session:
        journal = MemoryJournal()
        recorder = Recorder(journal, observers)
        released: list[str] = []

        async def note_release(intent: Mapping[str, Any]) -> None:
            released.append(f"intent of {intent['name']}")

        ledger = Ledger(recorder, {"thing": by_intent or note_release})

        async def clean(work: Work) -> None:
            left = await ledger.release_all(trio.current_time() + 15)
            if left:
                raise OSError(f"{left[0].resource}: {left[0].error}")

        table: dict[str, ActivityFunction] = {"work": _nothing, "clean": clean, **activities}
        built = lifecycle(text)
        machine = Machine(built, THINGS)
        runner = Runner(machine, table, ledger, recorder, settle=True, jitter=jitter)
        made.append(Session(runner, ledger, recorder, journal, built, released))
        return made[-1]

    yield build
    for one in made:
        for record in one.journal.records:
            record_schema.validate(record)
        if one.runner.outcome is not None:
            header = {"kind": "header", "seq": 0, **lifecycle_fields(one.lifecycle)}
            recording = Recording(Path("memory"), [header, *one.journal.records], torn=False)
            result = replay(recording, vocabulary=THINGS)
            assert result.ok, str(result)


NO_OTHERS: Mapping[str, Any] = {}

WHOLE = """\
apiVersion: kenaz.dev/v1
kind: Session
metadata: {name: whole, id: s1}
spec:
  driver: simulated
"""


class Harness:
    """A harness that says nothing, and goes when `leave` is set: at once, unless a test wants it to stay."""

    def __init__(self) -> None:
        self.leave = trio.Event()
        self.leave.set()
        self.outcome = ""

    async def run(self) -> None:
        await trio.lowlevel.checkpoint()

    def open(self, session: str, build: str, capabilities: Sequence[str]) -> None:
        """Takes note of nothing."""

    @property
    def has_room(self) -> bool:
        return False

    @property
    def resumable(self) -> bool:
        return False

    def put(self, payload: bytes) -> None:
        raise AssertionError("there is no room")

    def push(self) -> None: ...

    def took(self, size: int) -> None: ...

    async def send(self, payload: bytes) -> None:
        await trio.lowlevel.checkpoint()

    async def receive(self) -> bytes | None:
        await self.leave.wait()
        return None

    async def aclose(self, outcome: str) -> None:
        await trio.lowlevel.checkpoint()
        self.outcome = outcome


@dataclass
class Whole:
    """Runs a whole session of the driver `simulated`, or of one that a test makes up."""

    home: Path
    harness: Harness = field(default_factory=Harness)
    shown: list[str] = field(default_factory=list)
    unreachable: Exception | None = None

    def stays(self) -> Whole:
        """The harness does not end the session."""
        self.harness.leave = trio.Event()
        return self

    async def prepare(
        self,
        *overrides: str,
        driver: Driver | None = None,
        can: Mapping[str, Any] = NO_OTHERS,
        **script: Any,
    ) -> Prepared:
        """A prepared session. `can` are other capabilities; their first transport is taken."""
        sets = [f"spec.driverOptions.simulated.script={json.dumps(script)}", *overrides]
        prepared = await prepare(load_session(WHOLE, "spec.yaml", overrides=sets, environment={}))
        capabilities = replace(prepared.capabilities, **can)
        return replace(
            prepared,
            driver=driver or prepared.driver,
            capabilities=capabilities,
            transport=capabilities.transports[0],
        )

    async def run(self, prepared: Prepared, *script: tuple[float, str]) -> Result:
        """Runs it; each (seconds, event) of the script is asked for at its time."""

        async def connect() -> Harness:
            await trio.lowlevel.checkpoint()
            if self.unreachable:
                raise self.unreachable
            return self.harness

        session = launch.Session(prepared, connect, lambda stream, text: self.shown.append(text))

        async def ask(seconds: float, kind: str) -> None:
            await trio.sleep(seconds)
            session.request(kind, "test")

        with trio.fail_after(100_000):
            if not script:
                return await session.run()
            async with trio.open_nursery() as nursery:
                for seconds, kind in script:
                    nursery.start_soon(ask, seconds, kind)
                result = await session.run()
                nursery.cancel_scope.cancel()
        return result

    @property
    def directory(self) -> Path:
        """The session's own."""
        return self.home / "sessions" / "s1"

    def records(self) -> list[Mapping[str, Any]]:
        """What the journal holds."""
        return list(read_journal(self.directory / "journal.jsonl").records)

    def path(self) -> list[str]:
        """The states in the order of their entry."""
        return [record["state"] for record in self.records() if record["kind"] == "entered"]


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Whole]:
    """A session in a state directory of its own, of which nothing but its record may be left."""
    monkeypatch.setenv("KENAZ_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(os, "fsync", lambda file: None)
    whole = Whole(tmp_path)
    yield whole
    kept = {"journal.jsonl", "console.log", ".creating"}
    assert {path.name for path in tmp_path.rglob("*") if not path.is_dir()} <= kept
    if (whole.directory / "journal.jsonl").exists():
        assert leftovers(whole.directory / "journal.jsonl") == []
