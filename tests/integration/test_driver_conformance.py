"""The conformance kit over our own drivers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kenaz_drivers.conformance.checks import CHECKS, PURE, Check, check_id
from kenaz_drivers.conformance.kit import Kit

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


def cases() -> Iterator[Any]:
    for subject in ("simulated", "process", "qemu-x86_64", "qemu-aarch64", "libvirt"):
        for check in CHECKS:
            later = subject in ("libvirt", "qemu-aarch64") and not (check in PURE or check_id(check) in SOME)
            marks = [pytest.mark.slow] if later else []
            yield pytest.param(subject, check, id=f"{subject}-{check_id(check)}", marks=marks)


@pytest.fixture(scope="session")
def kits(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Kit]]:
    """Makes the kit of a subject, once."""
    made: dict[str, Kit] = {}
    with tempfile.TemporaryDirectory(prefix="kz-") as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("KENAZ_CACHE_DIR", f"{directory}/cache")

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
            options = EMULATED if name in ("qemu", "libvirt") else {}
            if name == "libvirt":
                options = options | {"uri": request.getfixturevalue("libvirtd").uri}
            return Kit(name, arch, place, options)

        yield kit


@pytest.mark.parametrize(("subject", "check"), list(cases()))
def test_our_own(kits: Callable[[str], Kit], subject: str, check: Check) -> None:
    kits(subject).run(check)
