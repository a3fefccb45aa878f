"""The config disk, read back by the library that can read any ISO 9660 image."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path
from typing import Any

import pycdlib
import pytest

from kenaz_engine.images.config_disk import LABEL, environment_file, write_config_disk


def test_values_are_quoted_and_sorted() -> None:
    assert environment_file({"B": 'x"\\$`', "A": "two\nlines\t"}) == b'A="two\nlines\t"\nB="x\\"\\\\\\$\\`"\n'


@pytest.mark.parametrize("value", ["\0", "a\rb", "\x1b[0m", "\x7f", "\ud800"])
def test_what_systemd_would_drop_is_refused_without_showing_it(value: str) -> None:
    with pytest.raises(ValueError, match="the value of TOKEN holds") as caught:
        environment_file({"TOKEN": f"canary{value}"})
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "1A", "A-B", "A=B", "Ä", "A\n"])
def test_names_that_are_no_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name"):
        environment_file({name: "x"})


@pytest.mark.parametrize("kind", ["rr_path", "joliet_path"])
def test_files_come_back_under_their_names(tmp_path: Path, kind: str) -> None:
    files = {"kenaz.env": b'A="b"\n', "A longer name.json": b"{}" * 5000, "empty": b""}
    path = tmp_path / "config.iso"
    write_config_disk(path, files)
    disk = pycdlib.PyCdlib()
    disk.open(str(path))
    assert disk.pvd.volume_identifier.rstrip() == LABEL.encode()
    found: dict[str, bytes] = {}
    for name in files:
        content = io.BytesIO()
        disk.get_file_from_iso_fp(content, **{kind: f"/{name}"})
        found[name] = content.getvalue()
    disk.close()
    assert found == files


def test_the_label_is_where_a_guest_without_serial_numbers_looks(tmp_path: Path) -> None:
    path = tmp_path / "config.iso"
    write_config_disk(path, {"kenaz.env": b""})
    assert path.read_bytes()[32808 : 32808 + 9] == LABEL.encode()


def test_only_the_owner_may_read_it_and_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "config.iso"
    write_config_disk(path, {"kenaz.env": b"A=1\n"})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        write_config_disk(path, {})
    assert path.read_bytes() == before


def test_nothing_is_left_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, *_: Any) -> Any:
        os.close(descriptor)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(OSError, match="No space left"):
        write_config_disk(tmp_path / "config.iso", {"kenaz.env": b""})
    assert list(tmp_path.iterdir()) == []
