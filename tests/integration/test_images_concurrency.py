"""Several launchers at one store: one downloads, the others wait; nobody waits for himself."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from kenaz_engine.images import locks
from kenaz_engine.images.ensure import ensure
from kenaz_engine.images.errors import ImageError
from kenaz_engine.images.locks import hold, in_use, try_lock, wait_lock
from kenaz_engine.images.policy import Kept
from kenaz_engine.images.store import Store
from kenaz_engine.images.tidy import remove_image

ROOT = bytes(range(256)) * 12_000
SHA = hashlib.sha256(ROOT).hexdigest()
PULL = [sys.executable, "-m", "kenaz_engine.cli.main", "image", "pull", "sigil", "--arch", "x86_64", "--json"]


@pytest.fixture
def cache(
    tmp_path: Path,
    publisher: Any,
    catalog_of: Callable[[dict[str, Any]], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    publisher.files["/root"] = ROOT
    root = {"urls": [publisher.url("root")], "sha256": SHA, "size": len(ROOT), "format": "raw"}
    catalog_of({"sigil": {"arch": {"x86_64": {"parts": {"root": root}}}}})
    monkeypatch.setenv("KENAZ_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def waits(child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if json.loads(line).get("waiting"):
            return
    raise AssertionError("it never waited")


def test_one_downloads_and_the_others_wait_with_progress(cache: Path, publisher: Any) -> None:
    gate = threading.Event()
    publisher.faults["root"] = [{"gate": (2_000_000, gate)}]
    first = subprocess.Popen(PULL, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert json.loads(first.stdout.readline())["done"] > 0
    others = [subprocess.Popen(PULL, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for other in others:
        waits(other)
    gate.set()
    for child in (first, *others):
        out, _ = child.communicate(timeout=60)
        assert json.loads(out.splitlines()[-1])["ok"] is True
        assert child.returncode == 0
    assert len(publisher.log) == 1


def test_who_waits_takes_over_from_one_that_was_killed(cache: Path, publisher: Any) -> None:
    gate = threading.Event()
    publisher.faults["root"] = [{"gate": (2_000_000, gate)}]
    first = subprocess.Popen(PULL, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert json.loads(first.stdout.readline())["done"] > 0
    other = subprocess.Popen(PULL, stdout=subprocess.PIPE, text=True)
    waits(other)
    first.kill()
    first.communicate()
    out, _ = other.communicate(timeout=60)
    gate.set()
    assert json.loads(out.splitlines()[-1])["ok"] is True
    assert publisher.asked("root")[1]["range"].startswith("bytes=")


async def test_tasks_of_one_process_share_a_download_and_do_not_wait_for_themselves(
    cache: Path, publisher: Any
) -> None:
    done: list[bytes] = []

    async def one() -> None:
        ensured = await ensure("sigil", "x86_64", cache, watch=lambda _: None)
        done.append(ensured.image.root.read_bytes())
        ensured.held.close()

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one)
    assert done == [ROOT] * 5
    assert len(publisher.log) == 1


async def test_who_waits_for_a_lock_can_be_cancelled(tmp_path: Path) -> None:
    lock = try_lock(tmp_path / "lock", create=True)
    assert lock is not None
    with trio.move_on_after(0.1) as scope:
        await wait_lock(tmp_path / "lock", create=True)
    assert scope.cancelled_caught
    lock.close(remove=True)
    with trio.fail_after(5):
        (await wait_lock(tmp_path / "lock", create=True)).close()


async def test_a_lock_on_a_file_that_lost_its_name_is_none(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = try_lock(path, create=True)
    assert first is not None
    async with trio.open_nursery() as nursery:
        got: list[Any] = []

        async def second() -> None:
            got.append(await wait_lock(path, create=True))

        nursery.start_soon(second)
        await trio.sleep(0.1)
        first.close(remove=True)
    assert in_use(path)
    assert try_lock(path, create=True) is None
    got[0].close()
    assert not in_use(path)


def test_a_file_that_loses_its_name_before_the_lock_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    original, replaced = locks._try, []

    def late(file: int, *, shared: bool) -> bool:
        if not replaced:
            replaced.append(path.unlink())
            path.touch()
        return original(file, shared=shared)

    monkeypatch.setattr(locks, "_try", late)
    lock = try_lock(path, create=True)
    assert lock is not None
    assert os.fstat(lock.file).st_ino == path.stat().st_ino
    lock.close()


async def test_what_is_held_is_not_removed_and_what_is_removed_is_not_held(cache: Path) -> None:
    ensured = await ensure("sigil", "x86_64", cache, watch=lambda _: None)
    store = Store.at(cache)
    [image] = store.kept(lambda version: False)
    assert isinstance(image, Kept)
    assert not await remove_image(store, image)
    assert not store.remove(SHA)
    assert ensured.image.root.read_bytes() == ROOT
    ensured.held.close()
    assert await remove_image(store, image)
    with pytest.raises(FileNotFoundError):
        await hold([ensured.image.root])


async def test_an_image_that_is_pruned_between_look_and_lock_comes_again(
    cache: Path, publisher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kenaz_engine.images import ensure as ensuring

    (await ensure("sigil", "x86_64", cache, watch=lambda _: None)).held.close()
    store = Store.at(cache)
    [image] = store.kept(lambda version: False)
    original, pruned = ensuring.hold, []

    async def late(paths: Any) -> Any:
        if not pruned:
            pruned.append(await remove_image(store, image))
        return await original(paths)

    monkeypatch.setattr(ensuring, "hold", late)
    ensured = await ensure("sigil", "x86_64", cache, watch=lambda _: None)
    assert pruned == [True]
    assert ensured.image.root.read_bytes() == ROOT
    assert len(publisher.log) == 2
    ensured.held.close()


# --- shared stores ------------------------------------------------------------------------------------------


async def test_a_store_that_everybody_can_write_to_is_refused(cache: Path) -> None:
    (await ensure("sigil", "x86_64", cache, watch=lambda _: None)).held.close()
    for path in (cache / "images", cache / "images/blobs/sha256"):
        mode = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode | 0o1002)
        with pytest.raises(ImageError, match="everybody can write to"):
            Store.at(cache)
        path.chmod(mode)
    Store.at(cache)


def test_a_store_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/VERSION").write_text("kenaz image store 99\n")
    with pytest.raises(ImageError, match="says 'kenaz image store 99'"):
        Store.at(tmp_path)


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that others may read: those of pytest are closed to them."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.only_where(os.geteuid() == 0)
async def test_another_user_reads_a_store_that_he_may_not_write_to(cache: Path, open_place: Path) -> None:
    cache = open_place / "cache"
    (await ensure("sigil", "x86_64", cache, watch=lambda _: None)).held.close()
    script = (
        "import os, sys, trio\n"
        "from functools import partial\n"
        "from kenaz_engine.images.ensure import ensure\n"
        "from pathlib import Path\n"
        "import kenaz_engine.images.fetch, kenaz_engine.images.diskfile, httpx\n"
        "import kenaz_engine.images.catalog as catalog\n"
        "known = catalog.catalog()\n"
        "catalog.catalog = lambda: known\n"
        # From here on as nobody, who may not read where this code lies.
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "seen = partial(ensure, watch=lambda _: None)\n"
        "e = trio.run(seen, 'sigil', 'x86_64', Path(sys.argv[1]))\n"
        "print(e.image.digest)\n"
        "try: trio.run(partial(seen, ask=True), sys.argv[2], 'x86_64', Path(sys.argv[1]))\n"
        "except Exception as error: print(error)\n"
    )
    disk = open_place / "disk.raw"
    disk.write_bytes(bytes(4096))
    other = f"{disk.as_uri()}@sha256:{hashlib.sha256(bytes(4096)).hexdigest()}"
    command = [sys.executable, "-c", script, str(cache), other]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    digest, refused = done.stdout.decode().splitlines()
    assert digest.startswith("sha256:")
    assert refused.startswith("you may not write to")
