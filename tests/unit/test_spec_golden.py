"""Every fault of a bad file, word for word. Each in spec_faults/ is a document and what is said of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import yaml

from kenaz_engine.lifecycle.loader import load_lifecycle
from kenaz_engine.spec import yamlfile
from kenaz_engine.spec.faults import InvalidFile
from kenaz_engine.spec.resolve import load_session

CASES = sorted((Path(__file__).parent / "spec_faults").glob("*.txt"))
SEPARATOR = "=== faults ===\n"


def faults_of(case: Path, source: str) -> str:
    session = partial(load_session, environment={"SET": "1", "BROKEN": "\udcff"})
    load = load_lifecycle if case.stem.startswith("lifecycle") else session
    with pytest.raises(InvalidFile) as caught:
        load(source, f"{case.stem}.yaml")
    return "".join(f"{fault}\n" for fault in caught.value.faults)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_all_faults_are_told_at_their_place(case: Path) -> None:
    source, _, expected = case.read_text().partition(SEPARATOR)
    assert faults_of(case, source) == expected


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_the_parser_in_python_says_the_same(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yamlfile, "_LOADER", yaml.SafeLoader)
    source, _, expected = case.read_text().partition(SEPARATOR)
    assert faults_of(case, source) == expected
