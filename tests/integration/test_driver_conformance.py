"""The conformance kit over our own drivers, and over some that break a promise, which it has to notice."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import trio

from kenaz_drivers.conformance.checks import CHECKS, PURE, Check, check_id
from kenaz_drivers.conformance.kit import Kit
from kenaz_drivers.contract import DriverError
from kenaz_drivers.process.driver import ProcessDriver

SOME = {
    "a-guest-runs-and-is-heard",
    "the-channel-is-connected",
    "a-power-off-by-the-guest-is-clean",
    "a-crash-of-the-guest-is-not-clean",
    "kill-ends-the-machine-before-it-returns",
    "kill-before-it-is-ready",
    "a-launch-that-fails-says-why-and-leaves-nothing",
    "release-by-mark-from-another-process",
    "two-at-once-do-not-know-each-other",
}
"""What is checked in `make test`, beside the pure ones, where a machine takes seconds to start and to end."""

EMULATED = {"accel": "tcg"}
# The libvirt of a subject: on this host, and on another, as it were.
DAEMONS = {"libvirt": "libvirtd", "elsewhere": "elsewhere_libvirtd"}
AS_ROOT = sys.platform == "linux" and os.geteuid() == 0


def cases() -> Iterator[Any]:
    for subject in ("simulated", "process", "qemu-x86_64", "qemu-aarch64", "libvirt", "elsewhere"):
        for check in CHECKS:
            quick = check in PURE or check_id(check) in SOME
            later = subject in (*DAEMONS, "qemu-aarch64") and not quick
            marks = [pytest.mark.slow] if later else []
            marks += [pytest.mark.only_where(AS_ROOT)] if subject == "elsewhere" else []
            yield pytest.param(subject, check, id=f"{subject}-{check_id(check)}", marks=marks)


@pytest.fixture(scope="session")
def kits(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Kit]]:
    """Makes the kit of a subject, once."""
    made: dict[str, Kit] = {}
    with tempfile.TemporaryDirectory(prefix="kz-") as directory:

        def kit(subject: str) -> Kit:
            if subject not in made:
                place = Path(directory, str(len(made)))
                place.mkdir()
                made[subject] = make(subject, place)
            return made[subject]

        def make(subject: str, place: Path) -> Kit:
            name, _, arch = subject.partition("-")
            arch = arch or "x86_64"
            if name == "qemu" and shutil.which(f"qemu-system-{arch}") is None:
                pytest.skip(f"qemu-system-{arch} is not installed")
            options = EMULATED if name in ("qemu", *DAEMONS) else {}
            if name in DAEMONS:
                options = options | {"uri": request.getfixturevalue(DAEMONS[name]).uri}
            return Kit("libvirt" if name in DAEMONS else name, arch, place, options)

        yield kit


@pytest.mark.parametrize(("subject", "check"), list(cases()))
def test_our_own(
    kits: Callable[[str], Kit], subject: str, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = kits(subject)
    monkeypatch.setenv("KENAZ_CACHE_DIR", str(kit.directory.parent / "cache"))
    # What these bound comes soon or never; on a busy host it comes later.
    monkeypatch.setattr("kenaz_drivers.conformance.checks.SOON", 100.0)
    monkeypatch.setattr("kenaz_drivers.conformance.kit.SOON", 100.0)
    monkeypatch.setattr("kenaz_drivers.conformance.kit.CHECK", 600.0)
    kit.run(check)


# --- the kit itself: what it is there for, it notices -------------------------------------------------------


class Impure(ProcessDriver):
    def plan(self, request):
        return replace(super().plan(request), notes=(str(next(NUMBERS)),))


class Talkative(ProcessDriver):
    def plan(self, request):
        return replace(super().plan(request), environment=dict(os.environ))


class Uninterested(ProcessDriver):
    def plan(self, request):
        return super().plan(replace(request, transport="unix"))


class Open(ProcessDriver):
    options_schema: ClassVar[Any] = {**ProcessDriver.options_schema, "additionalProperties": True}


class Unmarked(ProcessDriver):
    def plan(self, request):
        return super().plan(replace(request, mark=""))


class Leaking(ProcessDriver):
    @asynccontextmanager
    async def launch(self, plan, descriptors):
        leaked.append(os.dup(0))
        async with super().launch(plan, descriptors) as machine:
            yield machine


class Hopeful(ProcessDriver):
    @asynccontextmanager
    async def launch(self, plan, descriptors):
        async with super().launch(plan, descriptors) as machine:
            wait = machine.wait
            machine.wait = lambda: _always_clean(wait)
            yield machine


class Forgetful(ProcessDriver):
    async def release(self, handle):
        await trio.lowlevel.checkpoint()


class Hasty(ProcessDriver):
    @asynccontextmanager
    async def launch(self, plan, descriptors):
        async with super().launch(plan, descriptors) as machine:
            machine.kill = trio.lowlevel.checkpoint
            yield machine


class Silent(ProcessDriver):
    @asynccontextmanager
    async def launch(self, plan, descriptors):
        try:
            async with super().launch(plan, descriptors) as machine:
                yield machine
        except DriverError:
            raise DriverError("") from None


async def _always_clean(wait):
    return replace(await wait(), clean=True)


NUMBERS = itertools.count()
leaked: list[int] = []


@pytest.mark.parametrize(
    ("driver", "check"),
    [
        (Impure, "plan-is-pure-and-stable"),
        (Talkative, "plan-carries-nothing-of-the-environment"),
        (Uninterested, "plan-refuses-a-transport-that-it-does-not-have"),
        (Open, "options-have-a-closed-schema"),
        (Unmarked, "plan-uses-the-mark"),
        (Leaking, "leaving-the-context-ends-the-machine"),
        (Hopeful, "a-crash-of-the-guest-is-not-clean"),
        (Hopeful, "kill-ends-the-machine-before-it-returns"),
        (Hasty, "kill-ends-the-machine-before-it-returns"),
        (Forgetful, "release-by-handle-ends-it-and-a-second-one-finds-nothing"),
        (Silent, "a-launch-that-fails-says-why-and-leaves-nothing"),
    ],
)
def test_a_broken_promise_is_noticed(
    driver: type[ProcessDriver], check: str, short_kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kenaz_drivers.conformance.checks.SOON", 1.0)
    monkeypatch.setattr("kenaz_drivers.conformance.kit.GONE", 0.2)
    short_kit.driver = driver()
    [one] = [each for each in CHECKS if check_id(each) == check]
    with pytest.RaisesGroup(
        pytest.RaisesExc((AssertionError, trio.TooSlowError)), allow_unwrapped=True, flatten_subgroups=True
    ):
        short_kit.run(one)
    while leaked:
        os.close(leaked.pop())


@pytest.fixture
def short_kit() -> Iterator[Kit]:
    with tempfile.TemporaryDirectory(prefix="kz-") as directory:
        yield Kit("process", "x86_64", Path(directory))
