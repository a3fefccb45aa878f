"""Fetching images from a server that goes wrong in every way that servers do."""

from __future__ import annotations

import base64
import hashlib
import lzma
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from kenaz_engine.images import download
from kenaz_engine.images.catalog import find_image
from kenaz_engine.images.ensure import Ensured, ensure
from kenaz_engine.images.errors import ImageError, ImageMissing, Untrusted
from kenaz_engine.images.manifest import Image
from kenaz_engine.images.store import Store
from kenaz_engine.images.transfer import Notice, Patience, Progress

PATIENCE = Patience(connect=5.0, window=20.0, least=32 << 10)
HASTY = Patience(connect=5.0, window=3.0, least=32 << 10)
ROOT = bytes(range(256)) * 12_000
SHA = hashlib.sha256(ROOT).hexdigest()


class Fetch:
    """Gets one file, `root`, that a catalog names, into a store of its own."""

    def __init__(self, cache: Path, catalog_of: Callable[[dict[str, Any]], Path]) -> None:
        self.cache = cache
        self.store = Store(cache / "images")
        self.catalog_of = catalog_of
        self.seen: list[Progress] = []
        self.notices: list[str] = []

    def publish(self, *urls: str, **changes: Any) -> None:
        root = {"urls": list(urls), "sha256": SHA, "size": len(ROOT), "format": "raw", **changes}
        place = {"parts": {"root": root}}
        self.catalog_of({"sigil": {"arch": {"x86_64": place}}})

    async def __call__(self, name: str = "sigil", **options: Any) -> Image:
        ensured = await self.ensure(name, **options)
        ensured.held.close()
        return ensured.image

    async def ensure(self, name: str = "sigil", **options: Any) -> Ensured:
        with trio.fail_after(30):
            return await ensure(
                name, "x86_64", self.cache, watch=self.watch, **{"patience": PATIENCE, **options}
            )

    def watch(self, seen: Progress | Notice) -> None:
        if isinstance(seen, Notice):
            self.notices.append(seen.text)
        else:
            self.seen.append(seen)

    async def refused(self, **options: Any) -> ImageError:
        with pytest.raises(ImageError) as caught:
            await self(**options)
        assert not isinstance(caught.value, ImageMissing)
        assert self.store.present() == []
        return caught.value

    @property
    def half(self) -> Path:
        """What was fetched before the end."""
        return self.store.part(SHA)

    def tidy(self) -> bool:
        """Whether nothing but the image is left."""
        places = (self.store.root / name for name in ("tmp", "locks", "quarantine"))
        return not [path for place in places for path in place.iterdir()]


@pytest.fixture
def fetch(tmp_path: Path, catalog_of: Callable[[dict[str, Any]], Path]) -> Fetch:
    return Fetch(tmp_path / "cache", catalog_of)


@pytest.fixture
def one(publisher: Any, fetch: Fetch) -> Any:
    """A publisher of that file."""
    publisher.files["/root"] = ROOT
    fetch.publish(publisher.url("root"))
    return publisher


async def test_a_file_comes_whole_with_its_progress(one: Any, fetch: Fetch) -> None:
    image = await fetch()
    assert image.root.read_bytes() == ROOT
    assert image.root == fetch.store.blob(SHA)
    assert image.root.stat().st_mode & 0o777 == 0o444
    assert fetch.seen[-1].done == fetch.seen[-1].total == len(ROOT)
    assert [seen.done for seen in fetch.seen] == sorted(seen.done for seen in fetch.seen)
    assert {seen.file for seen in fetch.seen} == {"root"}
    assert fetch.tidy()
    assert await fetch() == find_image("sigil", "x86_64", fetch.cache)
    assert len(one.log) == 1


