"""What the checks stand on: a driver, guests for it, and a look at what is left."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio

from kenaz_drivers._common.unix import unix_socket
from kenaz_drivers.conformance.guests import UP, Behaviour, Guests, guests_for
from kenaz_drivers.contract import (
    Capabilities,
    Content,
    Disk,
    Driver,
    DriverError,
    JsonObject,
    LaunchPlan,
    LaunchRequest,
    Machine,
    Placing,
)
from kenaz_drivers.registry import load

CHECK = 120.0
"""Seconds that a check may take. Under emulation a guest may need ten of them to say that it is up."""

SOON = 30.0
"""Seconds for what should take far less: the end of a machine, a first line on the console."""

GONE = 10.0
"""Seconds for the last traces of a machine to go after its context was left."""


class Unusable(Exception):
    """The driver cannot run guests here, so nothing can be checked."""


@dataclass
class Kit:
    """One driver, as the checks see it. `directory` is short enough for sockets, and the kit's own."""

    name: str
    arch: str
    directory: Path
    options: JsonObject = field(default_factory=dict)
    guests: Guests | None = None
    thorough: bool = False

    def __post_init__(self) -> None:
        self.driver: Driver = load(self.name)
        self._capabilities: Capabilities | None = None
        self._number = 0

    def run(self, check: Callable[[Kit], Awaitable[None]]) -> None:
        """Runs one check, with a deadline, and looks afterwards whether all is as it was before."""

        async def bounded() -> None:
            with trio.fail_after(CHECK):
                await check(self)

        self._capabilities = None
        trio.run(self.capabilities)  # what it starts or opens for good is no leak of the check
        before = Traces.seen(self.directory)
        trio.run(bounded)
        left = before.left()
        assert not left, f"left behind: {'; '.join(left)}"

    async def capabilities(self) -> Capabilities:
        """What the driver can do here. Raises Unusable."""
        if self._capabilities is None:
            found = await self.driver.probe(self.arch, self.options)
            if not found.usable:
                why = "; ".join(f"{r.text} ({r.mend})" for r in found.reasons if not r.ok)
                raise Unusable(f"{self.name} cannot run {self.arch} guests here: {why}")
            self._capabilities = found
        return self._capabilities

    @property
    def lives_in_process(self) -> bool:
        """Whether its machines are gone with the process that made them, being nothing but tasks of it."""
        return self.name == "simulated"

    async def request(self, behaviour: Behaviour, **changes: Any) -> LaunchRequest:
        """A request for such a guest, in a directory of its own."""
        capabilities = await self.capabilities()
        self._number += 1
        place = self.directory / str(self._number)
        place.mkdir(mode=0o700)
        local = [t for t in capabilities.transports if t in ("virtio-serial", "unix")]
        request = LaunchRequest(
            session=f"check{self._number}",
            directory=str(place),
            runtime=str(place),
            cpus=1,
            memory=64 << 20,
            transport=local[0] if local else capabilities.transports[0],
            channel=str(place / "channel") if local else "",
            port=7881,
            capabilities=capabilities,
            mark=f"check{self._number}-{secrets.token_hex(8)}",
            options=dict(self.options),
        )
        return await self._with_guest(replace(request, **changes), behaviour)

    async def _with_guest(self, request: LaunchRequest, behaviour: Behaviour) -> LaunchRequest:
        """That request with such a guest, which is brought to the machine's host where that is another."""
        request = (self.guests or guests_for(request, self.name))(request, behaviour)
        capabilities, driver = request.capabilities, self.driver
        if not capabilities.elsewhere:
            return request
        assert isinstance(driver, Placing)
        root = request.disks[0]
        file = Path(root.path)
        digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else "0" * 64
        if file.exists():
            await driver.place(capabilities, [Content(root.path, digest)], lambda *told: None)
        base = driver.placed(capabilities, digest)
        moved = Disk("root", "", "volume", base=base, base_format="raw", size=1 << 20)
        return replace(request, disks=(moved, *request.disks[1:]))

    @asynccontextmanager
    async def planned(self, behaviour: Behaviour, **changes: Any) -> AsyncIterator[LaunchPlan]:
        """A plan for such a guest, with somebody who listens for its channel and lets it talk."""
        request = await self.request(behaviour, **changes)
        async with listening(request.channel):
            # Again, for guests that look whether somebody listens.
            request = await self._with_guest(request, behaviour)
            yield self.driver.plan(request)

    @asynccontextmanager
    async def running(self, behaviour: Behaviour, **changes: Any) -> AsyncIterator[Running]:
        """Such a guest, ready and up; what it prints is read."""
        async with (
            self.planned(behaviour, **changes) as plan,
            self.driver.launch(plan, {}) as machine,
            trio.open_nursery() as nursery,
        ):
            running = Running(machine, plan)
            nursery.start_soon(running.read)
            await machine.ready()
            await running.until_up()
            yield running
            nursery.cancel_scope.cancel()

    async def elsewhere(self, code: str, *words: str) -> str:
        """Runs Python in another process; what it prints. Its environment is ours."""
        command = [sys.executable, "-c", code, *words]
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    async def release_elsewhere(self, handle: JsonObject) -> None:
        """Releases in a process that knows nothing but the handle, and that as JSON."""
        code = (
            "import json, sys, trio\n"
            "from kenaz_drivers.registry import load\n"
            "trio.run(load(sys.argv[1]).release, json.loads(sys.argv[2]))\n"
        )
        await self.elsewhere(code, self.name, json.dumps(dict(handle)))


