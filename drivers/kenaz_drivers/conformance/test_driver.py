"""The checks as tests, over the driver that `--kenaz-driver` names."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kenaz_drivers.conformance.checks import CHECKS, Check, check_id
from kenaz_drivers.conformance.kit import Kit, Unusable
from kenaz_drivers.contract import DriverError


@pytest.fixture(scope="session")
def kit(pytestconfig: pytest.Config) -> Iterator[Kit]:
    """The kit of that driver, in a directory whose paths are short enough for sockets."""
    name = pytestconfig.getoption("--kenaz-driver")
    if name is None:
        pytest.fail("say which driver to check: --kenaz-driver NAME", pytrace=False)
    with tempfile.TemporaryDirectory(prefix="kz-") as directory:
        try:
            yield Kit(
                name,
                pytestconfig.getoption("--kenaz-arch"),
                Path(directory),
                json.loads(pytestconfig.getoption("--kenaz-driver-options")),
                thorough=pytestconfig.getoption("--kenaz-thorough"),
            )
        except DriverError as error:
            pytest.fail(f"{error}: {error.hint}", pytrace=False)


@pytest.mark.parametrize("check", CHECKS, ids=check_id)
def test_driver(kit: Kit, check: Check) -> None:
    try:
        kit.run(check)
    except Unusable as error:
        pytest.fail(str(error), pytrace=False)
