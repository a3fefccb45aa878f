"""`doctor`, on drivers and images that are made up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kenaz_drivers.contract import Capabilities, DriverError, Reason
from kenaz_engine.channel.transports import TransportError
from kenaz_engine.cli import doctor, image
from kenaz_engine.cli.main import main

Capture = pytest.CaptureFixture[str]

PARTS = {"kernel": b"kernel", "initrd": b"initrd", "root": b"root" * 100}


class Usage(NamedTuple):
    free: int


def _capabilities(usable: bool, **more: Any) -> Capabilities:
    reason = Reason(usable, "all is well" if usable else "it is not there", "install it")
    return Capabilities(usable, (reason,), "x86_64", transports=("unix",), **more)


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Capabilities]:
    """The drivers of the host; a test puts into it what it needs."""
    found: dict[str, Capabilities] = {}

    class Probed:
        def __init__(self, name: str) -> None:
            if name == "broken":
                raise DriverError("it cannot be loaded", hint="update it")
            self.name = name

        async def probe(self, arch: str, options: Mapping[str, Any]) -> Capabilities:
            return found[self.name]

    monkeypatch.setattr(doctor, "driver_names", lambda: tuple(sorted(found)))
    monkeypatch.setattr(doctor, "load", Probed)
    return found


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KENAZ_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("KENAZ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/0")
    for module in (doctor, image):
        monkeypatch.setattr(module, "native_arch", lambda: "x86_64")
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(doctor.ROOM))
    return tmp_path


def put_image(directory: Path) -> Path:
    manifest: dict[str, Any] = {
        "schema": 1,
        "name": "demo",
        "tag": "1.0",
        "arch": "x86_64",
        "cmdline": "quiet",
        "console": {"device": "ttyS0", "patterns": []},
        "parts": {
            name: {"file": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in PARTS.items()
        },
    }
    manifest["parts"]["root"]["format"] = "raw"
    directory.mkdir(parents=True)
    for name, content in PARTS.items():
        (directory / name).write_bytes(content)
    path = directory / "image.json"
    path.write_text(json.dumps(manifest))
    return path


# --- doctor -------------------------------------------------------------------------------------------------


def test_doctor_shows_each_driver_and_its_mend(
    drivers: dict[str, Capabilities], capsys: Capture, home: Path
) -> None:
    drivers |= {
        "broken": _capabilities(True),
        "missing": _capabilities(False),
        "process": _capabilities(True, isolates=False),
        "simulated": _capabilities(True),
    }
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "driver broken: not usable for x86_64 guests\n  no  it cannot be loaded (update it)\n" in out
    assert "driver missing: not usable for x86_64 guests\n  no  it is not there (install it)\n" in out
    assert "  accelerator none, transports unix\n  isolates nothing\n  ok  all is well\n" in out
    assert f"  ok  {home}/state can be written, 1.0 GiB free\n" in out
    assert "  no  image demo for x86_64 is not on this machine (run `make image`)\n" in out
    assert "they then go to /run/user/0/kenaz\n" in out
    assert not list(home.iterdir())


@pytest.mark.parametrize(
    ("usable", "argv", "code"),
    [
        ({"simulated": True, "qemu": False}, [], 3),
        ({"simulated": True, "qemu": True}, [], 0),
        ({"simulated": True}, ["--driver", "simulated"], 0),
        ({"simulated": True, "qemu": False}, ["--driver", "qemu"], 3),
    ],
)
def test_doctor_succeeds_when_something_real_can_run(
    drivers: dict[str, Capabilities], capsys: Capture, usable: dict[str, bool], argv: list[str], code: int
) -> None:
    drivers |= {name: _capabilities(here) for name, here in usable.items()}
    assert main(["doctor", *argv]) == code
    assert ("nothing here can run a session" in capsys.readouterr().out) == (code == 3)


def test_doctor_as_json(drivers: dict[str, Capabilities], capsys: Capture, home: Path) -> None:
    drivers["qemu"] = _capabilities(False)
    assert main(["image", "import", str(put_image(home / "elsewhere"))]) == 0
    capsys.readouterr()
    assert main(["doctor", "--json"]) == 3
    data = json.loads(capsys.readouterr().out)
    assert (data["ok"], data["arch"]) == (False, "x86_64")
    assert data["drivers"] == [
        {
            "name": "qemu",
            "usable": False,
            "accelerator": "none",
            "transports": ["unix"],
            "isolates": True,
            "reasons": [{"ok": False, "text": "it is not there", "mend": "install it"}],
        }
    ]
    assert data["auto"] is None
    names = ["state", "cache", "sockets", "store", "image", "files"]
    assert [part["name"] for part in data["host"]] == names
    assert data["host"][4] == {
        "name": "image",
        "ok": True,
        "text": "image demo:1.0 for x86_64 is here",
        "mend": None,
    }


def test_doctor_of_an_unknown_driver(drivers: dict[str, Capabilities], capsys: Capture) -> None:
    drivers["qemu"] = _capabilities(True)
    assert main(["doctor", "--driver", "qmu"]) == 2
    assert "there is no driver 'qmu' (did you mean `qemu`?)" in capsys.readouterr().err


def test_doctor_finds_directories_that_cannot_be_used(
    drivers: dict[str, Capabilities], capsys: Capture, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(doctor.ROOM // 2))
    reason = doctor.directory_reason(home / "a/b", "move")
    assert (reason.ok, reason.mend) == (False, "make room, at least 1 GiB; or move")
    assert reason.text == f"{home}/a/b can be written, 0.5 GiB free"
    (home / "file").touch()
    reason = doctor.directory_reason(home / "file/below", "move")
    assert (reason.ok, reason.mend) == (False, "move")
    assert "cannot be written: Not a directory" in reason.text


@pytest.mark.parametrize(
    ("state", "runtime", "ok", "words"),
    [
        ("/s", "/r", True, "short enough in the state directory"),
        ("/" + "s" * 60, "/r", True, "they then go to /r/kenaz"),
        ("/" + "s" * 60, "/" + "r" * 70, False, "a socket's path would be too long"),
    ],
)
def test_doctor_measures_the_paths_of_sockets(
    drivers: dict[str, Capabilities],
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    runtime: str,
    ok: bool,
    words: str,
) -> None:
    monkeypatch.setenv("KENAZ_STATE_DIR", state)
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    found = dict(doctor.examine_host("x86_64"))["sockets"]
    assert found.ok is ok
    assert words in found.text


def test_doctor_says_what_auto_would_be(drivers: dict[str, Capabilities], capsys: Capture) -> None:
    drivers |= {"process": _capabilities(True, isolates=False), "qemu": _capabilities(False)}
    assert main(["doctor"]) == 0
    assert "\ndriver auto: process, the last resort, as nothing else is usable\n" in capsys.readouterr().out
    drivers["qemu"] = _capabilities(True, accelerator="tcg")
    assert main(["doctor"]) == 0
    assert "\ndriver auto: qemu, for none runs guests without emulation\n" in capsys.readouterr().out
    drivers["libvirt"] = _capabilities(True, accelerator="kvm")
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["auto"] == "libvirt"
    assert main(["doctor", "--driver", "libvirt"]) == 0
    assert "driver auto" not in capsys.readouterr().out


def test_doctor_finds_what_the_store_lacks(
    drivers: dict[str, Capabilities], capsys: Capture, home: Path
) -> None:
    assert dict(doctor.examine_host("x86_64"))["store"].text == "the image store has 0 images, 0.0 GiB"
    assert main(["image", "import", str(put_image(home / "elsewhere"))]) == 0
    assert dict(doctor.examine_host("x86_64"))["store"].ok
    blobs = home / "cache/images/blobs/sha256"
    (blobs / hashlib.sha256(PARTS["root"]).hexdigest()).unlink()
    lacking = dict(doctor.examine_host("x86_64"))["store"]
    assert (lacking.ok, lacking.mend) == (False, "run `kenaz-launcher image verify --all`")
    assert "parts are missing of demo" in lacking.text
    (home / "cache/images/VERSION").write_text("another\n")
    refused = dict(doctor.examine_host("x86_64"))["store"]
    assert not refused.ok
    assert "cannot be used" in refused.text


@pytest.mark.parametrize(
    ("soft", "ok", "words"), [(64, False, "64 open"), (-1, True, "any number of open"), (1024, True, "1024")]
)
def test_doctor_knows_the_limit_of_open_files(
    drivers: dict[str, Capabilities], monkeypatch: pytest.MonkeyPatch, soft: int, ok: bool, words: str
) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, soft))
    files = dict(doctor.examine_host("x86_64"))["files"]
    assert files.ok is ok
    assert files.text.startswith(words)


def test_a_python_that_keeps_nobody_out_on_windows_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise TransportError("this Python makes no directory", hint="use Python 3.12.4 or later")

    monkeypatch.setattr(doctor, "check_local", refuse)
    [reason] = [reason for name, reason in doctor.examine_host("x86_64") if name == "sockets"]
    assert (reason.ok, reason.text) == (False, "this Python makes no directory")
    assert reason.mend == "use Python 3.12.4 or later"
