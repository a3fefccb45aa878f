"""Every fault of a session's file at once, whoever knows of it."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest

from kenaz_engine.session.check import check, checked, telling_all
from kenaz_engine.spec.faults import InvalidFile
from kenaz_engine.spec.resolve import load_session

HEAD = "apiVersion: kenaz.dev/v1\nkind: Session\n"


def told(text: str, **how: Any) -> list[str]:
    with pytest.raises(InvalidFile) as caught, telling_all():
        checked(load_session(HEAD + textwrap.dedent(text), "f", environment={}, **how))
    return [str(fault) for fault in caught.value.faults]


def test_faults_of_the_schema_hide_none_of_lifecycle_and_drivers() -> None:
    faults = told(
        """\
        metadata: {name: x, lables: {}}
        spec:
          image: demo
          machine: {cpus: many}
          driver: qemoo
          driverOptions: {process: {colour: red}}
          timeouts: {botting: 5s, booting: soon}
        """
    )
    assert [fault.partition(" ")[0] for fault in faults] == [
        "f:3:21:",
        "f:6:19:",
        "f:7:11:",
        "f:8:29:",
        "f:9:23:",
        "f:9:36:",
    ]
    assert "did you mean `labels`" in faults[0]
    assert "there is no driver `qemoo` (did you mean `qemu`?)" in faults[2]
    assert "no state `botting` that could time out (did you mean `booting`?)" in faults[4]


def test_nothing_is_made_of_the_default_of_what_is_wrong() -> None:
    """Which states there are, and whether a command is needed, nobody knows."""
    text = "metadata: {name: x}\nspec: {image: demo, lifecycle: [standard], timeouts: {waiting: 5s}}\n"
    assert [fault.split(": ")[1] for fault in told(text)] == ["spec.lifecycle"]
    text = "metadata: {name: x}\nspec: {image: demo, lifecycle: ephemeral-exec, workbench: {args: [1]}}\n"
    assert [fault.split(": ")[1] for fault in told(text)] == ["spec.workbench.args[0]"]


def test_a_name_that_is_wrong_hides_nothing() -> None:
    faults = told("metadata: {name: X}\nspec: {image: demo, lifecycle: standrad}\n")
    assert [fault.split(": ")[1] for fault in faults] == ["metadata.name", "spec.lifecycle"]


@pytest.mark.parametrize("text", ["spec: 5\n", "metadata: 5\n", "metadata: {}\nspec: []\n", "surplus: 1\n"])
def test_what_has_no_shape_at_all_is_told_as_ever(text: str) -> None:
    assert all(fault.startswith("f:") for fault in told(text))


def test_an_override_is_told_with_the_file() -> None:
    text = "metadata: {name: x}\nspec: {image: demo, lifecycle: standrad}\n"
    faults = told(text, overrides=["spec.machine.cpus=none"], session_id="NO")
    assert [fault.split(": ")[0] for fault in faults] == [
        "f:4:32",
        "--session-id",
        "--set spec.machine.cpus",
    ]


def test_a_driver_that_cannot_be_loaded_is_a_fault_where_its_options_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kenaz_drivers.contract import DriverError

    def broken(name: str) -> Any:
        raise DriverError("it cannot be imported", hint="install it anew")

    monkeypatch.setattr("kenaz_drivers.registry.load", broken)
    text = "metadata: {name: x}\nspec: {image: demo, driverOptions: {qemu: {accel: tcg}}}\n"
    assert told(text) == ["f:4:43: spec.driverOptions.qemu: it cannot be imported (install it anew)"]


def test_a_sound_session_has_its_lifecycle() -> None:
    text = HEAD + "metadata: {name: x}\nspec: {image: demo, timeouts: {booting: 7s}}\n"
    lifecycle, faults = check(load_session(text, "f", environment={}))
    assert faults == []
    assert lifecycle is not None
    assert lifecycle.states["booting"].timeout == 7
