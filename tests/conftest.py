"""What holds for all tests: which are run, how hard hypothesis tries, and that in CI nothing is skipped."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

REQUIRE_ALL = os.environ.get("KENAZ_REQUIRE_ALL") == "1"
"""Set by .ci/run where CI runs: there, a skipped test hides that the machine lacks something."""

collect_ignore = ["acceptance/example_repo"]
"""Somebody else's repository, as it were: an acceptance test runs it where it belongs, outside this tree."""

# A busy machine is no defect of the code: nothing here depends on time. `make test` tries the same each time,
# `make test-all` looks where nobody has looked yet.
settings.register_profile(
    "short",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.register_profile(
    "long", settings.get_profile("short"), derandomize=False, database=None, max_examples=100
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        action="store_true",
        help="run only what is long: tests marked slow, and property tests with many more examples",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A shell ignores SIGINT for what it starts in the background, nohup SIGHUP; so would all children.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    settings.load_profile("long" if config.getoption("--long") else "short")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    properties = config.rootpath / "tests" / "property"
    long = config.getoption("--long")

    def wanted(item: pytest.Item) -> bool:
        if not all(marker.args[0] for marker in item.iter_markers("only_where")):
            return False
        slow = item.get_closest_marker("slow") is not None
        return slow or properties in item.path.parents if long else not slow

    deselected = [item for item in items if not wanted(item)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if wanted(item)]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        _fail(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if REQUIRE_ALL and report.skipped:
        _fail(report)
    return report


def _fail(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"{reason}: with KENAZ_REQUIRE_ALL=1 nothing may be skipped"
