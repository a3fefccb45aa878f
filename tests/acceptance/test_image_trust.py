"""What the command takes from a publisher, and what not: by the real minisign, over HTTP."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

KEPT = "images/blobs/sha256"


@pytest.fixture
def launcher(world: Any, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command, with a store and a catalog of its own."""
    world.environment |= {
        "KENAZ_CACHE_DIR": str(tmp_path / "cache"),
        "KENAZ_CATALOG": str(tmp_path / "catalog.yaml"),
    }

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [world.command()[0], *words],
            capture_output=True,
            text=True,
            timeout=300,
            env=world.environment,
            check=False,
        )

    return run


class Shop:
    """An image in two forms, by its disk alone and by a manifest; which of them is signed is the test's."""

    def __init__(self, directory: Path, base: str, catalog: Path) -> None:
        self.base, self.catalog = base, catalog
        self.disk, self.manifest = directory / "disk.raw", directory / "image.json"
        self.disk.write_bytes(bytes(4096))
        part = {"file": "disk.raw", "size": 4096, "sha256": self.sha256(self.disk), "format": "raw"}
        document = {"schema": 1, "name": "sigil", "tag": "1", "arch": "x86_64", "cmdline": ""}
        document |= {"console": {"device": "", "patterns": []}, "parts": {"root": part}}
        self.manifest.write_text(json.dumps(document))

    @staticmethod
    def sha256(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def offer(self, form: str, key: str) -> Path:
        """Writes the catalog; the file that has to be signed."""
        file = self.disk if form == "disk" else self.manifest
        place: dict[str, Any] = {
            "urls": [f"{self.base}/{file.name}"],
            "sha256": self.sha256(file),
            "key": key,
        }
        if form == "disk":
            offer = {"parts": {"root": {**place, "size": 4096, "format": "raw"}}}
        else:
            offer = {"manifest": place}
        images = {"sigil": {"arch": {"x86_64": offer}}}
        self.catalog.write_text(
            json.dumps({"apiVersion": "kenaz.dev/v1", "kind": "Catalog", "images": images})
        )
        return file


@pytest.fixture
def shop(published: tuple[Path, str], tmp_path: Path) -> Shop:
    return Shop(*published, tmp_path / "catalog.yaml")


@pytest.mark.parametrize("form", ["disk", "manifest"])
def test_only_what_the_pinned_key_signed_is_taken(
    launcher: Any, shop: Shop, tmp_path: Path, minisign: Callable[[], Any], form: str
) -> None:
    ours, theirs = minisign(), minisign()
    file = shop.offer(form, ours.public)
    signature, another = Path(f"{file}.minisig"), tmp_path / "another"
    another.write_bytes(b"another content")

    def by_another_key() -> None:
        theirs.sign(file)

    def of_another_content() -> None:
        ours.sign(another)
        Path(f"{another}.minisig").rename(signature)

    def of_the_legacy_kind() -> None:
        ours.sign(file, "-l")

    def with_another_comment() -> None:
        ours.sign(file, "-t", "release 1")
        signature.write_text(signature.read_text().replace("release 1", "release 2"))

    def cut_short() -> None:
        ours.sign(file)
        signature.write_text(signature.read_text()[:150])

    for wrong, says in (
        (lambda: None, "status 404"),
        (by_another_key, "and the pinned key is"),
        (of_another_content, "is not that of the key"),
        (of_the_legacy_kind, "legacy kind"),
        (with_another_comment, "the trusted comment of the signature was changed"),
        (cut_short, "the signature"),
    ):
        signature.unlink(missing_ok=True)
        wrong()
        done = launcher("image", "pull", "sigil")
        assert (done.returncode, done.stdout) == (1, "")
        assert says in done.stderr
        assert not list((tmp_path / "cache" / KEPT).iterdir())
        assert "Traceback" not in done.stderr
    ours.sign(file)
    assert launcher("image", "pull", "sigil").returncode == 0
    assert shop.sha256(shop.disk) in {path.name for path in (tmp_path / "cache" / KEPT).iterdir()}


def test_a_digest_alone_is_not_enough_where_a_key_is_pinned_nor_a_signature_without_the_digest(
    launcher: Any, shop: Shop, minisign: Callable[[], Any]
) -> None:
    ours = minisign()
    file = shop.offer("disk", ours.public)
    file.write_bytes(bytes(4095) + b"x")
    ours.sign(file)
    done = launcher("image", "pull", "sigil")
    assert done.returncode == 1
    assert "its SHA-256 is" in done.stderr


@pytest.mark.parametrize("name", ["disk.raw", "image.json"])
def test_nothing_is_trusted_at_first_sight(
    launcher: Any, shop: Shop, world: Any, tmp_path: Path, name: str
) -> None:
    """There is no option that takes what comes, and remembers it: a manifest's digest is shown, and who has
    it from its publisher too says it."""
    shop.offer("disk", "key")
    shop.catalog.unlink()
    del world.environment["KENAZ_CATALOG"]
    done = launcher("image", "pull", f"{shop.base}/{name}")
    assert done.returncode == 1
    digest = shop.sha256(shop.disk if name == "disk.raw" else shop.manifest)
    shown = f"if its publisher says the same, add --sha256 {digest}"
    assert (shown if name == "image.json" else "add --sha256 DIGEST") in done.stderr
    assert not list((tmp_path / "cache").rglob("*/sha256/*"))
    done = world.run(image=f"https://images.example.org/{name}", driver="qemu")
    assert done.returncode == 2
    assert "digest" in done.stderr
    assert launcher("image", "pull", f"{shop.base}/{name}", "--sha256", digest).returncode == 0


def test_an_offer_that_says_nothing_about_its_content_is_no_offer(launcher: Any, shop: Shop) -> None:
    for form in ("disk", "manifest"):
        shop.offer(form, "")
        document = json.loads(shop.catalog.read_text())
        offer = document["images"]["sigil"]["arch"]["x86_64"]
        place = offer["manifest"] if form == "manifest" else offer["parts"]["root"]
        del place["key"], place["sha256"]
        shop.catalog.write_text(json.dumps(document))
        done = launcher("image", "pull", "sigil")
        assert done.returncode == 2
        assert "sha256" in done.stderr
