"""Workbenches' builds: what the catalogs offer, and what is taken from a directory."""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kenaz_engine.images.builds import TO_BE_FETCHED, Build, ensure_build, find_build
from kenaz_engine.images.errors import ImageError, ImageMissing, Untrusted
from kenaz_engine.images.locks import in_use
from kenaz_engine.spec.faults import InvalidFile

CONTENT = b"a build".ljust(1024, b".")
SHA = hashlib.sha256(CONTENT).hexdigest()

Offer = Callable[..., None]


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Publishes content in a directory, and writes the catalog that has it as `2026.11`."""
    catalog = tmp_path / "catalog.yaml"
    monkeypatch.setenv("KENAZ_CATALOG", str(catalog))

    def write(content: bytes = CONTENT, arch: str = "any", **changes: Any) -> None:
        path = tmp_path / "published"
        path.write_bytes(content)
        file = {"urls": [path.as_uri()], "sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        artifacts = {"2026.11": {"arch": {arch: file | changes}}}
        document = {"apiVersion": "kenaz.dev/v1", "kind": "Catalog", "images": {}, "artifacts": artifacts}
        catalog.write_text(json.dumps(document))

    return write


async def take(cache: Path, **options: Any) -> Build:
    offered = find_build("2026.11", "x86_64", cache)
    assert offered is not None
    build, held = await ensure_build(offered, cache, watch=lambda _: None, **options)
    assert in_use(build.path)
    held.close()
    assert not in_use(build.path)
    return build


async def test_a_build_comes_once_and_is_then_here(offer: Offer, tmp_path: Path) -> None:
    offer()
    offered = find_build("2026.11", "x86_64", tmp_path)
    assert offered is not None
    assert offered.here is None
    assert offered.planned == Build("2026.11", TO_BE_FETCHED, f"sha256:{SHA}")
    build = await take(tmp_path)
    assert build.path.read_bytes() == CONTENT
    assert build.digest == f"sha256:{SHA}"
    (tmp_path / "published").unlink()
    assert await take(tmp_path, offline=True) == build
    found = find_build("2026.11", "x86_64", tmp_path)
    assert found is not None
    assert found.planned == found.here == build


async def test_a_packed_build_has_the_digest_of_what_the_guest_reads(offer: Offer, tmp_path: Path) -> None:
    offer(lzma.compress(CONTENT), compression="xz", unpackedSize=len(CONTENT))
    offered = find_build("2026.11", "x86_64", tmp_path)
    assert offered is not None
    assert offered.planned.digest == ""
    assert await take(tmp_path) == Build("2026.11", (await take(tmp_path)).path, f"sha256:{SHA}")


async def test_another_build_of_the_same_name_is_fetched(offer: Offer, tmp_path: Path) -> None:
    offer()
    await take(tmp_path)
    offer(b"another".ljust(512, b"."))
    assert (await take(tmp_path)).path.read_bytes().startswith(b"another")


async def test_a_build_whose_file_is_damaged_is_fetched_again(offer: Offer, tmp_path: Path) -> None:
    offer()
    (await take(tmp_path)).path.unlink()
    assert (await take(tmp_path)).path.read_bytes() == CONTENT


async def test_what_is_not_the_promised_build_is_refused(offer: Offer, tmp_path: Path) -> None:
    offer(sha256="0" * 64)
    with pytest.raises(Untrusted, match="its SHA-256 is"):
        await take(tmp_path)


async def test_a_build_is_whole_sectors(offer: Offer, tmp_path: Path) -> None:
    offer(b"x" * 513)
    with pytest.raises(ImageError, match="513 bytes, which are no whole sectors"):
        await take(tmp_path)


async def test_without_a_network_what_is_not_here_is_told(offer: Offer, tmp_path: Path) -> None:
    offer(urls=["https://images.example.org/build"])
    with pytest.raises(ImageMissing, match=r"offline, and the build 2026\.11 is not on this machine"):
        await take(tmp_path, offline=True)


async def test_a_build_that_others_prune_all_the_time_is_given_up(
    offer: Offer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(*_: object) -> None:
        raise FileNotFoundError

    offer()
    await take(tmp_path)
    monkeypatch.setattr("kenaz_engine.images.builds.hold", gone)
    with pytest.raises(ImageError, match="goes as fast as it comes") as caught:
        await take(tmp_path)
    assert caught.value.transient


def test_a_name_that_no_catalog_has_is_no_fault(offer: Offer, tmp_path: Path) -> None:
    offer()
    assert find_build("2026.12", "x86_64", tmp_path) is None


def test_a_build_for_another_architecture_is_told(offer: Offer, tmp_path: Path) -> None:
    offer(arch="aarch64")
    with pytest.raises(ImageMissing, match=r"no build 2026\.11 for x86_64") as caught:
        find_build("2026.11", "x86_64", tmp_path)
    assert caught.value.hint == "it is there for aarch64"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": None}, "sha256"),
        ({"compression": "xz"}, "nothing says how long the content may become"),
        ({"key": "RW"}, "the public key"),
    ],
)
def test_an_offer_that_promises_nothing_is_refused(
    offer: Offer, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    offer(**changes)
    with pytest.raises(InvalidFile, match=message):
        find_build("2026.11", "x86_64", tmp_path)
