from __future__ import annotations

import io
from pathlib import Path

import pytest

from kenaz_engine.spec import files
from kenaz_engine.spec.faults import InvalidFile


def test_a_file_and_stdin(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("ü: 1\n", "utf-8")
    assert files.read(str(path)) == ("ü: 1\n", str(path))
    assert files.read("-", io.BytesIO(b"a: 1")) == ("a: 1", "<stdin>")


def test_stdin_is_the_process_s_own_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"b: 2")))
    assert files.read("-") == ("b: 2", "<stdin>")


def refused(path: str) -> str:
    with pytest.raises(InvalidFile) as caught:
        files.read(path)
    [fault] = caught.value.faults
    return str(fault)


def test_what_cannot_be_read_is_told_plainly(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a: \xff")
    (tmp_path / "loop").symlink_to("loop")
    assert refused(f"{tmp_path}/none") == f"{tmp_path}/none: does not exist (is the path right?)"
    assert refused(f"{tmp_path}/file/x") == f"{tmp_path}/file/x: does not exist (is the path right?)"
    assert refused(str(tmp_path)) == f"{tmp_path}: is a directory (name the file in it)"
    assert refused(f"{tmp_path}/file") == f"{tmp_path}/file:1:4: is not UTF-8 text (save the file as UTF-8)"
    assert "loop: cannot be read: " in refused(f"{tmp_path}/loop")
    assert refused("a\0b").endswith("is not a path")


def test_a_forbidden_file_is_told_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)  # root, as which tests may run, can read everything
    assert refused("x") == "x: may not be read (look at its permissions)"


def test_no_more_than_the_bound_is_read() -> None:
    with pytest.raises(InvalidFile, match="is longer than 1 MiB"):
        files.read("/dev/zero")
