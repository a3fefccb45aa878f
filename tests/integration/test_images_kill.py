"""Launchers that are killed while they change the store: nothing false is seen, and the next one goes on."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from kenaz_engine.images.catalog import find_image
from kenaz_engine.images.ensure import ensure
from kenaz_engine.images.errors import ImageError
from kenaz_engine.images.steps import POINTS
from kenaz_engine.images.store import Store
from kenaz_engine.images.tidy import litter, sweep

KERNEL, ROOT = b"kernel" * 100, os.urandom(1 << 20) * 2
PACKED = lzma.compress(ROOT)

CHILD = """
import os, signal, sys, trio
from kenaz_engine.images import steps
from kenaz_engine.cli.main import main

point, nth, *argv = sys.argv[1:]
left = int(nth)

def reached(name):
    global left
    if name == point:
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

steps.reached = reached
sys.exit(main(argv))
"""

AT_FETCH = tuple(p for p in POINTS if p not in ("blob set aside", "blob removed"))


@pytest.fixture
def cache(
    tmp_path: Path,
    publisher: Any,
    catalog_of: Callable[[dict[str, Any]], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """An empty cache, and a catalog with an image of two parts, one of them packed."""
    publisher.files |= {"/kernel": KERNEL, "/root.xz": PACKED}

    def part(name: str, content: bytes) -> dict[str, Any]:
        url = publisher.url(name)
        return {"urls": [url], "sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}

    root = {**part("root.xz", PACKED), "compression": "xz", "unpackedSize": len(ROOT), "format": "raw"}
    parts = {"kernel": part("kernel", KERNEL), "root": root}
    catalog_of({"sigil": {"arch": {"x86_64": {"parts": parts}}}})
    monkeypatch.setenv("KENAZ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("KENAZ_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "cache"


def killed(point: str, nth: int, *argv: str) -> bool:
    """Runs the command and kills it the nth time that it comes to a point; False when it never came there."""
    command = [sys.executable, "-c", CHILD, point, str(nth), "image", *argv]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def consistent(cache: Path) -> None:
    """Nothing has a final name that it does not deserve."""
    store = Store.at(cache)
    for digest in store.present():
        assert hashlib.sha256(store.blob(digest).read_bytes()).hexdigest() == digest
    for name, arch in store.refs():
        for version in store.read_ref(name, arch).versions:
            store.load(version)


async def fetched(cache: Path) -> None:
    ensured = await ensure("sigil", "x86_64", cache, watch=lambda _: None)
    ensured.held.close()
    assert ensured.image.root.read_bytes() == ROOT
    assert ensured.image.kernel is not None
    assert ensured.image.kernel.read_bytes() == KERNEL
    store = Store.at(cache)
    left = [path for name in ("tmp", "quarantine") for path in (store.root / name).iterdir()]
    assert left == []
    for item in litter(store, store.kept(lambda version: False), time.time()):
        assert item.path.parent.name == "locks"
        assert sweep(store, item)
    assert not list((store.root / "locks").iterdir())
    assert len(store.present()) == 3


@pytest.mark.parametrize("point", AT_FETCH)
async def test_a_fetch_may_be_killed_at_any_point(cache: Path, point: str) -> None:
    assert killed(point, 1, "pull", "sigil", "--arch", "x86_64")
    consistent(cache)
    if point != "ref named":
        with pytest.raises(ImageError):
            find_image("sigil", "x86_64", cache)
    await fetched(cache)


@pytest.mark.slow
@pytest.mark.parametrize("nth", [2])
@pytest.mark.parametrize("point", AT_FETCH)
async def test_also_the_next_time_that_it_comes_there(cache: Path, point: str, nth: int) -> None:
    killed(point, nth, "pull", "sigil", "--arch", "x86_64")
    consistent(cache)
    await fetched(cache)


@pytest.mark.slow
async def test_a_fetch_may_be_killed_at_any_time(cache: Path, publisher: Any) -> None:
    publisher.faults["root.xz"] = [{"drop": len(PACKED) // 2}]
    command = [sys.executable, "-m", "kenaz_engine.cli.main", "image", "pull", "sigil", "--arch", "x86_64"]
    draw = random.Random(7)
    for _ in range(10):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Not to wait for something: any moment will do.
        await trio.sleep(draw.uniform(0.2, 1.2))
        child.kill()
        child.wait()
        consistent(cache)
    await fetched(cache)


@pytest.mark.parametrize("nth", [1, 2, 3])
async def test_a_removal_may_be_killed_at_any_point(cache: Path, nth: int) -> None:
    await fetched(cache)
    assert killed("blob removed", nth, "rm", "sigil", "--arch", "x86_64") == (nth < 3)
    consistent(cache)
    await fetched(cache)


async def test_a_removal_may_be_killed_when_the_name_is_gone(cache: Path) -> None:
    await fetched(cache)
    assert killed("blob removed", 1, "rm", "sigil", "--arch", "x86_64")
    assert not killed("", 1, "prune")
    assert Store.at(cache).present() == []


async def test_a_verification_may_be_killed_when_it_has_set_something_aside(cache: Path) -> None:
    await fetched(cache)
    blob = Store.at(cache).blob(hashlib.sha256(KERNEL).hexdigest())
    blob.chmod(0o644)
    blob.write_bytes(b"KERNEL" * 100)
    assert killed("blob set aside", 1, "verify", "sigil", "--arch", "x86_64")
    assert not blob.exists()
    assert not killed("", 1, "prune")
    await fetched(cache)


def test_every_point_is_one_where_something_is_killed() -> None:
    source = Path(__file__).parents[2] / "engine/kenaz_engine/images"
    text = "".join(path.read_text() for path in source.glob("*.py") if path.name != "steps.py")
    assert [point for point in POINTS if json.dumps(point) not in text] == []
