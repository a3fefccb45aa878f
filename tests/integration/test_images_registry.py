"""A registry that lets everybody read is a place for files: docs/decisions/0014-oci-registries.md."""

from __future__ import annotations

import hashlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kenaz_engine.images.ensure import ensure
from kenaz_engine.images.errors import Untrusted
from kenaz_engine.images.manifest import Image

pytestmark = pytest.mark.skipif(shutil.which("docker-registry") is None, reason="needs docker-registry")

DISK = bytes(range(256)) * 40_000
SHA = hashlib.sha256(DISK).hexdigest()
CONFIG = """\
version: 0.1
storage: {{filesystem: {{rootdirectory: {directory}}}}}
http: {{addr: "127.0.0.1:{port}"}}
log: {{level: error, accesslog: {{disabled: true}}}}
"""


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """The URL of a registry of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "registry.yaml"
    config.write_text(CONFIG.format(directory=tmp_path / "registry", port=port))
    with subprocess.Popen(["docker-registry", "serve", config], stderr=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}/v2/"
            deadline = time.monotonic() + 30
            while True:
                try:
                    httpx.get(url).raise_for_status()
                    break
                except httpx.TransportError:
                    assert time.monotonic() < deadline
                    assert process.poll() is None
                    time.sleep(0.02)
            yield url
        finally:
            process.terminate()


def push(registry: str, name: str, content: bytes) -> str:
    """As a client does it: where to, then the blob. Returns the blob's URL."""
    begun = httpx.post(f"{registry}{name}/blobs/uploads/", timeout=60)
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    where = httpx.URL(begun.headers["location"]).copy_merge_params({"digest": digest})
    put = httpx.put(where, content=content, timeout=60)
    assert put.status_code == 201
    return f"{registry}{name}/blobs/{digest}"


@pytest.fixture
def pull(tmp_path: Path, catalog_of: Callable[[dict[str, Any]], Path]) -> Callable[..., Any]:
    async def pull(url: str) -> Image:
        root = {"urls": [url], "sha256": SHA, "size": len(DISK), "format": "raw"}
        catalog_of({"sigil": {"arch": {"x86_64": {"parts": {"root": root}}}}})
        ensured = await ensure("sigil", "x86_64", tmp_path / "cache", watch=lambda _: None)
        ensured.held.close()
        return ensured.image

    return pull


async def test_a_blob_is_a_mirror_with_ranges(registry: str, tmp_path: Path, pull: Any) -> None:
    url = push(registry, "sigil/disk", DISK)
    # Another launcher has fetched half of it.
    half = tmp_path / "cache/images/tmp" / f"{SHA}.part"
    half.parent.mkdir(parents=True)
    half.write_bytes(DISK[:5_000_000])
    image = await pull(url)
    assert image.root.read_bytes() == DISK


async def test_a_blob_that_is_another_is_refused(registry: str, pull: Any) -> None:
    with pytest.raises(Untrusted, match=r"and .* is promised"):
        await pull(push(registry, "sigil/disk", DISK[::-1]))
