"""Ranges and validators as a real server has them: nginx."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from kenaz_engine.images.documents import get_document
from kenaz_engine.images.download import Wanted, download, http_client
from kenaz_engine.images.errors import Untrusted
from kenaz_engine.images.transfer import Have, Patience, Progress

CONTENT = os.urandom(3_000_000)
CONFIG = """\
daemon off;
{user}
pid {base}/pid;
error_log {base}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {base}/tmp;
    proxy_temp_path {base}/tmp;
    fastcgi_temp_path {base}/tmp;
    uwsgi_temp_path {base}/tmp;
    scgi_temp_path {base}/tmp;
    server {{
        listen unix:{base}/nginx.sock;
        listen 127.0.0.1:{port};
        root {base}/www;
        location /slow/ {{ alias {base}/www/; limit_rate 1m; }}
        location /plain/ {{ alias {base}/www/; max_ranges 0; }}
    }}
}}
"""


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[str]:
    """The address of an nginx that serves `www`."""
    binary = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if binary is None:
        pytest.skip("needs nginx (apt-get install nginx-light)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "www").mkdir()
    (tmp_path / "www/root").write_bytes(CONTENT)
    # As root it would serve as somebody who may not read the test's directory.
    user = "user root;" if os.getuid() == 0 else ""
    (tmp_path / "conf").write_text(CONFIG.format(base=tmp_path, port=port, user=user))
    with subprocess.Popen([binary, "-p", tmp_path, "-c", tmp_path / "conf"]) as server:
        for _ in range(3000):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            try:
                server.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
            raise AssertionError((tmp_path / "error.log").read_text())
        yield f"http://127.0.0.1:{port}"
        server.terminate()


def wanted(*urls: str, content: bytes = CONTENT) -> Wanted:
    return Wanted("root", urls, hashlib.sha256(content).hexdigest(), len(content))


def quiet(seen: object) -> None:
    """A fetch that nobody watches."""


async def broken_off(path: Path, url: str) -> int:
    """Fetches until a megabyte is there, and leaves; how much is there."""
    with trio.CancelScope() as scope:

        def stop(seen: object) -> None:
            if isinstance(seen, Progress) and seen.done >= 1 << 20:
                scope.cancel()

        async with http_client(Patience()) as client:
            await download(client, wanted(url), path, Patience(), stop)
    assert scope.cancelled_caught
    return path.stat().st_size


async def test_a_transfer_goes_on(nginx: str, tmp_path: Path) -> None:
    part = tmp_path / "x.part"
    half = await broken_off(part, f"{nginx}/slow/root")
    assert 1 << 20 <= half < len(CONTENT)
    seen: list[int] = []

    def watch(progress: object) -> None:
        assert isinstance(progress, Progress)
        seen.append(progress.done)

    async with http_client(Patience()) as client:
        await download(client, wanted(f"{nginx}/slow/root"), part, Patience(), watch)
    assert seen[0] > half
    assert part.read_bytes() == CONTENT


async def test_a_file_that_has_changed_is_begun_anew(nginx: str, tmp_path: Path) -> None:
    part = tmp_path / "x.part"
    await broken_off(part, f"{nginx}/slow/root")
    other = os.urandom(len(CONTENT))
    (tmp_path / "www/root").write_bytes(other)
    os.utime(tmp_path / "www/root", (1_700_000_000, 1_700_000_000))
    async with http_client(Patience()) as client:
        await download(client, wanted(f"{nginx}/root", content=other), part, Patience(), quiet)
        assert part.read_bytes() == other
        with pytest.raises(Untrusted):
            await download(client, wanted(f"{nginx}/root"), part, Patience(), quiet)


async def test_a_location_without_ranges_is_asked_for_all(nginx: str, tmp_path: Path) -> None:
    part = tmp_path / "x.part"
    await broken_off(part, f"{nginx}/slow/root")
    async with http_client(Patience()) as client:
        await download(client, wanted(f"{nginx}/plain/root"), part, Patience(), quiet)
    assert part.read_bytes() == CONTENT


async def test_a_document_that_is_still_the_same_is_not_sent(nginx: str, tmp_path: Path) -> None:
    url = f"{nginx}/image.json"
    (tmp_path / "www/image.json").write_bytes(b"{}")
    async with http_client(Patience()) as client:
        first = await get_document(client, "image.json", (url,), 10, Patience(), quiet)
        assert first is not None
        assert (first.content, bool(first.etag), bool(first.modified)) == (b"{}", True, True)
        known = Have(0, url, first.etag, first.modified)
        assert await get_document(client, "image.json", (url,), 10, Patience(), quiet, known) is None
        (tmp_path / "www/image.json").write_bytes(b"{ }")
        second = await get_document(client, "image.json", (url,), 10, Patience(), quiet, known)
        assert second is not None
        assert second.content == b"{ }"
