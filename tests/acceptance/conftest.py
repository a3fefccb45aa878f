"""What tests of whole sessions share: a place of their own to run in, a real harness, and real machines."""

from __future__ import annotations

import http.server
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kenaz_engine.images.catalog import default_cache, find_image
from kenaz_engine.images.errors import ImageError

ROOT = Path(__file__).parents[2]
HELLO = str(ROOT / "specs/sessions/hello.yaml")
LAUNCHER = str(Path(sys.executable).with_name("kenaz-launcher"))
BOUND = 300
"""Seconds after which a test has failed, whatever it waits for."""

Message = dict[str, Any]


class World:
    """A state directory of its own, and a look at what is on this host besides.

    Options of `command`, `run` and `start` are values of the spec; the driver is `process` unless they name
    another. `spec` is the session's file, hello.yaml unless given; `stdin` is fed to `run`.
    """

    def __init__(self, base: Path, runtime: Path) -> None:
        self.state = base / "s"
        self.runtime = runtime
        self.environment = {
            **os.environ,
            "KENAZ_STATE_DIR": str(self.state),
            "XDG_RUNTIME_DIR": str(self.runtime),
            "NO_COLOR": "1",
        }

    def command(self, *words: str, spec: str = HELLO, behaviour: str = "", **options: str) -> list[str]:
        values = {"driver": "process", **options}
        if behaviour:
            values["workbench.args"] = json.dumps([behaviour])
        overrides = [word for name, value in values.items() for word in ("--set", f"spec.{name}={value}")]
        return [LAUNCHER, "run", spec, *overrides, *words]

    def run(self, *words: str, stdin: str = "", **options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words, **options),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=BOUND,
            env=self.environment,
            check=False,
        )

    def plan(self, *words: str, **options: str) -> subprocess.CompletedProcess[str]:
        """What `plan` shows of the same session."""
        command = self.command(*words, **options)
        command[1] = "plan"
        return subprocess.run(
            command, capture_output=True, text=True, timeout=BOUND, env=self.environment, check=False
        )

    def start(self, *words: str, **options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*words, **options),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
        )

    def left(self) -> list[str]:
        """All that is still there: processes, sockets of the kernel, files other than the record."""
        kept = {"journal.jsonl", "console.log", ".creating"}
        roots = (self.state, self.runtime)
        found = [
            str(path)
            for root in roots
            for path in root.glob("sessions/*/**/*" if root == self.state else "kenaz/*")
            if path.name not in kept
        ]
        marks = [str(root).encode() for root in roots]
        sockets = Path("/proc/net/unix").read_bytes().splitlines()
        found += [line.decode() for line in sockets if any(mark in line for mark in marks)]
        return found + self.processes()

    def processes(self) -> list[str]:
        """The processes that have this place in their command line or their environment."""
        marks = [str(root).encode() for root in (self.state, self.runtime)]
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes()
                surroundings = (process / "environ").read_bytes()
            except OSError:
                continue
            if any(mark in words or mark in surroundings for mark in marks):
                found.append(f"{process.name}: {words.decode('utf-8', 'replace')}")
        return found

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Any command of the launcher."""
        return subprocess.run(
            [LAUNCHER, *words],
            capture_output=True,
            text=True,
            timeout=BOUND,
            env=self.environment,
            check=False,
        )

    def status(self, session: str) -> str | None:
        """What `ps` says of a session."""
        listed = json.loads(self.call("ps", "--all", "--json").stdout)
        return next((one["status"] for one in listed if one["id"] == session), None)

    def reap(self, *words: str) -> dict[str, Any]:
        """What `reap --json` says; whatever it finds, it leaves nothing."""
        done = self.call("reap", "--json", *words)
        assert done.stderr == ""
        told: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == (0 if told["ok"] else 1)
        return told

    def directory(self, session: str) -> Path:
        return self.state / "sessions" / session

    def records(self, session: str) -> list[Message]:
        text = (self.directory(session) / "journal.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def path(self, session: str) -> list[str]:
        return [record["state"] for record in self.records(session) if record["kind"] == "entered"]

    def wait_for(self, session: str, state: str) -> None:
        def holds() -> bool:
            try:
                return state in self.path(session)
            except (OSError, ValueError):
                return False

        self.until(holds)

    def until(self, holds: Callable[[], bool], bound: float = BOUND) -> None:
        deadline = time.monotonic() + bound
        while not holds():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory for sockets, whose paths are short: pytest's own are longer where tests share the cores."""
    with tempfile.TemporaryDirectory(prefix="kz-") as directory:
        yield Path(directory)


@pytest.fixture
def world(tmp_path: Path, short: Path) -> Iterator[World]:
    """Where sessions are run; after the test nothing may be left of them."""
    world = World(tmp_path, short)
    yield world
    assert world.left() == []


@pytest.fixture
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], World]]:
    """Makes places where sessions are run, which do not see each other; afterwards nothing may be left."""
    made: list[World] = []
    numbers = itertools.count()  # tests call it from threads
    base = tmp_path_factory.mktemp("w")
    with tempfile.TemporaryDirectory(prefix="kz-") as runtime:

        def make() -> World:
            place = Path(runtime, str(next(numbers)))
            place.mkdir(mode=0o700)
            world = World(base / place.name, place)
            made.append(world)
            return world

        yield make
        assert [left for world in made for left in world.left()] == []


