"""A workbench's build from a catalog, through fetch and verification, into a real guest that looks at it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kenaz_engine.images.catalog import default_cache, find_image

Build = dict[str, Any]


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A build, as it is before it is packed for its way."""
    tree, path = tmp_path / "tree", tmp_path / "build.erofs"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin/workbench").write_text("#!/bin/sh\necho a workbench\n")
    (tree / "lib").mkdir()
    (tree / "lib/data").write_bytes(bytes(100_000))
    subprocess.run(["mkfs.erofs", path, tree], check=True, capture_output=True)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def demo(world: Any, tmp_path: Path, qemu: str) -> str:
    """The demo image's manifest outside of the store, for which the test then has one of its own."""
    image = find_image("demo", "x86_64", default_cache())
    assert image.manifest is not None
    files = json.loads(image.manifest.read_bytes())["parts"]
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/image.json").symlink_to(image.manifest)
    for name, part in image.parts.items():
        (tmp_path / "demo" / files[name]["file"]).symlink_to(part.path)
    world.environment["KENAZ_CACHE_DIR"] = str(tmp_path / "cache")
    return str(tmp_path / "demo/image.json")


def catalog(world: Any, tmp_path: Path, build: Build | None) -> None:
    """The user's catalog, in which there is that build."""
    artifacts = {"2026.11": {"arch": {"any": build}}} if build else {}
    path = tmp_path / "catalog.yaml"
    document = {"apiVersion": "kenaz.dev/v1", "kind": "Catalog", "images": {}, "artifacts": artifacts}
    path.write_text(json.dumps(document))
    world.environment["KENAZ_CATALOG"] = str(path)


def offered(packed: Path, base: str, unpacked: Path, **more: Any) -> Build:
    return {
        "urls": [f"{base}/{packed.name}"],
        "sha256": digest(packed),
        "size": packed.stat().st_size,
        "compression": "xz",
        "unpackedSize": unpacked.stat().st_size,
        **more,
    }


def test_a_signed_and_packed_build_reaches_the_guest_as_it_was(
    world: Any,
    demo: str,
    tmp_path: Path,
    published: tuple[Path, str],
    build: Path,
    minisign: Callable[[], Any],
) -> None:
    directory, base = published
    packed = directory / "build.erofs.xz"
    subprocess.run(f"xz -c {build} > {packed}", shell=True, check=True)
    signer = minisign()
    signer.sign(packed)
    catalog(world, tmp_path, offered(packed, base, build, key=signer.public))
    options = {"driver": "qemu", "image": demo, "behaviour": "workbench", "workbench.build": "2026.11"}
    done = world.run("--session-id", "s1", **options)
    told = f"sha256:{digest(build)}, as promised, read-only, holds bin/workbench, lib/data"
    assert f"build 2026.11: {build.stat().st_size} bytes, {told}" in done.stdout
    assert done.returncode == 0
    [intent] = [
        r["intent"] for r in world.records("s1") if r["kind"] == "intent" and r["resource"] == "image"
    ]
    assert intent["build"] == f"sha256:{digest(build)}"
    argv = next(r["intent"]["argv"] for r in world.records("s1") if r.get("resource") == "vm")
    [drive] = [word for word in argv if "id=KENAZWB" in word]
    assert drive.endswith("readonly=on")
    # It is here now: the next session needs no publisher, and what it is given is the same.
    shutil.rmtree(directory)
    planned = json.loads(world.plan("--json", **options).stdout)
    assert planned["build"] == {"name": "2026.11", "digest": f"sha256:{digest(build)}"}


@pytest.mark.parametrize("signed", ["not at all", "by another", "something else"])
def test_a_build_that_is_not_signed_right_stops_the_session(
    world: Any,
    demo: str,
    tmp_path: Path,
    published: tuple[Path, str],
    build: Path,
    minisign: Callable[[], Any],
    signed: str,
) -> None:
    directory, base = published
    packed = directory / "build.erofs.xz"
    subprocess.run(f"xz -c {build} > {packed}", shell=True, check=True)
    signer, another = minisign(), tmp_path / "another"
    if signed == "by another":
        minisign().sign(packed)
    elif signed == "something else":
        another.write_bytes(b"another build")
        signer.sign(another)
        Path(f"{another}.minisig").rename(f"{packed}.minisig")
    catalog(world, tmp_path, offered(packed, base, build, key=signer.public))
    options = {"driver": "qemu", "image": demo, "workbench.build": "2026.11"}
    done = world.run("--session-id", "s1", **options)
    assert done.returncode == 1
    assert "failed: image could not be had: build.erofs.xz: " in done.stdout
    assert "vm" not in {record.get("resource") for record in world.records("s1")}


def test_a_build_that_no_catalog_has_is_a_name(world: Any, tmp_path: Path) -> None:
    catalog(world, tmp_path, None)
    done = world.run(behaviour="workbench", **{"workbench.build": "2026.12"})
    assert "no build is attached for 2026.12" in done.stdout


def test_a_driver_without_machines_says_that_it_attaches_none(
    world: Any, tmp_path: Path, published: tuple[Path, str], build: Path
) -> None:
    directory, base = published
    shutil.copy(build, directory)
    plain = offered(build, base, build)
    del plain["compression"], plain["unpackedSize"]
    catalog(world, tmp_path, plain)
    done = world.run(behaviour="workbench", **{"workbench.build": "2026.11"})
    assert "the driver process attaches no build: the guest is told its name and digest only" in done.stdout
    assert "no build is attached for 2026.11" in done.stdout


def test_another_architecture_and_no_network_are_told_before_anything_is_made(
    world: Any, demo: str, tmp_path: Path, build: Path
) -> None:
    away = offered(build, "https://images.example.org", build)
    catalog(world, tmp_path, away)
    options = {"driver": "qemu", "image": demo, "workbench.build": "2026.11"}
    done = world.run("--offline", **options)
    assert done.returncode == 3
    assert "offline, and the build 2026.11 is not on this machine" in done.stderr
    path = Path(world.environment["KENAZ_CATALOG"])
    path.write_text(path.read_text().replace('"any"', '"aarch64"'))
    done = world.run(**options, **{"machine.arch": "x86_64"})
    assert done.returncode == 3
    assert "there is no build 2026.11 for x86_64 (it is there for aarch64)" in done.stderr.replace(
        "; try: ", " ("
    )
    assert not world.state.exists() or not list(world.state.glob("sessions/*"))
