"""Sessions whose image has to come first, and images that sessions use."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kenaz_engine.images.catalog import default_cache, find_image

Message = dict[str, Any]
LAUNCHER_TIMEOUT = 120


class Publisher:
    """The demo image, published under another name at a server of its own."""

    def __init__(self, directory: Path, url: str, world: Any) -> None:
        self.world = world
        self.directory = directory
        directory.mkdir()
        image = find_image("demo", "x86_64", default_cache())
        assert image.manifest is not None
        content = image.manifest.read_bytes()
        (directory / "image.json").write_bytes(content)
        for name, part in json.loads(content)["parts"].items():
            shutil.copyfile(image.parts[name].path, directory / part["file"])
        manifest = {"urls": [f"{url}/image.json"], "sha256": hashlib.sha256(content).hexdigest()}
        document = {"apiVersion": "kenaz.dev/v1", "kind": "Catalog"}
        document["images"] = {"sigil": {"arch": {"x86_64": {"manifest": manifest}}}}
        catalog = directory.parent / "catalog.yaml"
        catalog.write_text(json.dumps(document))
        world.environment |= {
            "KENAZ_CACHE_DIR": str(directory.parent / "cache"),
            "KENAZ_CATALOG": str(catalog),
        }

    def image(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [self.world.command()[0], "image", *words]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=LAUNCHER_TIMEOUT,
            env=self.world.environment,
            check=False,
        )


@pytest.fixture
def publisher(world: Any, qemu: str, tmp_path: Path) -> Iterator[Publisher]:
    handler = partial(Quiet, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield Publisher(tmp_path / "www", f"http://127.0.0.1:{server.server_address[1]}", world)
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_session_fetches_its_image_holds_it_and_gives_it_back(publisher: Publisher, world: Any) -> None:
    offline = world.run("--offline", driver="qemu", image="sigil")
    assert offline.returncode == 3
    assert "offline, and image sigil for x86_64 is not on this machine" in offline.stderr
    running = world.start("--json", "--session-id", "user", driver="qemu", image="sigil", behaviour="mute")
    world.wait_for("user", "connecting")
    listed = json.loads(publisher.image("ls", "--json").stdout)
    assert [(item["name"], item["usedBy"]) for item in listed if item["digest"]] == [("sigil", ["user"])]
    refused = publisher.image("rm", "sigil")
    assert (refused.returncode, "is used by user" in refused.stderr) == (1, True)
    assert json.loads(publisher.image("prune", "--keep", "0", "--json").stdout)["images"] == []
    ending = [world.command()[0], "end", "user", "--abort"]
    assert subprocess.run(ending, env=world.environment, check=False).returncode == 0
    out, _ = running.communicate(timeout=LAUNCHER_TIMEOUT)
    lines = [json.loads(line) for line in out.splitlines()]
    progress = [line for line in lines if line["kind"] == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"]
    assert {"file", "rate", "remaining", "waiting"} <= progress[0].keys()
    assert lines[-1]["left"] == []
    # The second time it is here, also without a network; and then nobody uses it.
    shutil.rmtree(publisher.directory)
    again = world.run(
        "--offline", "--session-id", "again", driver="qemu", image="sigil", **{"timeouts.connecting": "100ms"}
    )
    assert "note: offline: image sigil is from" in again.stdout
    assert "connecting" in world.path("again")
    assert publisher.image("rm", "sigil").returncode == 0


def test_an_image_that_cannot_be_fetched_ends_the_session_by_its_declared_path(
    publisher: Publisher, world: Any
) -> None:
    (publisher.directory / "root.ext4").unlink()
    failed = world.run("--session-id", "poor", driver="qemu", image="sigil")
    assert failed.returncode == 1
    assert "image could not be had: root.ext4 could not be fetched: " in failed.stdout
    assert "status 404" in failed.stdout
    assert world.path("poor") == ["resolving", "releasing"]
    (publisher.directory / "root.ext4").write_bytes(b"not it")
    failed = world.run("--session-id", "poor", driver="qemu", image="sigil")
    assert "are promised" in failed.stdout
