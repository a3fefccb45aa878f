"""What must hold of spec files whatever is in them."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kenaz_engine.lifecycle.loader import load_lifecycle
from kenaz_engine.spec import resolve, yamlfile
from kenaz_engine.spec.faults import Fault, InvalidFile, Place
from kenaz_engine.spec.resolve import load_session
from kenaz_engine.spec.units import format_duration, format_size, parse_duration, parse_size

ROOT = Path(__file__).parents[2]
SEEDS = [path.read_text() for path in sorted((ROOT / "specs" / "sessions").glob("*.yaml"))]
SEEDS.append(files("kenaz_specs").joinpath("lifecycles", "standard.yaml").read_text("utf-8"))

SNIPPETS = st.sampled_from(
    [
        *(
            "\t",
            "\n",
            "\r",
            "\0",
            "\ufeff",
            "\u2028",
            "  ",
            ": ",
            "- ",
            "[",
            "]",
            "{",
            "}",
            ",",
            "'",
            '"',
            "#",
            "|",
        ),
        *("&a ", "*a ", "!!int ", "!x ", "? ", "<<: ", "---\n", "...\n", "%YAML 1.2\n", '"\\ud800"', '"\\0"'),
        *("null", "yes", ".nan", "1e999", "0x", "9" * 30, "${env:X}", '"\\UFFFFFFFF"'),
        *("on:", "spec", "kind: Lifecycle", "fail: x, "),
    ]
)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """An example file with a few pieces cut out, doubled, or replaced."""
    text = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 40)))
        kind = draw(st.sampled_from(["cut", "double", "insert"]))
        middle = {"cut": "", "double": text[start:end] * 2, "insert": draw(SNIPPETS | st.text(max_size=5))}[
            kind
        ]
        text = text[:start] + middle + text[end:]
    return text


def outcome(load: Callable[[], object]) -> list[Fault]:
    """What `load` refuses; any exception but InvalidFile fails the test."""
    try:
        load()
    except InvalidFile as invalid:
        return invalid.faults or [Fault(Place(""), "", "")]
    return []


def load_both(source: str | bytes) -> None:
    """Loads `source` as either kind and looks at what is told."""
    faults = outcome(lambda: load_session(source, "f.yaml", environment={"X": "1"}))
    faults += outcome(lambda: load_lifecycle(source, "f.yaml"))
    text = source if isinstance(source, str) else source.decode("latin-1")
    lines = 1 + len(re.findall("\r\n|\r|\n", text))
    for fault in faults:
        assert fault.message
        assert "\n" not in str(fault)
        assert 0 <= fault.place.line <= lines


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated())
def test_a_mutated_file_is_loaded_or_refused(text: str) -> None:
    load_both(text)


@settings(max_examples=100, deadline=None)
@given(st.text() | st.binary())
@example("")
@example(b"\xff\xfea\x00")
@example("? ")
@example("*a")
@example("&a")
@example("!")
@example("- - - -")
def test_anything_is_loaded_or_refused(source: str | bytes) -> None:
    load_both(source)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def plain(source: str) -> Any:
    try:
        return yamlfile.parse(source, "f").data
    except InvalidFile:
        return InvalidFile


HEADER = "apiVersion: kenaz.dev/v1\nkind: {kind}\nmetadata: {{name: x}}\n{key}: "


@settings(max_examples=100, deadline=None)
@given(JSON, st.sampled_from([("Session", "spec"), ("Lifecycle", "states"), ("Lifecycle", "any")]))
def test_anything_in_the_right_place_is_loaded_or_refused(data: Any, where: tuple[str, str]) -> None:
    kind, key = where
    header = HEADER.format(kind=kind, key=key)
    load_both(header + yaml.safe_dump(data, default_flow_style=True, allow_unicode=False))


@settings(max_examples=100, deadline=None)
@given(mutated())
def test_both_parsers_read_the_same(text: str) -> None:
    """Where both accept a file. They differ in a few files that one of them refuses."""
    ours = plain(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yamlfile, "_LOADER", yaml.SafeLoader)
        theirs = plain(text)
    if InvalidFile not in (ours, theirs):
        assert ours == theirs


@given(st.integers(0, 10**11))
def test_durations_round_trip(milliseconds: int) -> None:
    text = format_duration(milliseconds / 1000)
    assert parse_duration(text) == milliseconds / 1000
    assert format_duration(parse_duration(text)) == text


@given(st.integers(0, 10**14))
def test_sizes_round_trip(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(st.text(max_size=12))
def test_units_raise_only_value_errors(text: str) -> None:
    for parse in (parse_duration, parse_size):
        with contextlib.suppress(ValueError):
            assert parse(text) >= 0


PATTERN = st.text("ab.*", min_size=1, max_size=6)


@given(PATTERN, PATTERN, st.text("ab.", min_size=1, max_size=6))
def test_what_a_pattern_covers_it_matches(wide: str, narrow: str, tool: str) -> None:
    def matches(pattern: str) -> bool:
        return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), tool) is not None

    if resolve._covers(wide, narrow) and matches(narrow):
        assert matches(wide)


ENVIRONMENTS = st.dictionaries(st.from_regex(r"[A-Z]{1,4}", fullmatch=True), st.text(max_size=20), max_size=4)


@given(ENVIRONMENTS)
def test_no_value_of_the_environment_is_told(environment: dict[str, str]) -> None:
    canary = "canary-7f3a"
    entries = {name: f"{canary}${{env:{name}}}" for name in environment}
    text = HEADER.format(kind="Session", key="spec") + json.dumps({"workbench": {"env": entries}})
    values = {name: f"{canary}{value}" for name, value in environment.items()}
    try:
        session = load_session(text, "f", environment=values)
    except InvalidFile as invalid:  # a lone surrogate, as os.environ has for what is not UTF-8
        told = str(invalid)
    else:
        told = str(resolve.describe(session)) + repr(session) + str(session.origins)
    assert canary not in told
