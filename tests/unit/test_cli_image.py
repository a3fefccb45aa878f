"""`image`, on images that are made up, in a store of the test's own."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from kenaz_engine.cli import image
from kenaz_engine.cli.main import main
from kenaz_engine.cli.transfers import Bar, Pace, as_data, in_words
from kenaz_engine.images.locks import hold
from kenaz_engine.images.store import Store
from kenaz_engine.images.transfer import Notice, Progress

Capture = pytest.CaptureFixture[str]

PARTS = {"kernel": b"kernel", "initrd": b"initrd", "root": b"root" * 100}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KENAZ_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("KENAZ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("KENAZ_CATALOG", str(tmp_path / "catalog.yaml"))
    monkeypatch.setattr(image, "native_arch", lambda: "x86_64")
    monkeypatch.setattr(os, "fsync", lambda file: None)
    write_catalog(tmp_path, {})
    return tmp_path


def write_catalog(home: Path, images: dict[str, Any]) -> None:
    document = {"apiVersion": "kenaz.dev/v1", "kind": "Catalog", "images": images}
    (home / "catalog.yaml").write_text(json.dumps(document))


def put_image(directory: Path, tag: str = "1.0", **parts: bytes) -> Path:
    contents = {**PARTS, **parts}
    listed: dict[str, Any] = {
        name: {"file": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    listed["root"]["format"] = "raw"
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    path = directory / "image.json"
    console = {"device": "ttyS0", "patterns": []}
    document = {"schema": 1, "name": "demo", "tag": tag, "arch": "x86_64", "cmdline": "quiet"}
    path.write_text(json.dumps({**document, "console": console, "parts": listed}))
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ran(capsys: Capture, *argv: str, code: int = 0) -> tuple[str, str]:
    assert main(["image", *argv]) == code, capsys.readouterr()
    return capsys.readouterr()


def ran_json(capsys: Capture, *argv: str, code: int = 0) -> Any:
    return json.loads(ran(capsys, *argv, "--json", code=code)[0])


def store(home: Path) -> Store:
    return Store(home / "cache/images")


def test_an_image_is_imported_listed_and_verified(capsys: Capture, home: Path) -> None:
    manifest = put_image(home / "elsewhere")
    out, err = ran(capsys, "import", str(manifest))
    assert out == f"demo:1.0 x86_64 sha256:{digest(manifest)}\n"
    assert [line.split()[0] for line in err.splitlines()] == ["kernel", "initrd", "root"]
    lines = ran(capsys, "ls")[0].splitlines()
    words = ["NAME", "TAG", "ARCH", "SIZE", "STATUS", "AGE", "VERIFIED", "USED", "BY", "DIGEST"]
    assert lines[0].split() == words
    assert lines[1].split()[:6] == ["demo", "1.0", "x86_64", "0.0", "MiB", "here"]
    assert lines[1].split()[-2:] == ["-", digest(manifest)[:12]]
    assert lines[2].split()[:5] == ["demo", "-", "aarch64", "-", "missing"]
    assert lines[4] == "demo for aarch64: run `make image-aarch64`"
    first, second, _ = ran_json(capsys, "ls")
    assert (first["status"], first["how"], first["usedBy"], first["hint"]) == ("here", "imported", [], None)
    assert first["size"] == 412 + manifest.stat().st_size
    assert first["url"] == manifest.as_uri()
    assert (second["status"], second["digest"], second["usedBy"]) == ("missing", None, [])
    before = first["verified"]
    assert ran(capsys, "verify", "demo")[0] == f"demo:1.0 sha256:{digest(manifest)}: ok\n"
    assert ran_json(capsys, "ls")[0]["verified"] > before


def test_what_is_damaged_is_set_aside_and_comes_again(capsys: Capture, home: Path) -> None:
    manifest = put_image(home / "elsewhere")
    ran(capsys, "import", str(manifest))
    blob = store(home).blob(hashlib.sha256(PARTS["kernel"]).hexdigest())
    blob.chmod(0o644)
    blob.write_bytes(b"KERNEL")
    assert ran_json(capsys, "ls")[0]["status"] == "here"  # the size is right, which is all that ls looks at
    _, err = ran(capsys, "verify", "demo", code=1)
    assert "its SHA-256 is" in err
    assert "set aside as" in err
    assert [path.read_bytes() for path in store(home).quarantine.iterdir()] == [b"KERNEL"]
    assert ran_json(capsys, "ls")[0]["status"] == "damaged"
    assert "demo:1.0 x86_64 sha256:" in ran(capsys, "pull", "demo")[0]
    assert blob.read_bytes() == b"kernel"
    assert ran_json(capsys, "verify", "--all")["ok"]
    assert ran_json(capsys, "ls")[0]["how"] == "imported"


def test_a_name_that_cannot_be_read_is_told_and_set_aside(capsys: Capture, home: Path) -> None:
    ran(capsys, "import", str(put_image(home / "elsewhere")))
    ref = store(home).ref_path("demo", "x86_64")
    ref.write_text("{")
    assert ran_json(capsys, "ls")[0]["status"] == "damaged"
    assert "image verify --all" in ran(capsys, "pull", "demo", code=1)[1]
    assert "is damaged" in ran(capsys, "prune", code=1)[1]
    assert "set aside as" in ran(capsys, "verify", "--all", code=1)[1]
    assert not ref.exists()
    assert ran_json(capsys, "verify", "--all")["ok"]


def test_what_is_used_stays(capsys: Capture, home: Path) -> None:
    for tag in ("1", "2", "3"):
        ran(capsys, "import", str(put_image(home / tag, tag, root=tag.encode())))
    the_store = store(home)
    first, second, third = (digest(home / tag / "image.json") for tag in ("1", "2", "3"))
    before = set(the_store.present())
    held = trio.run(hold, [the_store.blob(first), the_store.blob(hashlib.sha256(b"1").hexdigest())])
    assert [item["status"] for item in ran_json(capsys, "ls")[:3]] == ["here", "old", "old"]
    assert ran_json(capsys, "ls")[2]["usedBy"] == ["another launcher"]
    dry = ran_json(capsys, "prune", "--dry-run")
    assert [item["digest"] for item in dry["images"]] == [f"sha256:{second}"]
    assert set(the_store.present()) == before
    done = ran_json(capsys, "prune")
    assert {**done, "dryRun": True} == dry
    assert before - set(the_store.present()) == {second, hashlib.sha256(b"2").hexdigest()}
    # The kernel is shared, so it stays with the last that has it.
    assert "is used by another launcher" in ran(capsys, "rm", "demo:1", code=1)[1]
    held.close()
    ran(capsys, "rm", "demo:1")
    assert [item["digest"] for item in ran_json(capsys, "ls") if item["digest"]] == [f"sha256:{third}"]
    ran(capsys, "rm", f"demo@sha256:{third}")
    assert the_store.present() == []
    assert "there is no image demo" in ran(capsys, "rm", "demo", code=1)[1]


def test_prune_by_size_takes_the_oldest_first(capsys: Capture, home: Path) -> None:
    for tag in ("1", "2"):
        ran(capsys, "import", str(put_image(home / tag, tag, root=tag.encode() * 2000)))
    assert len(ran_json(capsys, "prune", "--keep", "2", "--dry-run")["images"]) == 0
    done = ran_json(capsys, "prune", "--keep", "2", "--max-bytes", "4KiB")
    assert [item["digest"] for item in done["images"]] == [f"sha256:{digest(home / '1/image.json')}"]
    assert done["left"] <= 4096
    assert ran_json(capsys, "prune", "--max-bytes", "0B")["left"] == 0


def test_prune_sweeps_what_is_left_over(capsys: Capture, home: Path) -> None:
    ran(capsys, "import", str(put_image(home / "elsewhere")))
    the_store = store(home)
    (the_store.blob("0" * 64)).write_bytes(b"nobody's")
    fresh, old = the_store.part("1" * 64), the_store.part("2" * 64)
    for path in (fresh, old):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 90_000,) * 2)
    (the_store.tmp / "build-x86_64-1").mkdir()
    os.utime(the_store.tmp / "build-x86_64-1", (time.time() - 90_000,) * 2)
    (the_store.quarantine / "bad-1").write_bytes(b"bad")
    out, _ = ran(capsys, "prune", "--dry-run")
    assert out.count("would go: ") == 4
    assert old.exists()
    out, _ = ran(capsys, "prune")
    assert out.count("removed: ") == 4
    assert [path.name for path in the_store.tmp.iterdir()] == [fresh.name]
    assert not list(the_store.quarantine.iterdir())
    assert ran_json(capsys, "ls")[0]["status"] == "here"


def test_a_disk_is_imported_under_a_name(capsys: Capture, home: Path) -> None:
    disk = home / "disk.raw"
    disk.write_bytes(b"\0" * 4096)
    assert "give the image a --name" in ran(capsys, "import", str(disk), code=2)[1]
    assert (
        "its SHA-256 is" in ran(capsys, "import", str(disk), "--name", "d", "--sha256", "0" * 64, code=1)[1]
    )
    lines = ran(capsys, "import", str(disk), "--name", "own", "--tag", "7", "--json")[0].splitlines()
    assert json.loads(lines[-1])["ok"] is True
    data = ran_json(capsys, "inspect", "own")
    assert (data["tag"], data["rootFormat"], list(data["parts"])) == ("7", "raw", ["root"])
    assert data["expires"] is None
    text = ran(capsys, "inspect", "own")[0]
    assert f"parts.root.path      {store(home).blob(digest(disk))}\n" in text
    assert ran_json(capsys, "inspect", str(disk))["digest"] is None


def test_pull_all_goes_on_after_a_failure(capsys: Capture, home: Path) -> None:
    manifest = put_image(home / "elsewhere")
    good = {"manifest": {"urls": [manifest.as_uri()], "sha256": digest(manifest)}}
    bad = {"manifest": {"urls": [(home / "gone.json").as_uri()], "sha256": "0" * 64}}
    write_catalog(home, {"bad": {"arch": {"x86_64": bad}}, "good": {"arch": {"x86_64": good}}})
    assert [item["status"] for item in ran_json(capsys, "ls")] == [
        "missing",
        "missing",
        "missing",
        "published",
        "published",
    ]
    out, err = ran(capsys, "pull", "--all", code=1)
    assert out == f"demo:1.0 x86_64 sha256:{digest(manifest)}\n"
    assert "note: demo is published nowhere for x86_64: run `make image`" in err
    assert "kenaz-launcher: bad: image.json could not be fetched" in err
    lines = [json.loads(line) for line in ran(capsys, "pull", "--all", "--json", code=1)[0].splitlines()]
    assert [line["ok"] for line in lines if line["kind"] == "result"] == [False, True]
    assert main(["image", "pull", "good", "--offline"]) == 0


def test_a_manifest_pulled_by_hand_has_its_own_name(capsys: Capture, home: Path) -> None:
    manifest = put_image(home / "elsewhere")
    assert ran(capsys, "pull", manifest.as_uri())[0].startswith("demo:1.0 ")
    ran(capsys, "pull", manifest.as_uri(), "--sha256", digest(manifest).upper())
    assert ran_json(capsys, "ls")[0]["how"] == "pulled"


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["pull", "demo"], 1, "image demo for x86_64 is not on this machine (run `make image`)"),
        (["pull", "file:///nowhere/image.json"], 1, "/nowhere/image.json: No such file"),
        (["pull", "https://127.0.0.1/disk.raw"], 1, "is not fetched without its SHA-256"),
        (["pull", "ftp://127.0.0.1/image.json"], 2, "cannot be fetched"),
        (["pull", "demo", "--all"], 2, "name an image, or --all"),
        (["pull", "demo", "--sha256", "0" * 64], 2, "--sha256 goes with a URL"),
        (["pull", "https://127.0.0.1/image.json", "--sha256", "x"], 2, "is not a SHA-256 digest"),
        (["pull", "./image.json"], 2, "kenaz-launcher image import ./image.json"),
        (["pull", f"https://127.0.0.1/i.json@sha256:{'0' * 64}", "--offline"], 1, "offline, and https:"),
        (["verify"], 2, "name an image, or --all"),
        (["verify", "demo", "--arch", "aarch64"], 1, "(run `make image-aarch64`)"),
        (["verify", "./gone.json"], 1, "there is no "),
        (["inspect", "zork"], 1, "there is no image zork"),
        (["import", "gone.json"], 1, "there is no file"),
        (["import", "pyproject.toml", "--name", "A B"], 2, "is not the name of an image"),
        (["import", "pyproject.toml", "--name", "a", "--tag", "-"], 2, "is not a tag"),
        (["prune", "--max-bytes", "lots"], 2, "--max-bytes: 'lots' is not a size"),
        (["prune", "--keep", "-1"], 2, "'-1' is not a whole number"),
        (["rm", "./x.json"], 2, "is not a name in the store"),
        ([], 2, "the following arguments are required: ACTION"),
    ],
)
def test_image_fails_in_one_line(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, argv: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert main(["image", *argv]) == code
    assert message in capsys.readouterr().err.splitlines()[-1]


# --- progress -----------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


MIB = 1 << 20


def test_progress_in_words_and_as_json() -> None:
    progress = Progress("root", 40 * MIB, 120 * MIB, 10.0 * MIB, 8.0)
    assert in_words(progress) == "root  33% of 120.0 MiB, 10.0 MiB/s, 8 s left"
    assert in_words(Progress("root", 0, 0)) == "root 100% of 0.0 MiB"
    assert in_words(Progress("root", 1, 4, waiting=True)).endswith(", another launcher fetches it")
    assert as_data(progress) == {
        "kind": "progress",
        "file": "root",
        "done": 40 * MIB,
        "total": 120 * MIB,
        "rate": 10 * MIB,
        "remaining": 8.0,
        "waiting": False,
    }


def test_a_terminal_gets_a_line_that_moves() -> None:
    out = Terminal()
    bar = Bar(out)
    bar.watch(Progress("root", 0, 4))
    bar.watch(Notice("a mirror is down"))
    bar.watch(Progress("root", 4, 4))
    bar.close()
    assert out.getvalue() == "\r\x1b[Kroot   0% of 0.0 MiB\na mirror is down\n\r\x1b[Kroot 100% of 0.0 MiB\n"


def test_elsewhere_a_line_at_each_quarter() -> None:
    out = io.StringIO()
    bar = Bar(out)
    for done in range(9):
        bar.watch(Progress("root", done, 8))
    bar.watch(Progress("empty", 0, 0))
    bar.close()
    shares = [line.split("%")[0].split()[-1] for line in out.getvalue().splitlines()]
    assert shares == ["25", "50", "75", "100", "100"]


def test_something_is_said_also_when_little_comes() -> None:
    pace = Pace(10.0, quarters=True)
    due = [second for second in range(35) if pace.due(Progress("root", second, 1000), float(second))]
    assert due == [10, 20, 30]
    pace = Pace(0.5)
    due = [tick for tick in range(11) if pace.due(Progress("root", tick, 10), tick / 10)]
    assert due == [0, 5, 10]
