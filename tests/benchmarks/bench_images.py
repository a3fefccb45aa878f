"""Images: verifying against `sha256sum`, fetching against `curl | sha256sum` on loopback, what an image that
is here costs a session's start, and making its disk against `qemu-img create`. Prints JSON.

Both sides of each comparison take turns, and the median counts, so that both see the same machine; of the
start, which is alone, the best of several fresh processes. Needs curl and qemu-img.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import socketserver
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import trio

from kenaz_engine.images.catalog import load_image, verify_image
from kenaz_engine.images.disks import create_disk
from kenaz_engine.images.ensure import ensure

ROUNDS = int(os.environ.get("KENAZ_BENCH_ROUNDS", "7"))
SIZE = 256 << 20
GIB = 1 << 30
BOUNDS = {"verify_ratio": 0.9, "download_ratio": 0.8}
LIMITS = {"cached_ms": 5.0, "overlay_extra_ms": 10.0}

CACHED = """
import sys, time, trio
import kenaz_engine.cli.run, kenaz_engine.spec.resolve, kenaz_engine.session.launch
from pathlib import Path
from kenaz_engine.images.catalog import default_cache, locate
from kenaz_engine.images.ensure import ensure
from kenaz_engine.session.directory import state_home
from kenaz_engine.spec.resolve import load_session
load_session(Path(sys.argv[1]).read_text(), sys.argv[1], environment={})
cache = Path(sys.argv[2])
# What a session does anyway, before it looks for its image.
state_home(), default_cache()

async def start():
    began = time.perf_counter()
    locate("bench", "x86_64", cache, now=time.time())
    ensured = await ensure("bench", "x86_64", cache, watch=lambda _: None)
    print((time.perf_counter() - began) * 1e3)
    ensured.held.close()

trio.run(start)
"""


class Cost(NamedTuple):
    """Seconds: by the clock, and of processors, ours and our children's."""

    wall: float
    cpu: float


def cost(act: Callable[[], object]) -> Cost:
    """What one call takes."""
    began, before = time.perf_counter(), os.times()
    act()
    return Cost(time.perf_counter() - began, sum(os.times()[:4]) - sum(before[:4]))


def medians(*acts: Callable[[], object]) -> list[Cost]:
    """The median of each, taken in turns; the first turn only warms up."""
    rounds = [[cost(act) for act in acts] for _ in range(ROUNDS + 1)][1:]
    columns = [[*zip(*column, strict=True)] for column in zip(*rounds, strict=True)]
    return [Cost(*map(statistics.median, column)) for column in columns]


def shell(command: str) -> Callable[[], object]:
    """Runs a line of shell."""
    return lambda: subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Hands files out by sendfile, so that the server is not what is measured."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def copyfile(self, source: Any, outputfile: Any) -> None:
        self.connection.sendfile(source)


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True


@contextmanager
def published(directory: Path) -> Iterator[str]:
    """Serves a directory from a process of its own; its URL."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.chdir(directory)
        server = Server(("127.0.0.1", 0), Handler)
        os.write(tell, str(server.server_address[1]).encode())
        os.close(tell)
        server.serve_forever()
    os.close(tell)
    port = os.read(ready, 16).decode()
    os.close(ready)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.kill(child, 15)
        os.waitpid(child, 0)


def publish(directory: Path) -> tuple[Path, str]:
    """An image of SIZE in the directory; its manifest, and that one's digest."""
    root = directory / "root"
    block = os.urandom(1 << 20)
    with root.open("wb") as file:
        for _ in range(SIZE >> 20):
            file.write(block)
    with root.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    manifest = directory / "image.json"
    part = {"file": "root", "size": SIZE, "sha256": digest, "format": "raw"}
    document = {"schema": 1, "name": "bench", "tag": "1", "arch": "x86_64", "cmdline": ""}
    document |= {"console": {"device": "", "patterns": []}, "parts": {"root": part}}
    manifest.write_text(json.dumps(document))
    return manifest, hashlib.sha256(manifest.read_bytes()).hexdigest()


def offered(catalog: Path, url: str, digest: str) -> None:
    """The catalog that has it."""
    arch = {"x86_64": {"manifest": {"urls": [url], "sha256": digest}}}
    document = {"apiVersion": "kenaz.dev/v1", "kind": "Catalog", "images": {"bench": {"arch": arch}}}
    catalog.write_text(json.dumps(document))
    os.environ["KENAZ_CATALOG"] = str(catalog)


def fetched(cache: Path) -> None:
    """Fetches it into a store that has nothing."""

    async def fetch() -> None:
        (await ensure("bench", "x86_64", cache, watch=lambda _: None)).held.close()

    subprocess.run(["rm", "-rf", cache], check=True)
    trio.run(fetch)


def overlay(path: Path, base: Path) -> None:
    """Our disk of 10 GiB."""
    path.unlink(missing_ok=True)
    trio.run(lambda: create_disk(path, "qcow2", base=base, base_format="raw", size=10 * GIB))


def compared(their_name: str, theirs: Cost, our_name: str, ours: Cost) -> dict[str, float]:
    """Both, and how much faster we are. On a busy machine, where whoever has more processes gets more of it,
    the ratio of processor time says more than that by the clock, which has the bound."""
    return {
        f"{their_name}_s": theirs.wall,
        f"{our_name}_s": ours.wall,
        f"{our_name}_ratio": theirs.wall / ours.wall,
        f"{our_name}_cpu_ratio": theirs.cpu / ours.cpu,
    }


def main() -> int:
    """Measures, prints, and returns 1 when a bound is not held."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    spec = Path(__file__).resolve().parents[2] / "specs" / "sessions" / "hello.yaml"
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        place, cache = Path(folder), Path(folder, "cache")
        (place / "published").mkdir()
        manifest, digest = publish(place / "published")
        image = load_image(manifest)

        theirs, ours = medians(shell(f"sha256sum {image.root}"), lambda: verify_image(image))
        found |= compared("sha256sum", theirs, "verify", ours)

        with published(place / "published") as url:
            offered(place / "catalog.yaml", f"{url}/image.json", digest)
            theirs, ours = medians(
                shell(f"curl -sf {url}/root | sha256sum"),
                lambda: fetched(cache),
            )
        found |= compared("curl", theirs, "download", ours)

        command = [sys.executable, "-c", CACHED, str(spec), str(cache)]
        times = [float(subprocess.check_output(command)) for _ in range(ROUNDS + 1)][1:]
        found["cached_ms"] = min(times)

        base = place / "base"
        with base.open("wb") as file:
            file.truncate(10 * GIB)
        disks = place / "theirs", place / "ours"
        create = f"qemu-img create -q -f qcow2 -F raw -b {base} {disks[0]} 10G"
        theirs, ours = medians(shell(create), lambda: overlay(disks[1], base))
        found |= {"qemu_img_ms": theirs.wall * 1e3, "overlay_ms": ours.wall * 1e3}
        found["overlay_extra_ms"] = (ours.wall - theirs.wall) * 1e3

    missed = [name for name, bound in BOUNDS.items() if found[name] < bound]
    missed += [name for name, limit in LIMITS.items() if found[name] > limit]
    figures = {name: round(value, 3) for name, value in found.items()}
    print(json.dumps({**figures, "rounds": ROUNDS, "bounds": BOUNDS | LIMITS, "missed": missed}, indent=2))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
