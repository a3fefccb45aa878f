"""Documents that are generated are current: README's picture, and the table of rules and tests.

After a change that is meant: KENAZ_GOLDEN=write pytest tests/unit/test_replay_documents.py
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kenaz_engine.journal.reader import read_journal
from kenaz_engine.lifecycle.diagram import mermaid
from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.replay.replayer import replay

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RULES = ROOT / "docs/reference/lifecycle.md"
CONFORMANCE = ROOT / "docs/reference/conformance.md"

BEGIN, END = "<!-- lifecycle standard -->", "<!-- /lifecycle standard -->"


def settle(path: Path, expected: str) -> None:
    """Writes what is asked for, or asserts that it is there."""
    if os.environ.get("KENAZ_GOLDEN") == "write":
        path.write_text(expected, encoding="utf-8", newline="\n")
    current = path.read_text("utf-8") == expected
    assert current, f"{path.name} is stale: KENAZ_GOLDEN=write pytest tests/unit/{Path(__file__).name}"


def test_the_picture_in_the_readme_is_current(standard: Lifecycle) -> None:
    text = README.read_text("utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    settle(README, f"{before}{BEGIN}\n```mermaid\n{mermaid(standard)}```\n{END}{after}")


@dataclass(frozen=True)
class Rule:
    """A numbered rule: the section it stands in, its first sentence, and what is said to hold it."""

    number: int
    section: str
    sentence: str
    tests: str


def rules() -> list[Rule]:
    section, found = "", []
    for line in RULES.read_text("utf-8").splitlines():
        if line.startswith("### "):
            section = line[4:]
        elif match := re.fullmatch(r"\| L(\d+) \| (.+?) \| (.*?) ?\|", line):
            sentence = re.split(r"(?<=[.!]) (?=[A-Z`])", match[2], maxsplit=1)[0]
            found.append(Rule(int(match[1]), section, sentence, match[3]))
    return found


def aliases() -> dict[str, str]:
    """The short names of test modules, as the reference introduces them."""
    text = " ".join(RULES.read_text("utf-8").split())
    return dict(re.findall(r"`(\w+)` is `(tests/[\w/]+\.py)`", text))


def defined(path: str) -> set[str]:
    """The names of the tests in a module."""
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


def holders(rule: Rule) -> Iterator[tuple[str, list[str]]]:
    """The modules that hold a rule, each with its tests, or with the codes of its examples."""
    named = aliases()
    for part in filter(None, (part.strip() for part in rule.tests.split(";"))):
        alias, _, tests = part.partition(": ")
        names = re.findall(r"`(test_\w+)`", tests) or re.findall(r"KL\d+", tests)
        assert alias in named, f"L{rule.number}: no module is called {alias!r}"
        assert names, f"L{rule.number}: {part!r} names no test"
        yield named[alias], names


def table() -> Iterator[str]:
    section = ""
    for rule in rules():
        if rule.section != section:
            section = rule.section
            yield from ("", f"## {section}", "", "| rule | says | held by |", "| --- | --- | --- |")
        held = [
            f"[{path.rsplit('/', 1)[1]}](../../{path}): {', '.join(f'`{name}`' for name in names)}"
            for path, names in holders(rule)
        ]
        yield f"| [L{rule.number}](lifecycle.md#rules) | {rule.sentence} | {'<br>'.join(held)} |"


HEAD = """\
# Conformance

Each numbered rule of [the lifecycle](lifecycle.md), and the tests that hold it. `KL...` are the examples in
[findings.md](findings.md), each of which is a test. This page is generated from the tables there;
`tests/unit/test_replay_documents.py` asserts that it is current, that every rule is held, and that every test
that it names exists. {count} rules.
"""


def test_the_table_of_rules_and_tests_is_current() -> None:
    settle(CONFORMANCE, HEAD.format(count=len(rules())) + "\n".join(table()) + "\n")


def test_the_rules_are_numbered_without_a_gap() -> None:
    assert [rule.number for rule in rules()] == list(range(1, len(rules()) + 1))


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: f"L{rule.number}")
def test_every_rule_is_held_by_tests_that_exist(rule: Rule) -> None:
    held = list(holders(rule))
    assert held
    for path, names in held:
        if names[0].startswith("KL"):
            examples = (ROOT / "docs/reference/findings.md").read_text("utf-8")
            assert all(f"## {name}" in examples for name in names)
        else:
            assert set(names) <= defined(path)


def test_the_example_in_the_how_to_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/how-to/replay-a-journal.md").read_text("utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(ROOT / "tests/journals")
    exec(compile(code, "how-to", "exec"), {})
    assert replay(read_journal(Path("qemu-hello.journal.jsonl"))).ok
