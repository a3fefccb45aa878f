"""docs/reference/lifecycle.md is true where a program can tell."""

from __future__ import annotations

import re
from pathlib import Path

from kenaz_engine.lifecycle.analysis import analyse
from kenaz_engine.lifecycle.loader import load_lifecycle
from kenaz_engine.session.vocabulary import VOCABULARY

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs" / "reference" / "lifecycle.md").read_text("utf-8")


def test_the_example_has_no_findings() -> None:
    example = re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert example is not None
    assert analyse(load_lifecycle(example[1], "example.yaml"), VOCABULARY) == []


def test_the_activities_are_those_of_the_product() -> None:
    rows = re.findall(r"^\| `(\w+\.\w+)` \|([^|]*)\|([^|]*)\|$", TEXT, re.MULTILINE)
    listed = {name: (names(needs), names(acquires)) for name, needs, acquires in rows}
    declared = {a.name: (set(a.needs), set(a.acquires | a.replaces)) for a in VOCABULARY.activities.values()}
    assert {name: row for name, row in listed.items() if name in declared} == declared


def test_the_events_are_those_of_the_product() -> None:
    for resource in VOCABULARY.resources.values():
        rows = re.findall(rf"^\| ([^|]*) \|[^|]*\| while `{resource.name}` is held", TEXT, re.MULTILINE)
        assert names(" ".join(rows)) == set(resource.raises)


def test_rules_are_numbered_without_a_gap() -> None:
    numbers = [int(number) for number in re.findall(r"^\| L(\d+) \|", TEXT, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_tests_that_are_named_exist() -> None:
    written = "\n".join(path.read_text("utf-8") for path in TESTS.rglob("test_*.py"))
    missing = {name for name in re.findall(r"`(test_\w+)`", TEXT) if f"def {name}(" not in written}
    assert missing == set()


def names(cell: str) -> set[str]:
    return set(re.findall(r"`([\w.]+)`", cell))