async def test_a_broken_transfer_goes_on_where_it_stopped(one: Any, fetch: Fetch) -> None:
    one.faults["root"] = [{"drop": 1_000_000}, {"drop": 1_000_000}]
    assert (await fetch()).root.read_bytes() == ROOT
    first, second, third = one.asked("root")
    assert "range" not in first
    assert (second["range"], third["range"]) == ("bytes=1000000-", "bytes=2000000-")
    assert second["if-range"] == third["if-range"] == f'"{hashlib.sha256(ROOT).hexdigest()[:12]}"'
    assert len(fetch.notices) == 2


async def test_the_next_launcher_goes_on_too(one: Any, fetch: Fetch) -> None:
    one.etags = False
    one.faults["root"] = [{"drop": 1_000_000}, {"status": 404}]
    error = await fetch.refused()
    assert "status 404" in str(error)
    assert fetch.half.stat().st_size == 1_000_000
    assert (await fetch()).root.read_bytes() == ROOT
    assert one.asked("root")[-1]["range"] == "bytes=1000000-"
    assert one.asked("root")[-1]["if-range"] == "Tue, 24 Nov 2026 10:00:00 GMT"
    assert fetch.tidy()


async def test_a_server_without_ranges_is_asked_for_all(one: Any, fetch: Fetch) -> None:
    one.faults["root"] = [{"drop": 1_000_000}, {"plain": True}]
    assert (await fetch()).root.read_bytes() == ROOT


async def test_a_server_without_ranges_that_always_breaks_off_is_given_up(one: Any, fetch: Fetch) -> None:
    one.faults["root"] = [{"drop": 1_000_000, "plain": True}] * 5
    assert (await fetch.refused()).transient
    assert len(one.log) == 2


async def test_a_file_that_changes_in_the_middle_is_begun_anew(one: Any, fetch: Fetch) -> None:
    other = b"x" * len(ROOT)
    one.files["/root"] = other
    one.faults["root"] = [{"drop": 1_000_000}, {"change": ROOT}]
    assert (await fetch()).root.read_bytes() == ROOT
    assert "if-range" in one.asked("root")[1]


async def test_a_change_that_shows_only_in_the_digest_is_begun_anew_once(one: Any, fetch: Fetch) -> None:
    one.faults["root"] = [
        {"drop": 1_000_000, "content": b"x" * len(ROOT), "etag": '"same"'},
        {"etag": '"same"'},
    ]
    assert (await fetch()).root.read_bytes() == ROOT
    assert ["range" in headers for headers in one.asked("root")] == [False, True, False]


async def test_a_range_that_cannot_be_had_is_begun_anew(one: Any, fetch: Fetch) -> None:
    one.faults["root"] = [{"drop": 1_000_000}, {"status": 416}]
    assert (await fetch()).root.read_bytes() == ROOT
    assert "range" not in one.asked("root")[2]


async def test_a_range_of_another_file_is_not_taken(one: Any, fetch: Fetch) -> None:
    wrong = {"status": 206, "headers": {"Content-Range": "bytes 5-9/10"}}
    one.faults["root"] = [{"drop": 1_000_000}, wrong]
    assert (await fetch()).root.read_bytes() == ROOT


@pytest.mark.parametrize("status", [404, 403, 410, 501])
async def test_what_is_not_there_is_not_asked_for_again(one: Any, fetch: Fetch, status: int) -> None:
    one.faults["root"] = [{"status": status}] * 3
    error = await fetch.refused()
    assert (f"status {status}" in str(error), error.transient, len(one.log)) == (True, False, 1)


@pytest.mark.parametrize("status", [500, 502, 503, 504, 408])
async def test_a_server_in_trouble_is_worth_another_attempt_of_the_caller(
    one: Any, fetch: Fetch, status: int
) -> None:
    one.faults["root"] = [{"status": status}]
    error = await fetch.refused()
    assert (error.transient, len(one.log)) == (True, 1)
    assert (await fetch()).root.read_bytes() == ROOT


