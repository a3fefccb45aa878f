"""`validate` and `graph`, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from kenaz_engine.cli.main import main
from kenaz_engine.session.lifecycles import shipped_lifecycle

SESSION = """
    apiVersion: kenaz.dev/v1
    kind: Session
    metadata: {name: hello}
    spec: {%s}
"""

WARNED = """
    apiVersion: kenaz.dev/v1
    kind: Lifecycle
    metadata: {name: warned}
    initial: one
    states:
      one: &one
        invoke: vm.kill
        timeout: 1s
        goal: true
        on:
          done: ended
          end: ended
          error: {target: failed, fail: no}
          timeout: {target: failed, fail: no}
      lost: *one
      ended: {final: success}
      failed: {final: failure}
    any:
      abort: {target: failed, fail: aborted}
"""
"""Nothing is wrong with it but a state that is never reached."""

Put = Callable[..., str]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Writes a file into the current directory and returns its name."""
    monkeypatch.chdir(tmp_path)

    def put(text: str, name: str = "file.yaml") -> str:
        Path(name).write_text(dedent(text))
        return name

    return put


def session(spec: str = "") -> str:
    return SESSION % spec


def test_a_valid_session_and_lifecycle(put: Put, capsys: Capture) -> None:
    text = "lifecycle: own.yaml, timeouts: {one: 9s}"
    assert main(["validate", put(session(text)), put(WARNED, "own.yaml")]) == 0
    out, err = capsys.readouterr()
    assert out == (
        "file.yaml: ok: session on lifecycle warned, 4 states, an abort ends it within 15s\n"
        "own.yaml: ok: lifecycle, 4 states, an abort ends it within 15s\n"
    )
    assert err.count("own.yaml:16:1: warning: states.lost: no path leads to `lost`") == 2
    assert "[KL010]" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "file.yaml:1:5: "),
        (
            "[]",
            "file.yaml:1:1: `kind` is missing "
            "(add `kind: Session` or add `kind: Lifecycle` or add `kind: Scenario` or add `kind: Catalog`)",
        ),
        (
            "kind: 7",
            "file.yaml:1:7: kind: must be Session, Lifecycle, Scenario or Catalog, not `7` "
            "(known: Catalog, Lifecycle, Scenario, Session)",
        ),
        ("kind: session", "not `session` (did you mean `Session`?)"),
        (session("lifecycle: standrad"), "file.yaml:5:19: spec.lifecycle: there is no lifecycle `standrad`"),
        (
            session("timeouts: {boting: 1s}"),
            "has no state `boting` that could time out (did you mean `booting`?)",
        ),
        (
            session("driver: qemuu"),
            "file.yaml:5:16: spec.driver: there is no driver `qemuu` (did you mean `qemu`?)",
        ),
        (session("driverOptions: {nix: {}}"), "there is no driver `nix` (known: "),
        (session("driverOptions: {qemu: {acel: tcg}}"), "did you mean `accel`?"),
        (session("driver: qemu, driverOptions: {qemu: {accel: 7}}"), "spec.driverOptions.qemu.accel: "),
    ],
)
def test_what_is_wrong_is_said_with_its_place(put: Put, capsys: Capture, text: str, message: str) -> None:
    assert main(["validate", put(text)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert all(line.startswith("file.yaml:") for line in err.splitlines())


def test_every_fault_of_every_file(put: Put, capsys: Capture) -> None:
    bad = put(session("driver: nix, lifecycle: nix, timeouts: {x: 1s}"), "bad.yaml")
    assert main(["validate", bad, "none.yaml", put(session())]) == 2
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in err.splitlines()] == ["bad.yaml", "bad.yaml", "none.yaml"]
    assert out.startswith("file.yaml: ok: ")


def test_a_driver_that_cannot_be_loaded_is_a_fault(
    put: Put, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kenaz_drivers.contract import DriverError

    def broken(name: str) -> None:
        raise DriverError("driver qemu cannot be loaded", hint="update it")

    monkeypatch.setattr("kenaz_drivers.registry.load", broken)
    assert main(["validate", put(session("driverOptions: {qemu: {}}"))]) == 2
    assert "spec.driverOptions.qemu: driver qemu cannot be loaded (update it)" in capsys.readouterr().err


def test_a_variable_that_is_not_set_here_is_no_fault_of_the_file(
    put: Put, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KENAZ_NOT_SET", raising=False)
    file = put(session('workbench: {env: {A: "${env:KENAZ_NOT_SET}-${env:HOME}", B: b, C: "${env:HOME}"}}'))
    monkeypatch.setenv("HOME", "/")
    assert main(["validate", file]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("file.yaml: ok: ")
    assert err == (
        "file.yaml:5:29: warning: spec.workbench.env.A: the variable `KENAZ_NOT_SET` is not set here "
        "(export it before the run)\n"
    )


@pytest.mark.parametrize("form", [["--json"], ["--format", "json"]])
def test_json_for_programs(put: Put, capsys: Capture, form: list[str]) -> None:
    assert main(["validate", put(WARNED), put("kind: x", "bad.yaml"), *form]) == 2
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    good, bad = report["files"]
    assert report["ok"] is False
    assert (good["file"], good["kind"], good["ok"]) == ("file.yaml", "Lifecycle", True)
    assert good["lifecycle"] == {"name": "warned", "states": 4, "abortBound": 15.0}
    assert [fault["level"] for fault in good["faults"]] == ["warning"]
    assert bad == {
        "file": "bad.yaml",
        "kind": None,
        "ok": False,
        "faults": [
            {
                "file": "bad.yaml",
                "line": 1,
                "column": 7,
                "level": "error",
                "code": None,
                "path": "kind",
                "message": "must be Session, Lifecycle, Scenario or Catalog, not `x`",
                "hint": "known: Catalog, Lifecycle, Scenario, Session",
            }
        ],
    }


def test_graph_draws_a_shipped_lifecycle_in_three_ways(capsys: Capture) -> None:
    from kenaz_engine.lifecycle.diagram import dot, mermaid, text

    standard = shipped_lifecycle("standard")
    for form, picture in (
        ("text", text(standard, width=100)),
        ("mermaid", mermaid(standard)),
        ("dot", dot(standard)),
    ):
        assert main(["graph", "standard", "--format", form]) == 0
        assert capsys.readouterr().out.rstrip("\n") == picture.rstrip("\n")


def test_graph_draws_files_and_takes_the_deadlines_of_a_session(put: Put, capsys: Capture) -> None:
    put(WARNED, "own.yaml")
    assert main(["graph", put(session("lifecycle: own.yaml, timeouts: {one: 9s}"))]) == 0
    assert "at most 9s" in capsys.readouterr().out
    assert main(["graph", "own.yaml"]) == 0
    assert "at most 9s" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "standrad",
            "kenaz-launcher: there is no lifecycle and no file 'standrad' (did you mean `standard`?)\n",
        ),
        ("none.yaml", "none.yaml: does not exist"),
    ],
)
def test_graph_of_nothing(put: Put, capsys: Capture, what: str, message: str) -> None:
    assert main(["graph", what]) == 2
    assert message in capsys.readouterr().err


SCENARIO = """
    apiVersion: kenaz.dev/v1
    kind: Scenario
    metadata: {name: panic}
    lifecycle: %s
"""


def test_a_catalog_and_a_wrong_one(put: Put, capsys: Capture) -> None:
    text = "apiVersion: kenaz.dev/v1\nkind: Catalog\nimages: {a: {arch: {x86_64: {hint: x}}}}\n"
    assert main(["validate", put(text)]) == 0
    assert capsys.readouterr().out == "file.yaml: ok: catalog\n"
    assert main(["validate", "--json", put(text)]) == 0
    [found] = json.loads(capsys.readouterr().out)["files"]
    assert (found["kind"], found["ok"], "lifecycle" in found) == ("Catalog", True, False)
    assert main(["validate", put(text.replace("hint", "hnit"))]) == 2
    assert "file.yaml:3:30: images.a.arch.x86_64.hnit: this key is unknown" in capsys.readouterr().err


def test_a_scenario_and_a_wrong_one(put: Put, capsys: Capture) -> None:
    """Warnings of its lifecycle are not the scenario's."""
    put(WARNED, "own.yaml")
    assert main(["validate", put(SCENARIO % "./own.yaml")]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (
        "file.yaml: ok: scenario on lifecycle warned, 4 states, an abort ends it within 15s\n",
        "",
    )
    assert main(["validate", put(SCENARIO % "standrad", "wrong.yaml")]) == 2
    assert "wrong.yaml:5:12: lifecycle: there is no lifecycle `standrad`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ("apiVersion: kenaz.dev/v1\nkind: [\n", True),
        ("# first\n'apiVersion' : \"kenaz.dev/v9\"\n", True),
        ('{"apiVersion": "kenaz.dev/v1"}\n', True),
        ("\ufeffapiVersion: kenaz.dev/v1\n", True),
        ("apiVersion: apps/v1\nkind: Deployment\n", False),
        ("data:\n  apiVersion: kenaz.dev/v1\n", False),
        ("# apiVersion: kenaz.dev/v1\n", False),
        ("{{ template }}\n---\n", False),
        ("", False),
    ],
)
def test_files_of_others_are_passed_over(put: Put, capsys: Capture, text: str, ours: bool) -> None:
    assert main(["validate", put(text)]) == 2
    capsys.readouterr()
    assert main(["validate", "--ours-only", put(text)]) == (2 if ours else 0)
    out, err = capsys.readouterr()
    assert (out, bool(err)) == ("", ours)
    assert main(["validate", "--ours-only", "--json", put(text)]) == (2 if ours else 0)
    assert len(json.loads(capsys.readouterr().out)["files"]) == ours


def test_what_cannot_be_read_is_not_passed_over(put: Put, capsys: Capture) -> None:
    assert main(["validate", "--ours-only", "gone.yaml"]) == 2
    assert "gone.yaml: does not exist" in capsys.readouterr().err
