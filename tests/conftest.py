"""What holds for all tests: which are run, how hard hypothesis tries, and that in CI nothing is skipped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

REQUIRE_ALL = os.environ.get("KENAZ_REQUIRE_ALL") == "1"
"""Set by .ci/run where CI runs: there, a skipped test hides that the machine lacks something."""

collect_ignore = ["acceptance/example_repo", "acceptance/example_driver"]
"""Somebody else's repositories, as it were: acceptance tests run them where they belong, outside of ours."""

# A busy machine is no defect of the code: nothing here depends on time. `make test` tries much the same each
# time, `make test-all` looks where nobody has looked yet.
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
    subprocess.Popen.__exit__ = _leave  # type: ignore[method-assign]
    settings.load_profile("long" if config.getoption("--long") else "short")


_really_leave = subprocess.Popen.__exit__


def _leave(self: subprocess.Popen[Any], kind: type[BaseException] | None, *why: Any) -> None:
    """What a failed test has started may be stopped, or serve for an hour: it is not waited for."""
    if kind is not None:
        self.kill()
    _really_leave(self, kind, *why)


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
    # What takes longest begins first, or one processor waits in the end for the other.
    items.sort(key=_given, reverse=True)


def _given(item: pytest.Item) -> float:
    """The seconds that the test asks for, where it asks for more than others have."""
    marker = item.get_closest_marker("timeout")
    return marker.args[0] if marker else 0.0


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


@dataclass(frozen=True)
class Libvirtd:
    """A libvirtd of the tests' own; see libvirt_daemon.py. `kind` is `session`, `system` or `elsewhere`."""

    kind: str
    pid: int
    socket: Path
    port: int

    @property
    def uri(self) -> str:
        """Where it is found from outside of the namespaces that it may be in."""
        if self.kind == "elsewhere":
            return f"qemu+tcp://127.0.0.1:{self.port}/system"
        return f"qemu+unix:///{self.kind}?socket={self.socket}"

    def domains(self) -> list[str]:
        """The UUIDs of all the domains that it knows."""
        command = ["virsh", "-c", self.uri, "-q", "list", "--all", "--uuid"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    def virsh(self, *words: str) -> str:
        """What it says to that."""
        command = ["virsh", "-c", self.uri, "-q", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def volumes(self, pool: str = "default") -> list[str]:
        """The names of what is in that pool."""
        return [line.split()[0] for line in self.virsh("vol-list", pool).splitlines()]


@contextmanager
def _libvirtd(kind: str) -> Iterator[Libvirtd]:
    path = f"{os.environ['PATH']}:/usr/sbin"
    needed = ("virsh", "libvirtd", "qemu-system-x86_64", "unshare")
    if not all(shutil.which(name, path=path) for name in needed):
        pytest.skip("needs libvirtd, virsh and QEMU (Debian: libvirt-daemon, libvirt-clients)")
    with tempfile.TemporaryDirectory(prefix="lv-") as directory:
        command = [sys.executable, str(Path(__file__).with_name("libvirt_daemon.py")), directory, kind]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
            assert running.stdin is not None
            assert running.stdout is not None
            said = running.stdout.readline().split()
            assert said[:1] == ["ready"], "libvirtd does not start"
            daemon = Libvirtd(kind, int(said[1]), Path(said[2]), int(said[3]))
            daemon.virsh("domcapabilities", "--virttype", "qemu")  # its first look at QEMU takes it long
            try:
                yield daemon
                assert daemon.domains() == []
            finally:
                running.stdin.close()
                running.wait(30)


@pytest.fixture(scope="session")
def libvirtd() -> Iterator[Libvirtd]:
    """The libvirtd of a user. In the end no domain may be left."""
    with _libvirtd("session") as daemon:
        yield daemon


@pytest.fixture(scope="session")
def system_libvirtd() -> Iterator[Libvirtd]:
    """The libvirtd of a system, as it were."""
    with _libvirtd("system") as daemon:
        yield daemon


@pytest.fixture(scope="session")
def elsewhere_libvirtd() -> Iterator[Libvirtd]:
    """The libvirtd of another host, as it were, with a pool. In the end nothing is in that but images."""
    if shutil.which("qemu-img") is None:
        pytest.skip("needs qemu-img, by which libvirt makes disks (Debian: qemu-utils)")
    with _libvirtd("elsewhere") as daemon:
        add_pool(daemon, "default")
        yield daemon
        assert [name for name in daemon.volumes() if len(name) != len("kenaz-") + 64] == []


def add_pool(daemon: Libvirtd, name: str) -> None:
    """A pool of that name on that host."""
    target = f"/var/lib/libvirt/{name}"
    daemon.virsh(f"pool-define-as {name} dir --target {target}; pool-build {name}; pool-start {name}")