async def test_a_server_that_says_when_to_come_again_is_obeyed(
    one: Any, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    original = trio.sleep

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await original(0)

    monkeypatch.setattr(download.trio, "sleep", sleep)
    one.faults["root"] = [
        {"status": 429, "headers": {"Retry-After": "7"}},
        {"status": 503, "headers": {"Retry-After": "3"}},
    ]
    assert (await fetch()).root.read_bytes() == ROOT
    assert [seconds for seconds in slept if seconds > 1] == [7, 3]
    one.files["/root"] = ROOT


async def test_a_server_that_wants_a_long_wait_is_left_to_the_caller(one: Any, fetch: Fetch) -> None:
    one.faults["root"] = [{"status": 429, "headers": {"Retry-After": "3600"}}]
    assert (await fetch.refused()).transient


async def test_a_server_that_stalls_is_left(one: Any, fetch: Fetch) -> None:
    one.faults["root"] = [{"stall": 200_000}, {"stall": 0}]
    error = await fetch.refused(patience=HASTY)
    assert error.transient
    assert "stalled" in str(error) or "did not answer in time" in str(error)
    assert fetch.half.stat().st_size == 200_000
    assert (await fetch()).root.read_bytes() == ROOT


async def test_a_server_that_trickles_is_taken_for_stalled(one: Any, fetch: Fetch) -> None:
    one.faults["root"] = [{"trickle": 0.01}, {"stall": 0}]
    error = await fetch.refused(patience=HASTY)
    assert "stalled: less than 32768 bytes in 3 s" in " ".join([str(error), *fetch.notices])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"length": len(ROOT) + 1}, f"has {len(ROOT) + 1} bytes, and {len(ROOT)} are promised"),
        ({"content": ROOT[:-1]}, f"has {len(ROOT) - 1} bytes, and {len(ROOT)} are promised"),
        ({"content": b"x" * len(ROOT)}, f"and {SHA} is promised"),
        ({"status": 200, "headers": {"Content-Encoding": "gzip"}}, "packs it as gzip, unasked"),
    ],
)
async def test_what_is_not_what_was_promised_is_refused(
    one: Any, fetch: Fetch, fault: dict[str, Any], words: str
) -> None:
    one.faults["root"] = [fault] * 3
    error = await fetch.refused()
    assert words in str(error)
    assert not error.transient
    assert len(one.log) == 1
    assert isinstance(error, Untrusted) == (words.startswith("and"))


async def test_more_than_was_promised_is_not_read(one: Any, fetch: Fetch) -> None:
    one.files["/root"] = ROOT * 3
    one.faults["root"] = [{"length": len(ROOT)}]
    # The body is longer than its head says, so what is behind is no answer any more.
    assert (await fetch()).root.read_bytes() == ROOT


async def test_a_body_without_an_end_is_left(one: Any, fetch: Fetch) -> None:
    one.faults["root"] = [{"endless": 1 << 30}]
    error = await fetch.refused()
    assert f"has more than the {len(ROOT)} bytes that are promised" in str(error)
    with trio.fail_after(10):
        while not one.sent:
            await trio.sleep(0.01)
    assert one.sent < 64 << 20


async def test_another_mirror_takes_over_where_the_first_broke_off(
    one: Any, fetch: Fetch, publishers: Callable[..., Any]
) -> None:
    second = publishers()
    second.files["/copy"] = ROOT
    fetch.publish(one.url("root"), second.url("copy"))
    one.faults["root"] = [{"drop": 1_000_000}, {"status": 500}]
    assert (await fetch()).root.read_bytes() == ROOT
    assert [headers["range"] for headers in second.asked("copy")] == ["bytes=1000000-"]
    assert any("going on with" in notice for notice in fetch.notices)


async def test_a_mirror_with_something_else_is_passed_by(
    one: Any, fetch: Fetch, publishers: Callable[..., Any]
) -> None:
    evil = publishers()
    evil.files["/root"] = b"x" * len(ROOT)
    fetch.publish(evil.url("root"), "http://127.0.0.1:9/root", one.url("root"))
    assert (await fetch()).root.read_bytes() == ROOT
    assert "range" not in one.asked("root")[0]


