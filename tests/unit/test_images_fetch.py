"""Downloads, from a real server on loopback and from files."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from kenaz_engine.images.catalog import find_image
from kenaz_engine.images.errors import ImageError
from kenaz_engine.images.fetch import download_image
from kenaz_engine.images.manifest import MAX_MANIFEST

PARTS = {"kernel": b"k" * 600_000, "initrd": b"", "root": b"root" * 1000}


def quiet(*_: object) -> None:
    """A report that nobody reads."""


class Source:
    """A directory with an image, and the URL of its manifest."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        for name, content in PARTS.items():
            (directory / name).write_bytes(content)
        self.document: dict[str, Any] = {
            "schema": 1,
            "name": "demo",
            "tag": "2",
            "arch": "x86_64",
            "cmdline": "",
            "console": {"device": "ttyS0", "patterns": []},
            "parts": {
                name: {"file": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                for name, content in PARTS.items()
            },
        }
        self.document["parts"]["root"]["format"] = "raw"
        self.write()
        self.base = directory.as_uri()

    def write(self) -> None:
        (self.directory / "image.json").write_text(json.dumps(self.document))

    @property
    def url(self) -> str:
        return f"{self.base}/image.json"

    @property
    def sha256(self) -> str:
        return hashlib.sha256((self.directory / "image.json").read_bytes()).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path / "source")


@pytest.fixture
def served(source: Source) -> Iterator[Source]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, directory=str(source.directory), **kwargs)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        source.base = f"http://127.0.0.1:{server.server_address[1]}"
        yield source
        server.shutdown()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "images").iterdir()) if cache.exists() else []


async def test_an_image_comes_over_http(served: Source, cache: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    def report(name: str, so_far: int, total: int) -> None:
        seen.append((name, so_far, total))

    image = await download_image(served.url, cache, sha256=served.sha256.upper(), report=report)
    assert image == find_image("demo:2", "x86_64", cache)
    assert image.kernel.read_bytes() == PARTS["kernel"]
    assert left_in(cache) == ["demo"]
    assert seen[-1] == ("root", 4000, 4000)
    assert [so_far for name, so_far, _ in seen if name == "kernel"][-1] == 600_000


async def test_an_image_comes_from_files_and_replaces_the_old_one(source: Source, cache: Path) -> None:
    await download_image(source.url, cache, sha256=None, report=quiet)
    source.document["tag"] = "3"
    source.write()
    image = await download_image(source.url, cache, sha256=source.sha256, report=quiet)
    assert image.tag == "3"
    assert left_in(cache) == ["demo"]


@pytest.mark.parametrize("url", ["ftp://host/image.json", "/a/path", "image.json"])
async def test_only_three_kinds_of_url_are_fetched(cache: Path, url: str) -> None:
    with pytest.raises(ImageError, match="cannot be fetched"):
        await download_image(url, cache, sha256="0" * 64, report=quiet)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_remote_manifest_needs_its_digest(cache: Path, scheme: str) -> None:
    with pytest.raises(ImageError, match="without the manifest's SHA-256"):
        await download_image(f"{scheme}://127.0.0.1/image.json", cache, sha256=None, report=quiet)
    assert left_in(cache) == []


async def test_another_manifest_is_refused(served: Source, cache: Path) -> None:
    with pytest.raises(ImageError, match="is not the manifest that was asked for"):
        await download_image(served.url, cache, sha256="0" * 64, report=quiet)
    assert left_in(cache) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"r" * 4000, "root is not what the manifest says: its SHA-256 differs"),
        (b"r" * 10, "root has 10 bytes, and the manifest says 4000"),
        (b"r" * 4001, "root has more bytes, and the manifest says 4000"),
    ],
)
async def test_a_part_that_is_not_the_promised_one_is_refused(
    served: Source, cache: Path, content: bytes, message: str
) -> None:
    (served.directory / "root").write_bytes(content)
    with pytest.raises(ImageError, match=message):
        await download_image(served.url, cache, sha256=served.sha256, report=quiet)
    assert left_in(cache) == []


async def test_a_missing_part_and_a_missing_file_are_told(served: Source, cache: Path) -> None:
    (served.directory / "root").unlink()
    with pytest.raises(ImageError, match=r"/root could not be fetched: status 404"):
        await download_image(served.url, cache, sha256=served.sha256, report=quiet)
    served.base = served.directory.as_uri()
    with pytest.raises(ImageError, match="No such file"):
        await download_image(served.url, cache, sha256=None, report=quiet)
    assert left_in(cache) == []


async def test_a_server_that_is_not_there_is_told(cache: Path) -> None:
    with pytest.raises(ImageError, match=r"could not be fetched: .*onnect"):
        await download_image("http://127.0.0.1:9/image.json", cache, sha256="0" * 64, report=quiet)
    assert left_in(cache) == []


async def test_a_part_outside_of_the_directory_is_refused(source: Source, cache: Path) -> None:
    source.document["parts"]["root"]["file"] = "../root"
    source.write()
    with pytest.raises(ImageError, match="not a plain file name"):
        await download_image(source.url, cache, sha256=None, report=quiet)
    assert left_in(cache) == []


async def test_an_endless_manifest_is_cut_short(source: Source, cache: Path) -> None:
    (source.directory / "image.json").write_bytes(b" " * (MAX_MANIFEST + 1))
    with pytest.raises(ImageError, match="no manifest"):
        await download_image(source.url, cache, sha256=None, report=quiet)
    assert left_in(cache) == []


async def test_a_cancelled_download_leaves_nothing(served: Source, cache: Path) -> None:
    with trio.CancelScope() as scope:

        def stop(*_: object) -> None:
            scope.cancel()

        await download_image(served.url, cache, sha256=served.sha256, report=stop)
    assert scope.cancelled_caught
    assert left_in(cache) == []
