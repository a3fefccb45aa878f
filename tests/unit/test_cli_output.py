"""How commands print."""

from __future__ import annotations

import io

import pytest

from kenaz_engine.cli import output


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _ordinary_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert output.Paint(Terminal())("ok", "green") == "\x1b[32mok\x1b[0m"
    assert output.Paint(Terminal())("", "green") == ""
    assert output.Paint(io.StringIO())("ok", "green") == "ok"
    monkeypatch.setenv("NO_COLOR", "1")
    assert output.Paint(Terminal())("ok", "green") == "ok"
    monkeypatch.setenv("NO_COLOR", "")
    assert output.Paint(Terminal()).on
    monkeypatch.setenv("TERM", "dumb")
    assert output.Paint(Terminal())("ok", "green") == "ok"


def test_the_width_is_that_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "57")
    monkeypatch.setattr("sys.stdout", Terminal())
    assert output.columns() == 57
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert output.columns() is None


def test_text_of_others_cannot_steer_a_terminal() -> None:
    assert output.plain("é ok") == "é ok"
    assert output.plain("a\x1b[2J\nb\x9b\u202e") == "a\\x1b[2J\\nb\\x9b\\u202e"
    assert output.plain("\udcff") == "\\udcff"


def test_a_table_is_aligned_and_cut() -> None:
    rows = [("ID", "STATE"), ("longer", "x"), ("a", "running")]
    assert output.table(rows, indent=" ") == [" ID      STATE", " longer  x", " a       running"]
    assert output.table(rows, width=10) == ["ID      ..."[:7] + "...", "longer  x", "a      ..."]
    assert output.cut("abcdef", 6) == "abcdef"
    assert output.cut("abcdef", 5) == "ab..."
    assert output.cut("abcdef", 2) == "..."


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0s"), (0.9, "0s"), (42, "42s"), (190, "3m10s"), (3600, "1h0m"), (1_047_600, "12d3h")],
)
def test_ages_have_two_units(seconds: float, text: str) -> None:
    assert output.ago(seconds) == text