async def test_when_all_mirrors_fail_each_says_why(one: Any, fetch: Fetch) -> None:
    fetch.publish(one.url("gone"), "http://127.0.0.1:9/root?token=secret")
    error = await fetch.refused()
    assert f"{one.url('gone')}: status 404; http://127.0.0.1:9/root: " in str(error)
    assert "secret" not in str(error)
    assert error.transient


async def test_redirects_are_followed_but_not_for_ever(one: Any, fetch: Fetch) -> None:
    fetch.publish(one.url("moved"))
    one.faults["moved"] = [{"status": 302, "headers": {"Location": "/root"}}]
    assert (await fetch()).root.read_bytes() == ROOT
    fetch.publish(one.url("circle"), sha256="0" * 64)
    one.faults["circle"] = [{"status": 307, "headers": {"Location": "/circle"}}] * 40
    with pytest.raises(ImageError, match="redirects") as caught:
        await fetch()
    assert not caught.value.transient


async def test_without_room_nothing_is_fetched(
    one: Any, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 1 << 20

    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: Full())
    error = await fetch.refused()
    assert "MiB are free" in str(error)
    assert "image prune" in error.hint
    assert one.log == []


async def test_a_cancelled_fetch_shows_nothing_and_can_go_on(one: Any, fetch: Fetch) -> None:
    one.faults["root"] = [{"stall": 1_500_000}]
    with trio.CancelScope() as scope:

        def stop(seen: Progress | Notice) -> None:
            if isinstance(seen, Progress) and seen.done >= 1_000_000:
                scope.cancel()

        await ensure("sigil", "x86_64", fetch.cache, watch=stop)
    assert scope.cancelled_caught
    assert fetch.store.present() == []
    assert fetch.half.stat().st_size >= 1_000_000
    assert (await fetch()).root.read_bytes() == ROOT


# --- packed, signed, in parts -------------------------------------------------------------------------------


async def test_a_packed_disk_is_kept_unpacked(publisher: Any, fetch: Fetch) -> None:
    packed = lzma.compress(ROOT)
    publisher.files["/root.xz"] = packed
    published = {
        "sha256": hashlib.sha256(packed).hexdigest(),
        "size": len(packed),
        "compression": "xz",
        "unpackedSize": len(ROOT),
    }
    fetch.publish(publisher.url("root.xz"), **published)
    assert (await fetch()).root == fetch.store.blob(SHA)
    assert await fetch()
    assert len(publisher.log) == 1
    assert fetch.tidy()
    # Another entry with the same packed file needs not fetch it again.
    fetch.publish(publisher.url("root.xz"), **published, urls=[publisher.url("elsewhere.xz")])
    assert await fetch()
    assert len(publisher.log) == 1


@pytest.mark.parametrize(
    ("content", "size", "words"),
    [
        (lzma.compress(ROOT)[:-9], len(ROOT), "cut short"),
        (lzma.compress(ROOT * 2), len(ROOT), "unpacks to more than"),
        (lzma.compress(ROOT), len(ROOT) + 1, "are promised"),
    ],
)
async def test_a_packed_disk_that_is_not_as_promised_is_refused(
    publisher: Any, fetch: Fetch, content: bytes, size: int, words: str
) -> None:
    publisher.files["/root.xz"] = content
    digest = hashlib.sha256(content).hexdigest()
    fetch.publish(
        publisher.url("root.xz"), sha256=digest, size=len(content), compression="xz", unpackedSize=size
    )
    error = await fetch.refused()
    assert words in str(error)
    assert isinstance(error, Untrusted)


class Signer:
    """A key of minisign's, and signatures by it; the format is minisign's own."""

    def __init__(self) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        self._private = Ed25519PrivateKey.generate()
        self._id = b"12345678"

    @property
    def key(self) -> str:
        public = self._private.public_key().public_bytes_raw()
        return base64.b64encode(b"Ed" + self._id + public).decode()

    def sign(self, content: bytes) -> bytes:
        signature = self._private.sign(hashlib.blake2b(content).digest())
        line = base64.b64encode(b"ED" + self._id + signature).decode()
        comment = "made by a test"
        whole = base64.b64encode(self._private.sign(signature + comment.encode())).decode()
        return f"untrusted comment: x\n{line}\ntrusted comment: {comment}\n{whole}\n".encode()


