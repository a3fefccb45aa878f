"""docs/reference/findings.md is true: each example gives exactly the finding under which it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kenaz_engine.lifecycle.analysis import analyse
from kenaz_engine.lifecycle.findings import CODES
from kenaz_engine.lifecycle.loader import load_lifecycle
from kenaz_engine.session.vocabulary import VOCABULARY
from kenaz_engine.spec.faults import InvalidFile

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "findings.md"

TEXT = REFERENCE.read_text("utf-8")
BLOCK = r"```yaml\n(.*?)```"
SECTIONS = re.findall(rf"^## (KL\d+) ([^\n]*)\n(.*?){BLOCK}\n\nMend: (.)", TEXT, re.DOTALL | re.MULTILINE)


def parts(text: str) -> dict[str, list[str]]:
    """The text of each top-level key: its own line, then one piece for each key below."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines(keepends=True):
        if line[0] != " ":
            key = line.partition(":")[0]
            found[key] = [line]
        elif re.match(r"  \S", line):
            found[key].append(line)
        else:
            found[key][-1] += line
    return found


def changed(base: str, example: str) -> str:
    """The base with the parts of the example in place of its own; states are replaced one by one."""
    whole = parts(base)
    for key, (head, *inner) in parts(example).items():
        if key == "states":
            states = {piece.partition(":")[0]: piece for piece in [*whole[key][1:], *inner]}
            inner = [piece for piece in states.values() if not piece.endswith(": ~\n")]
        whole[key] = [head, *inner]
    return "".join(piece for pieces in whole.values() for piece in pieces)


def codes(text: str) -> set[str]:
    try:
        lifecycle = load_lifecycle(text, "example.yaml")
    except InvalidFile as refused:
        return {fault.code for fault in refused.faults}
    return {finding.code for finding in analyse(lifecycle, VOCABULARY)}


@pytest.fixture(scope="module")
def base() -> str:
    found = re.search(BLOCK, TEXT, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_base_has_no_findings(base: str) -> None:
    assert codes(base) == set()


def test_every_code_has_its_section_in_order() -> None:
    sections = [(code, title) for code, title, *_ in SECTIONS]
    of_the_loader = [f"KL00{n}" for n in range(1, 10)]
    assert [code for code, _ in sections] == [*of_the_loader, *CODES]
    titled = {c.code: c.title + (" (warning)" if c.level == "warning" else "") for c in CODES.values()}
    assert dict(sections[9:]) == titled


@pytest.mark.parametrize(("code", "example"), [(code, example) for code, _, _, example, _ in SECTIONS])
def test_the_example_gives_exactly_its_finding(base: str, code: str, example: str) -> None:
    assert codes(changed(base, example)) == {code}


def test_the_message_shown_first_is_the_one_printed(base: str) -> None:
    example = next(example for code, _, _, example, _ in SECTIONS if code == "KL028")
    shown = re.search(r"```\n(small\.yaml.*?)```", TEXT, re.DOTALL)
    assert shown is not None
    lifecycle = load_lifecycle(changed(base, example), "small.yaml")
    printed = [str(finding.fault("small.yaml")) for finding in analyse(lifecycle, VOCABULARY)]
    assert printed == [" ".join(shown[1].split())]
