"""A publisher of images: a real HTTP server that can be told to go wrong, request by request. And programs in
Go, built from the directories beside this file."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from kenaz_engine.channel.connection import Connection
from kenaz_engine.channel.framing import LengthPrefixed

Sets = dict[str, Any]
Told = tuple[Sets, list[Sets]]

PARTS = {"kernel": b"k" * 600_000, "initrd": b"initrd", "root": bytes(range(256)) * 12_000}


class Publisher:
    """Serves `files` by path, with ranges and validators as RFC 9110 has them.

    `faults` are taken one for each request of a path, before anything else; each is a mapping with some of:
    `status` and `headers` (an answer without a file), `drop` (bytes after which the connection ends), `stall`
    (bytes after which nothing comes until the end of the test), `trickle` (seconds between bytes), `plain`
    (no range is known), `content` (another body), `length` (another Content-Length), `change` (a new content
    for the path, before this answer), `gate` (bytes, and an event before which no more come), `endless`
    (the content again and again, without a length, up to so many bytes; `sent` says how many went), `etag`.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Sets]] = {}
        self.log: list[tuple[str, str, dict[str, str]]] = []
        self.etags = True
        self.sent = 0
        self.over = threading.Event()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self.base = f"{'https' if tls else 'http'}://{'localhost' if tls else '127.0.0.1'}:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def url(self, path: str) -> str:
        return f"{self.base}/{path}"

    def asked(self, path: str) -> list[dict[str, str]]:
        """The headers of each request for a path."""
        return [headers for _, asked, headers in self.log if asked == f"/{path}"]

    def put_image(self, folder: str = "", *, name: str = "demo", tag: str = "2", **parts: bytes) -> str:
        """Publishes an image; the digest of its manifest."""
        contents = {**PARTS, **parts}
        listed = {
            part: {"file": part, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for part, content in contents.items()
        }
        document = {
            "schema": 1,
            "name": name,
            "tag": tag,
            "arch": "x86_64",
            "cmdline": "",
            "console": {"device": "ttyS0", "patterns": []},
            "parts": listed | {"root": listed["root"] | {"format": "raw"}},
        }
        manifest = json.dumps(document).encode()
        for part, content in {**contents, "image.json": manifest}.items():
            self.files[f"/{folder}{part}"] = content
        return hashlib.sha256(manifest).hexdigest()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        publisher = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                with contextlib.suppress(OSError):
                    publisher._answer(self, body=True)

            def do_HEAD(self) -> None:
                with contextlib.suppress(OSError):
                    publisher._answer(self, body=False)

        return Handler

    def _answer(self, handler: http.server.BaseHTTPRequestHandler, *, body: bool) -> None:
        path = handler.path
        if "://" in path:  # asked as a proxy
            path = "/" + path.split("/", 3)[3]
        headers = {name.lower(): value for name, value in handler.headers.items()}
        self.log.append((handler.command, path, headers))
        waiting = self.faults.get(path.lstrip("/"), [])
        fault = waiting.pop(0) if waiting and body else {}
        if "change" in fault:
            self.files[path] = fault["change"]
        content = self.files.get(path)
        if "status" in fault or content is None:
            self._head(handler, fault.get("status", 404), {"Content-Length": "0", **fault.get("headers", {})})
            return
        etag = fault.get("etag", f'"{hashlib.sha256(content).hexdigest()[:12]}"')
        sent = {"ETag": etag} if self.etags else {"Last-Modified": "Tue, 24 Nov 2026 10:00:00 GMT"}
        validator = next(iter(sent.values()))
        same = headers.get("if-none-match", headers.get("if-modified-since")) == validator
        if same:
            self._head(handler, 304, sent)
            return
        start, status = 0, 200
        wanted = headers.get("range", "")
        if wanted and not fault.get("plain") and headers.get("if-range", validator) == validator:
            start, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
            if start >= len(content):
                self._head(handler, 416, {"Content-Length": "0", "Content-Range": f"bytes */{len(content)}"})
                return
            sent["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        out = fault.get("content", content)[start:]
        length = {} if "endless" in fault else {"Content-Length": str(fault.get("length", len(out)))}
        handler.close_connection = not length
        self._head(handler, status, {**sent, **length})
        if not body:
            return
        if "endless" in fault:
            sent = 0
            try:
                while sent < fault["endless"]:
                    sent += handler.wfile.write(out)
            finally:
                self.sent = sent
            return
        if "gate" in fault:
            middle, gate = fault["gate"]
            handler.wfile.write(out[:middle])
            gate.wait(60)
            handler.wfile.write(out[middle:])
            return
        if "drop" in fault or "stall" in fault:
            handler.wfile.write(out[: fault.get("drop", fault.get("stall"))])
            handler.wfile.flush()
            if "stall" in fault:
                self.over.wait()
            handler.close_connection = True
            return
        if "trickle" in fault:
            for byte in out:
                handler.wfile.write(bytes([byte]))
                if self.over.wait(fault["trickle"]):
                    break
            return
        handler.wfile.write(out)
        if "length" in fault:
            handler.close_connection = True

    @staticmethod
    def _head(handler: http.server.BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    """A publisher over HTTP."""
    made = Publisher()
    yield made
    made.close()


@pytest.fixture
def publishers() -> Iterator[Callable[..., Publisher]]:
    """Makes publishers, with TLS if a context is given."""
    made: list[Publisher] = []

    def make(tls: ssl.SSLContext | None = None) -> Publisher:
        made.append(Publisher(tls))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def catalog_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Sets], Path]:
    """Makes the user's catalog, with these images."""

    def write(images: Sets) -> Path:
        path = tmp_path / "catalog.yaml"
        path.write_text(json.dumps({"apiVersion": "kenaz.dev/v1", "kind": "Catalog", "images": images}))
        monkeypatch.setenv("KENAZ_CATALOG", str(path))
        return path

    return write


@pytest.fixture
def with_harness(tmp_path: Path) -> Callable[..., Awaitable[Told]]:
    """Runs a session of that file whose harness, at its own end of a connection, plays; the session's result,
    and what else it told as JSON."""

    async def run(
        spec: Path, sets: Sequence[str], play: Callable[[Connection], Awaitable[None]], *, seconds: float
    ) -> Told:
        path = tmp_path / "harness"
        listening = trio.socket.socket(trio.socket.AF_UNIX)
        await listening.bind(str(path))
        listening.listen()
        words = [word for value in sets for word in ("--set", value)]
        program = [sys.executable, "-m", "kenaz_engine.cli.main", "run", str(spec), "--json"]

        dialled = trio.CancelScope()

        async def serve() -> None:
            with listening, dialled:
                connected, _ = await listening.accept()
            if dialled.cancelled_caught:
                return
            connection = Connection(trio.SocketStream(connected), LengthPrefixed(), queue=1 << 20, write=10)
            try:
                await play(connection)
            finally:
                await connection.aclose()

        with trio.fail_after(seconds):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve)
                ran = await trio.run_process(
                    [*program, "--harness", f"unix:{path}", *words],
                    env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},
                    capture_stdout=True,
                    check=False,
                )
                dialled.cancel()  # it may never have come so far
        lines = [json.loads(line) for line in ran.stdout.splitlines()]
        return lines[-1], lines[:-1]

    return run


@pytest.fixture(scope="session")
def go() -> Callable[[str, str], None]:
    """Runs `go` with some words in one of those directories. No network, no C."""
    binary = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if binary is None:
        pytest.skip("needs Go (Debian: golang-go)")
    environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOPROXY": "off", "GOFLAGS": ""}

    def run(directory: str, words: str) -> None:
        where = Path(__file__).parent / directory
        done = subprocess.run(
            [binary, *words.split()], cwd=where, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return run


@pytest.fixture(scope="session")
def go_program(
    go: Callable[[str, str], None], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Builds the program of a directory, static; its path."""
    built: dict[str, Path] = {}

    def program(directory: str) -> Path:
        if directory not in built:
            path = tmp_path_factory.mktemp("go") / directory
            go(directory, f"build -trimpath -buildvcs=false -ldflags=-s -o {path} .")
            built[directory] = path
        return built[directory]

    return program