@pytest.fixture
def signer() -> Signer:
    return Signer()


async def test_a_signed_part_needs_its_signature(one: Any, fetch: Fetch, signer: Signer) -> None:
    fetch.publish(one.url("root"), key=signer.key)
    assert isinstance(error := await fetch.refused(), Untrusted)
    assert "status 404" in str(error)
    one.files["/root.minisig"] = Signer().sign(ROOT)
    assert isinstance(await fetch.refused(), Untrusted)
    one.faults["root.minisig"] = [{"status": 500}]
    assert (await fetch.refused()).transient
    one.files["/root.minisig"] = signer.sign(ROOT)
    assert (await fetch()).root.read_bytes() == ROOT


async def test_an_image_of_kernel_and_disk_comes_in_parts(publisher: Any, fetch: Fetch) -> None:
    kernel = b"kernel"
    publisher.files |= {"/root": ROOT, "/vmlinuz": kernel}
    parts = {
        "kernel": {
            "urls": [publisher.url("vmlinuz")],
            "sha256": hashlib.sha256(kernel).hexdigest(),
            "size": len(kernel),
        },
        "root": {"urls": [publisher.url("root")], "sha256": SHA, "size": len(ROOT), "format": "raw"},
    }
    place = {"tag": "7", "cmdline": "quiet", "parts": parts, "console": {"device": "ttyS0"}}
    fetch.catalog_of({"sigil": {"arch": {"x86_64": place}}})
    image = await fetch("sigil:7")
    assert image.kernel is not None
    assert (image.kernel.read_bytes(), image.initrd, image.cmdline) == (kernel, None, "quiet")
    assert (image.name, image.tag, image.console_device) == ("sigil", "7", "ttyS0")
    assert image.console_patterns
    # Another command line is another image, of the same files.
    place["cmdline"] = "loud"
    fetch.catalog_of({"sigil": {"arch": {"x86_64": place}}})
    assert (await fetch()).cmdline == "loud"
    assert len(publisher.log) == 2


# --- manifests, and what is newer ---------------------------------------------------------------------------


async def test_a_pinned_manifest_brings_its_parts(publisher: Any, fetch: Fetch) -> None:
    digest = publisher.put_image("a/")
    places = {"urls": [publisher.url("gone/image.json"), publisher.url("a/image.json")], "sha256": digest}
    fetch.catalog_of({"sigil": {"arch": {"x86_64": {"manifest": places}}}})
    image = await fetch()
    assert image.digest == f"sha256:{digest}"
    assert image.kernel is not None
    assert image.kernel.read_bytes() == b"k" * 600_000
    assert await fetch(f"sigil@sha256:{digest}") == image
    with pytest.raises(ImageMissing, match="offline, and image sigil:3 for x86_64 is not on"):
        await fetch("sigil:3", offline=True)
    publisher.put_image("a/", tag="3")
    with pytest.raises(Untrusted, match="is promised"):
        await Fetch(fetch.cache / "other", fetch.catalog_of)()


async def test_a_url_with_a_digest_is_a_reference(publisher: Any, fetch: Fetch) -> None:
    digest = publisher.put_image("a/")
    text = f"{publisher.url('a/image.json')}@sha256:{digest}"
    image = await fetch(text)
    assert image.digest == f"sha256:{digest}"
    assert await fetch(text, offline=True) == image
    # It takes nobody's name.
    with pytest.raises(ImageMissing):
        await fetch("demo")
    publisher.files["/root.raw"] = ROOT
    disk = await fetch(f"{publisher.url('root.raw')}@sha256:{SHA}")
    assert (disk.root.read_bytes(), disk.root_format, disk.kernel) == (ROOT, "raw", None)
    packed = lzma.compress(ROOT)
    publisher.files["/root.raw.xz"] = packed
    packed_disk = await fetch(f"{publisher.url('root.raw.xz')}@sha256:{hashlib.sha256(packed).hexdigest()}")
    assert packed_disk.root == disk.root