@pytest.fixture(scope="session")
def qemu() -> str:
    """The path of QEMU; skips where it or the demo image is missing."""
    binary = shutil.which("qemu-system-x86_64")
    try:
        find_image("demo", "x86_64", default_cache())
    except ImageError:
        binary = None
    if binary is None:
        pytest.skip("needs QEMU and the demo image (`make image`)")
    return binary


PATIENCE = 1500
"""Seconds: an emulated desktop may take minutes before it dials, and then say nothing for minutes."""

Answer = Callable[[Message], Sequence[Message | bytes] | None]
"""What a harness says to a message; bytes go out as they are, None is a harness that dies."""


class Harness:
    """A harness as docs/reference/vsock-protocol.md has it, written without a line of the launcher's."""

    def __init__(self, path: Path, answer: Answer) -> None:
        self.address = f"unix:{path}"
        self.heard: list[Message] = []
        self.failure: BaseException | None = None
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.settimeout(PATIENCE)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def kinds(self) -> list[str]:
        return [message["kind"] for message in self.heard]

    def finish(self) -> None:
        """Ends it; raises what it failed with. Nobody need have dialled."""
        if not self.heard:
            with socket.socket(socket.AF_UNIX) as nobody, suppress(OSError):
                nobody.connect(self.address.removeprefix("unix:"))
        self._thread.join(BOUND)
        self._listener.close()
        if self.failure is not None:
            raise self.failure

    def was_cut_off(self) -> None:
        """For launchers with a reason to hang up in the middle of what is said."""
        self._thread.join(BOUND)
        if isinstance(self.failure, ConnectionError):
            self.failure = None

    def _serve(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        try:
            with closing(connection), connection.makefile("rb") as stream:
                connection.settimeout(PATIENCE)
                while head := stream.read(4):
                    message = json.loads(stream.read(int.from_bytes(head)))
                    self.heard.append(message)
                    said = self._answer(message)
                    if said is None:
                        return
                    for one in said:
                        data = one if isinstance(one, bytes) else json.dumps(one).encode()
                        frame = data if isinstance(one, bytes) else len(data).to_bytes(4) + data
                        connection.sendall(frame)
        except BaseException as exc:
            self.failure = exc


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Callable[[Answer], Harness]]:
    """Starts a harness that says what it is told to say."""
    made: list[Harness] = []

    def listen(answer: Answer) -> Harness:
        made.append(Harness(tmp_path / f"h{len(made) or ''}", answer))
        return made[-1]

    yield listen
    for one in made:
        one.finish()


@pytest.fixture(scope="session")
def token_of() -> Callable[[Path], str]:
    """Reads the token off a config disk, in whatever form it is."""

    def read(config: Path) -> str:
        file = config / "kenaz.env" if config.is_dir() else config
        found = re.search(rb'HARNESS_VM_TOKEN="([^"]+)"', file.read_bytes())
        assert found is not None
        return found[1].decode()

    return read


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def published(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A directory, and where it is published."""
    directory = tmp_path / "published"
    directory.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=directory)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield directory, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


class Signer:
    """A publisher's minisign, with a key of its own."""

    def __init__(self, key: Path) -> None:
        self._key = key
        made = ["minisign", "-G", "-W", "-f", "-p", f"{self._key}.pub", "-s", self._key]
        subprocess.run(made, check=True, capture_output=True, stdin=subprocess.DEVNULL)
        self.public = Path(f"{self._key}.pub").read_text().splitlines()[1]

    def sign(self, path: Path, *options: str) -> None:
        """Puts the signature beside the file."""
        command = ["minisign", "-S", *options, "-s", self._key, "-m", path]
        subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)


@pytest.fixture
def minisign(tmp_path: Path) -> Callable[[], Signer]:
    """Makes publishers who sign."""
    if shutil.which("minisign") is None:
        pytest.skip("minisign is not installed")
    made: list[Signer] = []

    def make() -> Signer:
        made.append(Signer(tmp_path / f"key-{len(made)}"))
        return made[-1]

    return make


def build_wheel(project: Path, directory: Path) -> Path:
    """The wheel of a project, built without a network."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(directory)]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    [wheel] = directory.glob("*.whl")
    return wheel


@pytest.fixture
def installed(tmp_path: Path) -> str:
    """The Python of a new environment that has the wheel and pytest, by way of the package index."""
    wheel = build_wheel(ROOT, tmp_path)
    assert {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}.isdisjoint(
        {"engine", "drivers"}
    )
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv/bin/python")
    install(python, str(wheel), "pytest")
    return python


def install(python: str, *what: str) -> None:
    """Installs by our own pip, so that the other environment needs none."""
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile"]
    done = subprocess.run([*pip, *what], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def install_project() -> Callable[[str, Path, Path], None]:
    """Installs a project into an environment, from a wheel that is built in a directory."""

    def into(python: str, project: Path, directory: Path) -> None:
        directory.mkdir()
        install(python, "--no-deps", str(build_wheel(project, directory)))

    return into
