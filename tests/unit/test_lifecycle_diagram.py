"""Pictures of lifecycles: golden files, and the notations' own rules.

After a change that is meant: KENAZ_GOLDEN=write pytest tests/unit/test_lifecycle_diagram.py
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest

from kenaz_engine.lifecycle import diagram
from kenaz_engine.lifecycle.loader import load_lifecycle
from kenaz_engine.lifecycle.model import Lifecycle

HERE = Path(__file__).parent / "lifecycles"
NAMES = ("standard", "every-element")
FORMS: dict[str, Callable[[Lifecycle], str]] = {
    "mmd": diagram.mermaid,
    "dot": diagram.dot,
    "txt": lambda lifecycle: diagram.text(lifecycle, width=80),
}
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def lifecycle(name: str) -> Lifecycle:
    folder = HERE if name == "every-element" else files("kenaz_specs").joinpath("lifecycles")
    return load_lifecycle(folder.joinpath(f"{name}.yaml").read_bytes(), f"{name}.yaml")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_the_picture_is_the_golden_one(name: str, form: str) -> None:
    drawn = FORMS[form](lifecycle(name))
    golden = HERE / f"{name}.{form}"
    if os.environ.get("KENAZ_GOLDEN") == "write":
        golden.write_text(drawn, encoding="utf-8", newline="\n")
    assert drawn == golden.read_text("utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_dot_has_only_complete_statements(name: str) -> None:
    quoted = r'"(?:[^"\\\n]|\\.)*"'
    value = rf"(?:{quoted}|[\w.]+)"
    attributes = rf"(?: \[\w+={value}(?:, \w+={value})*\])?"
    statement = re.compile(rf"    (?:node|edge|{quoted}|{quoted} -> {quoted}){attributes};")
    first, *body, last = diagram.dot(lifecycle(name)).splitlines()
    assert re.fullmatch(rf"digraph {quoted} {{", first)
    assert [line for line in body if not statement.fullmatch(line)] == []
    assert last == "}"


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_graphviz_draws_it(name: str) -> None:
    source = diagram.dot(lifecycle(name))
    drawn = subprocess.run(
        ["dot", "-Tsvg"], input=source, capture_output=True, text=True, timeout=30, check=True
    )
    assert drawn.stderr == ""
    assert "</svg>" in drawn.stdout


@pytest.mark.parametrize("name", NAMES)
def test_mermaid_has_only_known_statements(name: str) -> None:
    plain = r"(?:[^:;\"#\n]|#\d+;)+"
    end = r"(?:\[\*\]|[A-Za-z]\w*)"
    statement = re.compile(
        rf'    (?:state "{plain}" as \w+|\w+: {plain}|{end} --> {end}(?:: {plain})?'
        r"|classDef \w+ \S+|class \w+ \w+)"
    )
    first, *body = diagram.mermaid(lifecycle(name)).splitlines()
    assert first == "stateDiagram-v2"
    assert [line for line in body if not statement.fullmatch(line)] == []


@pytest.mark.parametrize("width", [20, 60, 80, 200])
@pytest.mark.parametrize("name", NAMES)
def test_text_is_plain_and_keeps_to_the_width(name: str, width: int) -> None:
    lines = diagram.text(lifecycle(name), width=width).splitlines()
    assert all(line.isascii() and line == line.rstrip() for line in lines)
    assert max(map(len, lines)) <= max(width, 60)


@pytest.mark.parametrize("name", NAMES)
def test_colour_adds_nothing_but_colour(name: str) -> None:
    plain = diagram.text(lifecycle(name), width=80)
    coloured = diagram.text(lifecycle(name), width=80, colour=True)
    assert coloured != plain
    assert ANSI.sub("", coloured) == plain


def test_a_lifecycle_without_any_has_no_place_for_it() -> None:
    whole = lifecycle("standard")
    bare = Lifecycle(whole.name, whole.initial, whole.states)
    for form in FORMS.values():
        assert "other state" not in form(bare)
        assert "any" not in form(bare)
    assert diagram.text(bare, width=80).startswith("standard\n")