class Running:
    """A machine whose guest has said that it is up."""

    def __init__(self, machine: Machine, plan: LaunchPlan) -> None:
        self.machine = machine
        self.plan = plan
        self.printed = bytearray()
        self.console_ended = trio.Event()
        self._more = trio.lowlevel.ParkingLot()

    async def read(self) -> None:
        async for data in self.machine.console():
            self.printed += data
            del self.printed[: -(1 << 20)]
            self._more.unpark_all()
        self.console_ended.set()
        self._more.unpark_all()

    async def until_up(self) -> None:
        with trio.fail_after(SOON):
            while UP not in self.printed and not self.console_ended.is_set():
                await self._more.park()


@asynccontextmanager
async def listening(path: str) -> AsyncIterator[trio.Event]:
    """Listens there, if it is a path, and reads whatever comes; the event says that somebody connected."""
    connected = trio.Event()
    if not path:
        yield connected
        return
    bound = unix_socket()
    bound.bind(path)
    bound.listen(4)
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(bound))

    async def serve(stream: trio.SocketStream) -> None:
        connected.set()
        try:
            async for _ in stream:
                pass
        except trio.BrokenResourceError:
            return

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, serve, [listener])
            yield connected
            nursery.cancel_scope.cancel()
    finally:
        Path(path).unlink(missing_ok=True)


# --- what is left -------------------------------------------------------------------------------------------


@dataclass
class Traces:
    """What this process holds, and what is in the kit's directory, at one moment."""

    directory: Path
    descriptors: Mapping[int, str]
    children: frozenset[int]
    threads: int

    @classmethod
    def seen(cls, directory: Path) -> Traces:
        return cls(directory, _descriptors(), _children(), threading.active_count())

    def left(self) -> list[str]:
        """What is there now and was not then, in words; what is still going is given a moment."""
        deadline = time.monotonic() + GONE
        while (found := list(self._left())) and time.monotonic() < deadline:
            time.sleep(0.05)
            gc.collect()
        return found

    def _left(self) -> Iterator[str]:
        now = _descriptors()
        yield from (f"descriptor {n} of {now[n]}" for n in now.keys() - self.descriptors.keys())
        yield from (f"child process {pid}" for pid in _children() - self.children)
        yield from (f"process {pid} with a mark" for pid in _marked(str(self.directory)))
        for path in self.directory.rglob("*"):
            if path.is_socket():
                yield f"the socket {path}"


def _descriptors() -> dict[int, str]:
    found: dict[int, str] = {}
    if not Path("/proc/self/fd").is_dir():
        return found
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  # numbers are wanted, no paths
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115  # it need not be a path
        except OSError:
            continue
    return found


def _children() -> frozenset[int]:
    try:
        text = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()
    except OSError:
        return frozenset()
    return frozenset(map(int, text.split()))


def _marked(directory: str) -> list[int]:
    """The processes with a command line that names the directory of the checks."""
    found = []
    for process in Path("/proc").glob("[0-9]*") if sys.platform == "linux" else ():
        try:
            words = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if directory.encode() in words and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found


@contextmanager
def refused(words: str = "") -> Iterator[None]:
    """What is in it must raise a DriverError that says something."""
    try:
        yield
    except DriverError as error:
        said = str(error)
    else:
        raise AssertionError("it was not refused")
    assert said, "a DriverError without a word"
    assert words in said
