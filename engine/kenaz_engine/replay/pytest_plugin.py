"""A plugin for pytest: scenarios and journals are tests, in anybody's repository.

`*.scenario.yaml` is simulated, `*.journal.jsonl` is replayed, each as one test. Everybody who has this
package installed has the plugin, whether or not they have such files: so nothing else of ours is imported
before there is one. `-p no:kenaz` turns it off. See docs/how-to/test-lifecycles-in-your-repo.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kenaz_engine.lifecycle.model import Lifecycle
    from kenaz_engine.replay.scenario import Scenario
    from kenaz_engine.replay.simulate import ScenarioResult

SCENARIO = ".scenario.yaml"
JOURNAL = ".journal.jsonl"

_CANDIDATE = pytest.StashKey["Lifecycle"]()


class Differs(Exception):
    """A file does not do what it says; the text is for people, of one or more lines."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """One option of ours; those of `kenaz_drivers.conformance`, which is collected too late to add any."""
    parser.getgroup("kenaz", "lifecycles of kenaz-launcher").addoption(
        "--kenaz-lifecycle",
        metavar="FILE",
        help="try this lifecycle (a file or a shipped name) on every scenario and journal, not their own",
    )
    group = parser.getgroup("kenaz-driver", "checks of a driver: --pyargs kenaz_drivers.conformance")
    group.addoption("--kenaz-driver", metavar="NAME", help="the driver to check")
    group.addoption(
        "--kenaz-driver-options", metavar="JSON", default="{}", help="its driverOptions, as in a session spec"
    )
    group.addoption(
        "--kenaz-arch", metavar="ARCH", default="x86_64", help="the guests' architecture (x86_64, aarch64)"
    )
    group.addoption(
        "--kenaz-thorough", action="store_true", help="cancel at every single step, not at a choice of them"
    )


def pytest_configure(config: pytest.Config) -> None:
    """A candidate that cannot be had is told at once, not once for each file."""
    if what := config.getoption("--kenaz-lifecycle"):
        config.stash[_CANDIDATE] = _open_lifecycle(what)


def pytest_report_header(config: pytest.Config) -> str | None:
    """Which lifecycle is tried, where it is not the files' own."""
    candidate = config.stash.get(_CANDIDATE, None)
    return None if candidate is None else f"kenaz: trying lifecycle {candidate.name} of {candidate.file}"


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Files are known by their names; what is in them is looked at when the test runs."""
    if file_path.name.endswith(SCENARIO):
        return ScenarioFile.from_parent(parent, path=file_path)
    if file_path.name.endswith(JOURNAL):
        return JournalFile.from_parent(parent, path=file_path)
    return None


class ScenarioFile(pytest.File):
    """A file with one scenario."""

    def collect(self) -> Iterable[pytest.Item]:
        """One test."""
        yield ScenarioItem.from_parent(self, name="simulate")


class JournalFile(pytest.File):
    """A file with one session's journal."""

    def collect(self) -> Iterable[pytest.Item]:
        """One test."""
        yield JournalItem.from_parent(self, name="replay")


class _Item(pytest.Item):
    obj = None
    """No function. In trio_mode, pytest-trio looks here without asking whether there is one."""

    @property
    def candidate(self) -> Lifecycle | None:
        """The lifecycle to try instead of the file's own."""
        return self.config.stash.get(_CANDIDATE, None)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """What is wrong with the file, without a traceback; a defect of ours keeps its own."""
        if isinstance(excinfo.value, Differs):
            return _plain(str(excinfo.value))
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """The file as a whole."""
        return self.path, None, f"{self.name} {self.path.name}"


class ScenarioItem(_Item):
    """Simulates a scenario: what it expects must come, and no law may be broken."""

    def runtest(self) -> None:
        """Raises Differs."""
        from kenaz_engine.replay.scenario import load_scenario
        from kenaz_engine.spec.faults import InvalidFile
        from kenaz_engine.spec.files import read

        try:
            scenario = load_scenario(*read(str(self.path)))
        except InvalidFile as invalid:
            raise Differs(str(invalid)) from None
        result = _simulate(scenario, self.candidate)
        if not result.ok:
            raise Differs("\n".join([f"{self.path}: {scenario.name}", *result.failures]))


class JournalItem(_Item):
    """Replays a journal: the lifecycle must decide as history says."""

    def runtest(self) -> None:
        """Raises Differs."""
        from kenaz_engine.journal.reader import read_journal
        from kenaz_engine.journal.records import Damaged
        from kenaz_engine.replay.replayer import replay

        try:
            recording = read_journal(self.path)
            result = replay(recording, self.candidate)
        except Damaged as damage:
            raise Differs(f"{self.path}:{damage.line}: {damage.message}") from None
        except OSError as error:
            raise Differs(f"{self.path}: cannot be read: {error.strerror}") from None
        if not result.ok:
            raise Differs(str(result))
        if not recording.records:
            # A test that compares nothing would be green for ever.
            raise Differs(f"{self.path}: the journal is empty, so there is nothing to replay")
        if result.warnings:
            self.add_report_section("call", "kenaz", _plain("\n".join(result.warnings)))


@pytest.fixture
def kenaz_simulate(request: pytest.FixtureRequest) -> Callable[[str | Mapping[str, Any]], ScenarioResult]:
    """Simulates a scenario in virtual time: `kenaz_simulate(scenario) -> ScenarioResult`.

    `scenario` is the text of a scenario's file, or its data, where `apiVersion`, `kind` and `metadata` may be
    left out. A path in it is from the directory of the test. Nothing is asserted: the result has `ok`,
    `failures` and `path`. Raises InvalidFile.
    """

    def simulate(scenario: str | Mapping[str, Any]) -> ScenarioResult:
        from kenaz_engine.replay.scenario import load_scenario
        from kenaz_engine.spec.schema import API_VERSION

        if not isinstance(scenario, str):
            told = {"apiVersion": API_VERSION, "kind": "Scenario", "metadata": {"name": "kenaz-simulate"}}
            # JSON is YAML.
            scenario = json.dumps({**told, **scenario}, ensure_ascii=False, indent=2)
        return _simulate(load_scenario(scenario, str(request.path.parent / "kenaz_simulate")))

    return simulate


def _simulate(scenario: Scenario, candidate: Lifecycle | None = None) -> ScenarioResult:
    from concurrent.futures import ThreadPoolExecutor
    from dataclasses import replace

    import trio

    from kenaz_engine.replay.simulate import run_scenario

    if candidate is not None:
        scenario = replace(scenario, lifecycle=candidate)
    if not trio.lowlevel.in_trio_run():
        return run_scenario(scenario)
    # An async test: trio cannot run within itself, but beside itself on another thread.
    with ThreadPoolExecutor(1) as beside:
        return beside.submit(run_scenario, scenario).result()


def _open_lifecycle(what: str) -> Lifecycle:
    from kenaz_engine.lifecycle.loader import load_lifecycle
    from kenaz_engine.session.lifecycles import shipped_lifecycle, shipped_lifecycles
    from kenaz_engine.spec.faults import InvalidFile
    from kenaz_engine.spec.files import read

    if what in shipped_lifecycles():
        return shipped_lifecycle(what)
    try:
        return load_lifecycle(*read(what))
    except InvalidFile as invalid:
        raise pytest.UsageError(*(f"--kenaz-lifecycle: {fault}" for fault in invalid.faults)) from None


def _plain(text: str) -> str:
    """Without what could steer a terminal: journals have words of guests in them."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
