"""Every command of the documents about images does what they say, in their order."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kenaz_engine.images.catalogfile import load_catalog

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("how-to/publish-an-image.md", "how-to/air-gapped.md", "reference/image-store.md")


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with the files that the documents take to be there."""
    contents = {"vmlinuz": b"kernel" * 99, "initrd.img": b"initrd" * 99, "root.raw": bytes(1 << 16)}
    carried = tmp_path / "carried/sigil"
    carried.mkdir(parents=True)
    parts = {}
    for part, (name, content) in zip(("kernel", "initrd", "root"), contents.items(), strict=True):
        (tmp_path / name).write_bytes(content)
        (carried / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        parts[part] = {"file": name, "size": len(content), "sha256": digest, "format": "raw"}
    (tmp_path / "carried/root.raw").write_bytes(contents["root.raw"])
    document = {"schema": 1, "name": "sigil", "tag": "2026.11", "arch": "x86_64", "cmdline": ""}
    manifest = json.dumps({**document, "console": {"device": "", "patterns": []}, "parts": parts}).encode()
    (carried / "image.json").write_bytes(manifest)
    (tmp_path / "carried/sigil.sha256").write_text(hashlib.sha256(manifest).hexdigest())
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_the_document_work(page: str, place: Path, short: Path) -> None:
    script = "\n".join(["set -eux", *blocks(page, "sh")])
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(place),
        "XDG_CONFIG_HOME": str(place / "config"),
        "XDG_RUNTIME_DIR": str(short),
        "KENAZ_STATE_DIR": str(place / "state"),
        "KENAZ_CACHE_DIR": str(place / "cache"),
    }
    (place / "cache/images").mkdir(parents=True)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if page == PAGES[0]:
        tags = re.findall(r"^sigil +(\S+) +x86_64 .* (here|old) ", done.stdout, re.MULTILINE)
        assert tags == [("2026.11", "here"), ("2026.12", "here"), ("2026.11", "old")]


def test_no_command_of_these_documents_escapes_the_test() -> None:
    for page in (*PAGES, "reference/catalog.md"):
        fences = re.findall(r"^```.*$", (DOCS / page).read_text("utf-8"), re.MULTILINE)
        assert set(fences[::2]) <= {"```sh", "```yaml"}
        assert set(fences[1::2]) <= {"```"}


def test_the_catalogs_of_the_reference_are_valid() -> None:
    whole, *more = blocks("reference/catalog.md", "yaml")
    assert list(load_catalog(whole, "catalog.md")) == ["sigil", "demo"]
    head = "".join(whole.splitlines(keepends=True)[:2])
    for example in more:
        load_catalog(head + ("" if "images:" in example else "images: {}\n") + example, "catalog.md")
