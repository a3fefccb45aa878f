"""Finding images, and what is said when there is none."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kenaz_engine.images.catalog import (
    catalog,
    default_cache,
    find_image,
    load_image,
    locate,
    verify_image,
)
from kenaz_engine.images.catalogfile import AtManifest
from kenaz_engine.images.errors import ImageError, ImageMissing
from kenaz_engine.images.fetch import Fetcher
from kenaz_engine.images.manifest import MAX_MANIFEST, parse_manifest
from kenaz_engine.images.store import Store
from kenaz_engine.images.transfer import Patience

PARTS = {"kernel": b"kernel", "initrd": b"initrd", "root": b"root" * 100}
MANIFEST: dict[str, Any] = {
    "schema": 1,
    "name": "demo",
    "tag": "1.0",
    "arch": "x86_64",
    "cmdline": "quiet",
    "console": {"device": "ttyS0", "patterns": [{"event": "guest.panic", "pattern": "Kernel panic.*"}]},
    "parts": {
        name: {"file": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in PARTS.items()
    },
}
MANIFEST["parts"]["root"]["format"] = "raw"


def put(directory: Path, manifest: dict[str, Any] = MANIFEST) -> Path:
    directory.mkdir(parents=True)
    for name, content in PARTS.items():
        (directory / name).write_bytes(content)
    path = directory / "image.json"
    path.write_text(json.dumps(manifest))
    return path


@pytest.fixture(autouse=True)
def own_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(os, "fsync", lambda file: None)


async def take(cache: Path, manifest: Path, how: str = "imported") -> None:
    """Imports it into the store of `cache`."""
    source = AtManifest((manifest.as_uri(),), hashlib.sha256(manifest.read_bytes()).hexdigest())
    async with Fetcher(Store.at(cache), Patience(), lambda _: None) as fetcher:
        _, held = await fetcher.image("", "", source, how=how)
        held.close()


async def test_an_image_is_found_by_name_tag_digest_and_path(tmp_path: Path) -> None:
    path = put(tmp_path / "there")
    await take(tmp_path, path)
    image = find_image("demo", "x86_64", tmp_path)
    blobs = tmp_path / "images/blobs/sha256"
    assert (image.name, image.tag, image.arch, image.cmdline) == ("demo", "1.0", "x86_64", "quiet")
    found = (image.kernel, image.initrd, image.root)
    assert found == tuple(blobs / hashlib.sha256(content).hexdigest() for content in PARTS.values())
    assert image.root_format == "raw"
    assert image.digest == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert image.manifest == blobs / image.digest.removeprefix("sha256:")
    assert image.console_device == "ttyS0"
    assert image.console_patterns == (("guest.panic", "Kernel panic.*"),)
    assert find_image("demo:1.0", "x86_64", tmp_path) == image
    assert find_image(f"demo@{image.digest}", "x86_64", tmp_path) == image
    in_place = find_image(str(path), "x86_64", tmp_path / "elsewhere")
    assert (in_place.digest, in_place.root) == (image.digest, path.with_name("root"))
    verify_image(image)


@pytest.mark.parametrize(
    ("reference", "arch", "message", "hint"),
    [
        ("demo", "aarch64", "image demo for aarch64 is not on this machine", "run `make image-aarch64`"),
        ("demo", "riscv64", "there is no image demo for riscv64", "it is there for x86_64, aarch64"),
        ("demmo", "x86_64", "there is no image demmo", "did you mean demo?"),
        ("zork", "x86_64", "there is no image zork", "known are: demo, sigilos"),
        ("demo:2.0", "x86_64", "image demo is here with tag 1.0, not 2.0", ""),
        ("/nowhere/image.json", "x86_64", "there is no /nowhere/image.json", ""),
        ("/nowhere/disk.raw", "x86_64", "there is no /nowhere/disk.raw", ""),
    ],
)
async def test_a_missing_image_is_told_with_the_mend(
    tmp_path: Path, reference: str, arch: str, message: str, hint: str
) -> None:
    await take(tmp_path, put(tmp_path / "there"))
    with pytest.raises(ImageMissing) as caught:
        find_image(reference, arch, tmp_path)
    assert (str(caught.value), caught.value.hint) == (message, hint)


async def test_another_digest_than_that_which_is_here_is_missing(tmp_path: Path) -> None:
    await take(tmp_path, put(tmp_path / "there"))
    with pytest.raises(ImageMissing, match="image demo is here as sha256:"):
        find_image(f"demo@sha256:{'0' * 64}", "x86_64", tmp_path)


@pytest.mark.parametrize("text", ["..", "", "DEMO", "demo:", "demo:-", "ftp://host/x", "https:///x"])
def test_what_is_no_reference_is_told(tmp_path: Path, text: str) -> None:
    with pytest.raises(ImageError, match=r"is not the name of an image|cannot be fetched"):
        find_image(text, "x86_64", tmp_path)


async def test_a_built_image_that_is_damaged_is_built_again_by_hand(tmp_path: Path) -> None:
    await take(tmp_path, put(tmp_path / "there"), how="built")
    find_image("demo", "x86_64", tmp_path).root.unlink()
    with pytest.raises(ImageMissing, match="No such file") as caught:
        find_image("demo", "x86_64", tmp_path)
    assert caught.value.hint == "run `make image`"


def test_a_url_needs_its_digest(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is not used without its digest"):
        find_image("https://host/image.json", "x86_64", tmp_path)


def test_a_path_is_relative_to_what_names_it(tmp_path: Path) -> None:
    put(tmp_path / "there")
    located = locate("./there/image.json", "x86_64", tmp_path, now=0.0, base=str(tmp_path))
    assert located.image is not None
    assert located.image.root == tmp_path / "there/root"


def test_a_disk_of_the_users_is_used_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "own.img").write_bytes(bytes(4096))
    image = find_image(str(tmp_path / "own.img"), "x86_64", tmp_path)
    assert (image.root, image.root_format, image.digest) == (tmp_path / "own.img", "raw", "")
    assert (image.kernel, image.initrd, image.manifest) == (None, None, None)
    verify_image(image)


async def test_a_part_of_the_store_that_is_gone_or_short_is_missing(tmp_path: Path) -> None:
    await take(tmp_path, put(tmp_path / "there"))
    root = find_image("demo", "x86_64", tmp_path).root
    root.chmod(0o644)
    root.write_bytes(b"short")
    with pytest.raises(ImageMissing, match="has 5 bytes, and the manifest says 400"):
        find_image("demo", "x86_64", tmp_path)
    root.unlink()
    with pytest.raises(ImageMissing, match="No such file"):
        find_image("demo", "x86_64", tmp_path)


def test_a_path_to_another_architecture_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "there")
    with pytest.raises(ImageMissing, match="is for x86_64, not for aarch64"):
        find_image(str(path), "aarch64", tmp_path)


def test_a_part_of_another_size_or_none_is_noticed_on_each_use(tmp_path: Path) -> None:
    path = put(tmp_path / "there")
    (tmp_path / "there/root").write_bytes(b"short")
    with pytest.raises(ImageError, match="has 5 bytes, and the manifest says 400"):
        load_image(path)
    (tmp_path / "there/root").unlink()
    with pytest.raises(ImageError, match="root: No such file"):
        load_image(path)


def test_a_part_of_the_right_size_and_other_content_is_noticed_by_verify(tmp_path: Path) -> None:
    image = load_image(put(tmp_path / "there"))
    image.initrd.write_bytes(b"INITRD")
    with pytest.raises(ImageError, match="initrd is not what the manifest says"):
        verify_image(image)


def test_a_manifest_that_cannot_be_read_or_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot be read: Is a directory"):
        load_image(tmp_path)
    path = tmp_path / "image.json"
    path.write_bytes(b" " * (MAX_MANIFEST + 1))
    with pytest.raises(ImageError, match="is longer than"):
        load_image(path)
    path.write_bytes(b"{}")
    with pytest.raises(ImageError, match="schema is missing"):
        load_image(path)


def set_at(*keys: Any, value: Any) -> Callable[[Any], None]:
    def mutate(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return mutate


def drop(*keys: Any) -> Callable[[Any], None]:
    def mutate(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return mutate


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (set_at("schema", value=2), "schema is 2, and this launcher reads 1"),
        (set_at("schema", value=True), "schema is missing, or not of type int"),
        (set_at("name", value="../x"), "name is not a plain name"),
        (set_at("arch", value=""), "arch is not a plain name"),
        (set_at("cmdline", value=None), "cmdline is missing, or not of type str"),
        (set_at("parts", value=[]), "parts is no object"),
        (set_at("parts", "initrd", value=None), "parts.initrd is no object"),
        (drop("parts", "kernel"), "parts.initrd is of no use without a kernel"),
        (set_at("tag", value="a b"), "tag is not a plain tag"),
        (set_at("parts", "kernel", "file", value="../kernel"), "parts.kernel.file is not a plain file name"),
        (set_at("parts", "kernel", "file", value="a/b"), "parts.kernel.file is not a plain file name"),
        (set_at("parts", "kernel", "size", value=-1), "parts.kernel.size is negative"),
        (set_at("parts", "kernel", "sha256", value="ab"), "parts.kernel.sha256 is not a SHA-256 digest"),
        (set_at("parts", "root", "format", value="vmdk"), "parts.root.format is none of qcow2, raw"),
        (set_at("console", "patterns", 0, "event", value="x"), "console.patterns[0].event is none of"),
        (set_at("console", "patterns", 0, "pattern", value="("), "console.patterns[0].pattern is no regular"),
        (set_at("console", "patterns", value=["x"]), "console.patterns[0] is no object"),
    ],
)
def test_a_wrong_field_is_named(mutate: Callable[[Any], None], message: str) -> None:
    manifest = copy.deepcopy(MANIFEST)
    mutate(manifest)
    with pytest.raises(ImageError) as caught:
        parse_manifest(json.dumps(manifest).encode(), Path("/images"))
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"[]"])
def test_what_is_no_manifest_at_all_is_refused(content: bytes) -> None:
    with pytest.raises(ImageError, match=r"image\.json"):
        parse_manifest(content, Path("/images"))


def test_the_cache_is_where_the_environment_or_the_platform_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KENAZ_CACHE_DIR", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("KENAZ_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache().name == "kenaz"


def test_the_shipped_catalog_knows_the_demo() -> None:
    assert {arch: offer.hint for arch, offer in catalog()["demo"].offers.items()} == {
        "x86_64": "run `make image`",
        "aarch64": "run `make image-aarch64`",
    }