@pytest.fixture
def rolling(
    publishers: Callable[..., Any],
    fetch: Fetch,
    signer: Signer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Any:
    """A publisher with TLS of a signed image that changes, and a catalog that has its key."""
    authority = trustme.CA()
    context = authority_context(authority)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    publisher = publishers(context)
    release(publisher, signer, "1")
    write_catalog(fetch, publisher, signer, {"if-older-than": "1h"})
    return publisher


def authority_context(authority: trustme.CA, host: str = "localhost") -> Any:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(host).configure_cert(context)
    return context


def release(publisher: Any, signer: Signer, tag: str) -> None:
    publisher.put_image(tag=tag)
    publisher.files["/image.json.minisig"] = signer.sign(publisher.files["/image.json"])


def write_catalog(fetch: Fetch, publisher: Any, signer: Signer, refresh: Any) -> None:
    manifest = {"urls": [publisher.url("image.json")], "key": signer.key}
    fetch.catalog_of({"sigil": {"refresh": refresh, "arch": {"x86_64": {"manifest": manifest}}}})


def requests(publisher: Any) -> Counter[str]:
    counted = Counter(path for _, path, _ in publisher.log)
    publisher.log.clear()
    return counted


async def test_a_signed_manifest_is_asked_for_again_by_the_policy(
    rolling: Any, fetch: Fetch, signer: Signer
) -> None:
    assert (await fetch()).tag == "1"
    assert requests(rolling)["/image.json"] == 1
    release(rolling, signer, "2")
    assert (await fetch()).tag == "1"  # not an hour old
    assert not requests(rolling)
    write_catalog(fetch, rolling, signer, "never")
    assert (await fetch()).tag == "1"
    assert not requests(rolling)
    write_catalog(fetch, rolling, signer, "always")
    assert (await fetch()).tag == "2"
    assert requests(rolling) == {"/image.json": 1, "/image.json.minisig": 1}  # the parts are the same
    assert (await fetch()).tag == "2"
    assert requests(rolling) == {"/image.json": 1}  # 304
    write_catalog(fetch, rolling, signer, "never")
    release(rolling, signer, "3")
    assert (await fetch(ask=True)).tag == "3"
    ref = fetch.store.read_ref("sigil", "x86_64")
    assert [version.tag for version in ref.versions] == ["3", "2", "1"]
    assert (await fetch("sigil:1")).tag == "1"


async def test_an_endless_manifest_is_left(rolling: Any, fetch: Fetch) -> None:
    rolling.faults["image.json"] = [{"endless": 1 << 30}]
    with pytest.raises(ImageError, match="is longer than 1048576 bytes"):
        await fetch()


async def test_an_update_leaves_what_a_session_uses(rolling: Any, fetch: Fetch, signer: Signer) -> None:
    used = await fetch.ensure()
    before = used.image.root.read_bytes()
    rolling.put_image(tag="2", root=b"another root")
    rolling.files["/image.json.minisig"] = signer.sign(rolling.files["/image.json"])
    new = await fetch(ask=True)
    assert new.root != used.image.root
    assert used.image.root.read_bytes() == before
    used.held.close()


async def test_without_a_network_what_is_here_is_used_and_its_age_is_said(
    rolling: Any, fetch: Fetch, signer: Signer
) -> None:
    with pytest.raises(ImageMissing, match="offline, and image sigil for x86_64 is not on this machine"):
        await fetch(offline=True)
    await fetch()
    write_catalog(fetch, rolling, signer, "always")
    offline = await fetch.ensure(offline=True)
    offline.held.close()
    [note] = offline.notes
    assert re.fullmatch(r"offline: image sigil was last known to be current \d+ seconds ago", note)
    requests(rolling)
    rolling.faults["image.json"] = [{"status": 503}]
    down = await fetch.ensure()
    down.held.close()
    said = r"status 503: using what is here, last known to be current \d+ seconds ago"
    assert re.search(said, down.notes[0])


async def test_a_manifest_that_is_not_signed_right_stops_everything(
    rolling: Any, fetch: Fetch, signer: Signer
) -> None:
    await fetch()
    rolling.put_image(tag="evil")
    write_catalog(fetch, rolling, signer, "always")
    with pytest.raises(Untrusted, match="signature"):
        await fetch()
    del rolling.files["/image.json.minisig"]
    with pytest.raises(Untrusted):
        await fetch()
    # With another key in the catalog, what is here is not wanted any more.
    write_catalog(fetch, rolling, Signer(), "never")
    with pytest.raises(ImageMissing, match="is not what the catalog asks for"):
        await fetch(offline=True)


async def test_a_signed_manifest_is_not_followed_out_of_tls(
    rolling: Any, fetch: Fetch, signer: Signer, publisher: Any
) -> None:
    release(publisher, signer, "9")
    rolling.faults["image.json"] = [{"status": 302, "headers": {"Location": publisher.url("image.json")}}]
    with pytest.raises(Untrusted, match="only https: will do"):
        await fetch()


async def test_a_detour_out_of_tls_is_none_the_better(
    rolling: Any, fetch: Fetch, signer: Signer, publisher: Any
) -> None:
    rolling.files["/back"] = rolling.files["/image.json"]
    rolling.faults["image.json"] = [{"status": 302, "headers": {"Location": publisher.url("hop")}}]
    publisher.faults["hop"] = [{"status": 302, "headers": {"Location": rolling.url("back")}}]
    with pytest.raises(Untrusted, match="only https: will do"):
        await fetch()


# --- TLS and proxies ----------------------------------------------------------------------------------------


async def test_a_certificate_that_is_not_trusted_ends_it(
    publishers: Callable[..., Any], fetch: Fetch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority = trustme.CA()
    secure = publishers(authority_context(authority))
    secure.files["/root"] = ROOT
    fetch.publish(secure.url("root"))
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    error = await fetch.refused()
    assert "its certificate is not trusted" in str(error)
    assert not error.transient
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    assert (await fetch()).root.read_bytes() == ROOT


async def test_the_proxy_of_the_environment_is_used(
    publisher: Any, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.files["/root"] = ROOT
    fetch.publish("http://images.example.org/root")
    monkeypatch.setenv("http_proxy", publisher.base)
    monkeypatch.delenv("no_proxy", raising=False)
    assert (await fetch()).root.read_bytes() == ROOT
    assert publisher.asked("root")[0]["host"] == "images.example.org"


async def test_tls_goes_through_a_proxy_unseen(
    publishers: Callable[..., Any], fetch: Fetch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Over CONNECT; the certificate is the publisher's own, for a name that only the proxy can reach."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    secure = publishers(authority_context(authority, "images.example.org"))
    secure.files["/root"] = ROOT
    fetch.publish("https://images.example.org/root")
    asked: list[bytes] = []

    async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
        async for data in source:
            await sink.send_all(data)
        await sink.send_eof()

    async def serve(client: trio.SocketStream) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += await client.receive_some(1)
        asked.append(head.partition(b"\r\n")[0])
        server = await trio.open_tcp_stream("127.0.0.1", int(secure.base.rpartition(":")[2]))
        await client.send_all(b"HTTP/1.1 200 Connection established\r\n\r\n")
        async with client, server, trio.open_nursery() as both:
            both.start_soon(pump, client, server)
            both.start_soon(pump, server, client)

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{listener.socket.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        assert (await fetch()).root.read_bytes() == ROOT
        nursery.cancel_scope.cancel()
    assert asked == [b"CONNECT images.example.org:443 HTTP/1.1"]


async def test_a_proxy_that_cannot_be_is_told(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch.publish("http://images.example.org/root")
    monkeypatch.setenv("http_proxy", "gopher://nowhere")
    assert "the proxy" in str(await fetch.refused())
