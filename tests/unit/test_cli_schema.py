"""`schema`, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kenaz_engine.cli.main import main
from kenaz_engine.cli.schema import KINDS

SCHEMAS = Path(__file__).parents[2] / "specs/kenaz_specs/schemas"


@pytest.mark.parametrize("kind", KINDS)
def test_each_schema_is_printed_and_has_an_id(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", kind]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["$id"] == f"https://kenaz.dev/v1/{kind}.schema.json"
    assert main(["schema", kind, "--path"]) == 0
    assert Path(capsys.readouterr().out.strip()).read_text("utf-8") == printed


def test_every_shipped_schema_can_be_asked_for() -> None:
    assert {f"{kind}.schema.json" for kind in KINDS} == {path.name for path in SCHEMAS.glob("*")}


def test_there_is_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "zebra"]) == 2
    assert "invalid choice: 'zebra'" in capsys.readouterr().err
