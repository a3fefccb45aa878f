"""What the machine's side of a session does, on virtual time: whole sessions with scripted machines."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from kenaz_drivers.contract import (
    Capabilities,
    Content,
    Disk,
    DriverError,
    Exit,
    Helper,
    LaunchPlan,
    LaunchRequest,
)
from kenaz_drivers.simulated.driver import SimulatedDriver, SimulatedMachine
from kenaz_engine.channel.harness import HarnessError
from kenaz_engine.channel.transports import TransportError
from kenaz_engine.channel.transports.loopback import listen_owned
from kenaz_engine.channel.transports.virtio_serial import SerialPort
from kenaz_engine.channel.transports.vsock import Claim, SharedPort
from kenaz_engine.images import ensure as ensuring
from kenaz_engine.images.ensure import Ensured
from kenaz_engine.images.locks import hold
from kenaz_engine.images.manifest import Image, Part
from kenaz_engine.session import activities, endpoint
from kenaz_engine.session.activities import ALARM_LENGTH, CONSOLE_PAUSE, PRESS_AGAIN
from kenaz_engine.session.ledger import ACQUIRE_BOUND

WAY_UP = ["resolving", "allocating", "booting", "connecting"]
PANIC = "Kernel panic - not syncing: "


class Driver(SimulatedDriver):
    """Scripted machines of which a test changes a part. Plans whatever it is asked for."""

    def __init__(self, change: Callable[[SimulatedMachine], None] = lambda machine: None) -> None:
        self._change = change
        self.requests: list[LaunchRequest] = []
        self.descriptors: Mapping[str, int] = {}

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        self.requests.append(request)
        config = next(disk.path for disk in request.disks if disk.role == "config")
        script = dict(request.options.get("script", {}))
        environment = str(Path(config, "kenaz.env"))
        data = {"session": "s1", "channel": request.channel, "environment": environment, "script": script}
        return LaunchPlan(self.name, (), data=data)

    @asynccontextmanager
    async def launch(
        self, plan: LaunchPlan, descriptors: Mapping[str, int]
    ) -> AsyncIterator[SimulatedMachine]:
        self.descriptors = dict(descriptors)
        async with super().launch(plan, descriptors) as machine:
            self._change(machine)
            yield machine


def printing(*pieces: tuple[float, bytes]) -> Driver:
    """A machine whose console gives these pieces, each so many seconds after the one before."""

    def change(machine: SimulatedMachine) -> None:
        async def console() -> AsyncIterator[bytes]:
            for seconds, piece in pieces:
                await trio.sleep(seconds)
                yield piece
            await machine.wait()

        machine.console = console  # type: ignore[method-assign]

    return Driver(change)


def event(records: Sequence[Mapping[str, Any]], kind: str) -> Mapping[str, Any]:
    [found] = [r for r in records if r["kind"] == "event" and r["type"] == kind]
    return found


async def test_a_session_goes_the_graceful_way(autojump_clock: Any, whole: Any) -> None:
    result = await whole.run(await whole.prepare())
    assert result.outcome.success
    assert whole.path() == [*WAY_UP, "running", "draining", "stopping", "releasing"]
    assert whole.harness.outcome == "success"
    assert (result.exit_code, result.console, result.tracebacks) == (None, (), ())


async def test_the_line_of_a_panic_is_the_verdict(autojump_clock: Any, whole: Any) -> None:
    long = "x" * ALARM_LENGTH
    driver = printing((0.2, b"Linux\n" + PANIC.encode()), (0.1, f"sysrq {long}".encode()), (0.1, b"!\r\n"))
    result = await whole.run(await whole.prepare(driver=driver, dial=None))
    assert (
        result.outcome.verdict == f"guest panicked while booting: {(PANIC + 'sysrq ' + long)[:ALARM_LENGTH]}"
    )
    assert whole.path() == [*WAY_UP, "killing", "releasing"]
    assert result.console == ("Linux", f"{PANIC}sysrq {long}!")
    assert event(whole.records(), "guest.panic")["data"]["pattern"] == "guest.panic"


async def test_a_panic_is_told_with_the_end_of_its_line(autojump_clock: Any, whole: Any) -> None:
    driver = printing((0.2, PANIC.encode() + b"sysrq triggered cras"), (CONSOLE_PAUSE * 0.9, b"h\n"))
    result = await whole.run(await whole.prepare(driver=driver, dial=None))
    assert result.outcome.verdict.endswith("sysrq triggered crash")


async def test_a_prompt_fails_within_the_second(autojump_clock: Any, whole: Any) -> None:
    driver = printing((1.0, b"no system\r\n\x1b[1mgrub> "))
    started = trio.current_time()
    result = await whole.run(await whole.prepare(driver=driver, dial=None))
    assert result.outcome.verdict == "guest panicked while booting: grub>"
    assert trio.current_time() - started == pytest.approx(1.0 + CONSOLE_PAUSE)


async def test_every_pause_is_heard(autojump_clock: Any, whole: Any) -> None:
    driver = printing((0.1, b"booting"), (1.0, b"..."), (1.0, b"\n(initramfs) "))
    result = await whole.run(await whole.prepare(driver=driver, dial=None))
    assert result.outcome.verdict.endswith(": (initramfs)")
    assert result.outcome.seconds == pytest.approx(2.1 + CONSOLE_PAUSE)


async def test_the_last_words_count_before_the_exit(autojump_clock: Any, whole: Any) -> None:
    driver = printing((0.2, PANIC.encode() + b"cut"))
    result = await whole.run(await whole.prepare(driver=driver, dial=None, exit=0.3))
    assert result.outcome.verdict == f"guest panicked while booting: {PANIC}cut"


async def test_a_console_that_does_not_end_holds_nobody_up(autojump_clock: Any, whole: Any) -> None:
    def change(machine: SimulatedMachine) -> None:
        async def console() -> AsyncIterator[bytes]:
            yield b"Linux\n"
            await trio.sleep_forever()

        machine.console = console  # type: ignore[method-assign]

    result = await whole.run(await whole.prepare(driver=Driver(change)))
    assert result.outcome.success
    assert result.outcome.seconds < 5


@pytest.mark.parametrize(
    ("script", "verdict", "way"),
    [
        ({"refuse": "no memory"}, "VM did not start: the scripted machine refuses: no memory", "killing"),
        ({"dial": None}, "guest did not dial in time", "killing"),
        ({"ready": None}, "VM start took too long", "killing"),
        ({"dial": None, "exit": 1}, "VM exited before it dialled: the guest powered off", "releasing"),
        ({"exit": 1, "clean": False}, "VM exited while serving: the machine crashed", "releasing"),
    ],
)
async def test_a_machine_that_fails_is_told(
    autojump_clock: Any, whole: Any, script: dict[str, Any], verdict: str, way: str
) -> None:
    whole.stays()
    result = await whole.run(await whole.prepare(**script))
    assert result.outcome.verdict == verdict
    assert way in whole.path()
    assert not result.outcome.success


@pytest.mark.parametrize(("late", "verdict"), [(0.9, "VM exited while serving"), (1.1, "channel lost")])
async def test_a_machine_closes_its_streams_before_it_is_gone(
    autojump_clock: Any, whole: Any, late: float, verdict: str
) -> None:
    def change(machine: SimulatedMachine) -> None:
        really = machine.wait

        async def wait() -> Exit:
            ended = await really()
            await trio.sleep(late)
            return ended

        machine.wait = wait  # type: ignore[method-assign]

    whole.stays()
    result = await whole.run(await whole.prepare(driver=Driver(change), exit=1, clean=False))
    assert result.outcome.verdict.startswith(verdict)


async def test_a_machine_that_is_never_made_is_given_up(autojump_clock: Any, whole: Any) -> None:
    class Stuck(Driver):
        @asynccontextmanager
        async def launch(self, plan: LaunchPlan, descriptors: Mapping[str, int]) -> Any:
            await trio.sleep_forever()
            yield

    result = await whole.run(await whole.prepare(driver=Stuck()))
    assert result.outcome.verdict == f"VM did not start: making the vm took longer than {ACQUIRE_BOUND:g} s"


async def test_a_guest_that_hears_no_button_is_killed(autojump_clock: Any, whole: Any) -> None:
    result = await whole.run(await whole.prepare(powerdown=None))
    assert result.outcome.success
    assert result.outcome.warnings == ("guest did not power off",)
    assert whole.path()[-3:] == ["stopping", "killing", "releasing"]


async def test_the_button_is_pressed_again(autojump_clock: Any, whole: Any) -> None:
    presses = []

    def change(machine: SimulatedMachine) -> None:
        press = machine.powerdown

        async def powerdown() -> None:
            presses.append(trio.current_time())
            if len(presses) == 3:
                await press()

        machine.powerdown = powerdown  # type: ignore[method-assign]

    result = await whole.run(await whole.prepare(driver=Driver(change)))
    assert (result.outcome.success, result.outcome.warnings) == (True, ())
    assert presses[2] - presses[0] == pytest.approx(2 * PRESS_AGAIN)


@pytest.mark.parametrize(
    ("exits", "last"), [(None, "killing"), (0.1, "stopping"), (PRESS_AGAIN - 0.1, "stopping")]
)
async def test_a_button_that_cannot_be_pressed(
    autojump_clock: Any, whole: Any, exits: float | None, last: str
) -> None:
    """Because the machine ends, so many seconds later; or without such a reason."""

    def change(machine: SimulatedMachine) -> None:
        async def powerdown() -> None:
            if exits is not None:
                await SimulatedMachine.powerdown(machine)
            raise DriverError("the monitor is gone", hint="look at it")

        machine.powerdown = powerdown  # type: ignore[method-assign]

    result = await whole.run(await whole.prepare(driver=Driver(change), powerdown=exits))
    assert whole.path()[-2:] == [last, "releasing"]
    said = () if exits is not None else ("power-off failed: the monitor is gone",)
    assert (result.outcome.success, result.outcome.warnings) == (True, said)


async def test_an_abort_before_there_is_a_machine_has_nothing_to_kill(
    autojump_clock: Any, whole: Any
) -> None:
    result = await whole.run(await whole.prepare(), (0.0, "abort"))
    assert result.outcome.verdict == "aborted"
    assert whole.path()[-2:] == ["killing", "releasing"]


async def test_a_harness_that_cannot_be_reached_is_told(autojump_clock: Any, whole: Any) -> None:
    whole.unreachable = HarnessError("the harness is away", hint="start it")
    result = await whole.run(await whole.prepare())
    assert result.outcome.verdict == "protocol violated: the harness is away"
    assert event(whole.records(), "error")["data"]["hint"] == "start it"


async def test_what_cannot_be_given_back_is_told(
    autojump_clock: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stubborn(path: Path) -> Any:
        made = original(path)
        if path.name != "root":
            return made

        async def release() -> None:
            if len(refused) < 1:
                refused.append(path)
                raise PermissionError(errno.EPERM, "it is mine", str(path))
            await made.release()

        return activities.Made(made.handle, release)

    refused: list[Path] = []
    original = activities.made_directory
    monkeypatch.setattr(activities, "made_directory", stubborn)
    result = await whole.run(await whole.prepare())
    assert "the disk [Errno 1] it is mine" in result.outcome.verdict
    # The sweep after the final state tries once more.
    assert result.outcome.left == ()


# Disks, images and sockets


def full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def no_room(*args: Any, **options: Any) -> None:
    await trio.lowlevel.checkpoint()
    full()


async def made_empty(path: Path, disk_format: str, **options: Any) -> str:
    await trio.lowlevel.checkpoint()
    path.touch(0o600)
    return "overlay"


@pytest.fixture
def image(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image with patterns of its own, which is found; its overlay is an empty file."""
    directory = tmp_path_factory.mktemp("image")
    root = directory / "root"
    root.write_bytes(b"root")
    patterns = (("guest.panic", "^guru meditation"), ("guest.ready", "^login:"))
    found = SimpleNamespace(
        root=root,
        digest="sha256:00",
        root_format="raw",
        console_patterns=patterns,
        kernel=root,
        initrd=root,
        cmdline="quiet",
    )

    async def here(*args: Any, **options: Any) -> Ensured:
        return Ensured(found, await hold([root]), ("it is old",))  # type: ignore[arg-type]  # as much as is used

    monkeypatch.setattr(ensuring, "ensure", here)
    monkeypatch.setattr(activities, "create_disk", made_empty)
    return directory


BOOTS = {"boots_image": True, "disk_formats": ("qcow2",)}


async def test_a_machine_with_an_image(autojump_clock: Any, whole: Any, image: Path) -> None:
    driver = printing((0.1, b"login: \nguru meditation 1\n"))
    result = await whole.run(await whole.prepare(driver=driver, can=BOOTS, dial=None))
    assert result.outcome.verdict == "guest panicked while booting: guru meditation 1"
    disks = [(disk.role, disk.format, Path(disk.path).name) for disk in driver.requests[-1].disks]
    assert disks == [("root", "qcow2", "root.qcow2"), ("config", "raw", "config.raw")]
    assert driver.requests[-1].cmdline == "quiet"
    kinds = [(r["resource"], r["type"]) for r in whole.records() if r["kind"] == "acquired"]
    assert kinds[1:3] == [("image", "image-reference"), ("disk", "file")]
    assert kinds[3:5] == [("socket", "socket"), ("config", "file")]
    [disk] = [r["handle"] for r in whole.records() if r["kind"] == "acquired" and r["resource"] == "disk"]
    assert disk["made"] == "overlay"


class Placer(Driver):
    """Its machines are on another host, to which it brings what they need."""

    def __init__(self, fails: Exception | None = None) -> None:
        super().__init__()
        self.brought: list[Content] = []
        self._fails = fails

    def placed(self, capabilities: Capabilities, digest: str) -> str:
        return f"/there/{digest}"

    async def place(
        self,
        capabilities: Capabilities,
        contents: Sequence[Content],
        told: Callable[[Content, int, int, bool], None],
    ) -> None:
        await trio.lowlevel.checkpoint()
        if self._fails:
            raise self._fails
        self.brought += contents
        told(contents[0], 0, 10, True)
        told(contents[0], 5, 10, False)


@pytest.fixture
def own_disk(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A disk of the user's own, of which nobody has said what it is. No clock jumps while it is read."""
    root = tmp_path_factory.mktemp("own") / "disk.raw"
    root.write_bytes(b"root")
    parts = {"root": Part(root, 4, "")}
    found = Image("disk", "", "x86_64", "", parts, "raw", "", "", (), None)

    async def here(*args: Any, **options: Any) -> Ensured:
        return Ensured(found, await hold([root]), ())

    async def at_once(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", at_once)
    monkeypatch.setattr(ensuring, "ensure", here)
    return root


ELSEWHERE = {"boots_image": True, "disk_formats": ("volume",), "elsewhere": "other"}
DIGEST = hashlib.sha256(b"root").hexdigest()


async def test_what_never_changes_is_brought_to_another_host_and_the_disk_is_made_there(
    autojump_clock: Any, whole: Any, own_disk: Path
) -> None:
    driver = Placer()
    result = await whole.run(await whole.prepare(driver=driver, can=ELSEWHERE, dial=None))
    assert driver.brought == [Content(str(own_disk), DIGEST)]
    root, config = driver.requests[-1].disks
    size = 2 << 30
    assert root == Disk("root", "", "volume", base=f"/there/{DIGEST}", base_format="raw", size=size)
    assert Path(config.path).name == "config.raw"
    held = [r["resource"] for r in whole.records() if r["kind"] == "acquired"]
    assert held[1:5] == ["image", "socket", "config", "vm"]
    assert result.outcome.verdict == "guest did not dial in time"


async def test_what_cannot_be_brought_there_is_told_and_a_small_disk_too(
    autojump_clock: Any, whole: Any, own_disk: Path
) -> None:
    driver = Placer(DriverError("the pool is full", hint="free some space"))
    result = await whole.run(await whole.prepare(driver=driver, can=ELSEWHERE))
    assert result.outcome.verdict == "image could not be had: the pool is full"
    with own_disk.open("r+b") as file:
        file.truncate(2 << 20)
    small = await whole.prepare("spec.machine.disk=1MiB", driver=Placer(), can=ELSEWHERE)
    result = await whole.run(small)
    assert "is smaller than its image" in result.outcome.verdict


@pytest.mark.parametrize(
    ("maker", "fails", "names"),
    [("create_disk", no_room, "root.qcow2"), ("write_config_disk", full, "config.raw")],
)
async def test_a_full_disk_is_told_by_the_file_that_it_has_no_room_for(
    autojump_clock: Any,
    whole: Any,
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    maker: str,
    fails: Any,
    names: str,
) -> None:
    monkeypatch.setattr(activities, maker, fails)
    result = await whole.run(await whole.prepare(driver=Driver(), can=BOOTS))
    path = whole.directory / names
    assert result.outcome.verdict == f"disks could not be made: {path}: No space left on device"


async def test_a_config_directory_that_has_no_room_is_named(
    autojump_clock: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activities, "write_directory", full)
    result = await whole.run(await whole.prepare())
    path = whole.directory / "config"
    assert result.outcome.verdict == f"disks could not be made: {path}: No space left on device"


async def test_a_path_that_is_known_is_told(
    autojump_clock: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*args: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/their/file")

    monkeypatch.setattr(activities, "write_directory", denied)
    result = await whole.run(await whole.prepare())
    assert result.outcome.verdict == "disks could not be made: /their/file: Permission denied"


async def test_an_error_without_a_path_is_told(
    autojump_clock: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "listen_local", full)
    result = await whole.run(await whole.prepare())
    assert result.outcome.verdict == "disks could not be made: the system: No space left on device"


async def test_an_image_that_went_since_is_told(
    autojump_clock: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(*args: Any, **options: Any) -> None:
        raise activities.ImageError("it is gone", "get it again")

    monkeypatch.setattr(ensuring, "ensure", gone)
    result = await whole.run(await whole.prepare(driver=Driver(), can=BOOTS))
    assert result.outcome.verdict == "image could not be had: it is gone"


class NoGuest:
    """Listens on a port that nobody dials."""

    def __init__(self) -> None:
        self.port = 7881
        self.closed = False

    async def accept(self) -> Any:
        await trio.sleep_forever()

    async def aclose(self) -> None:
        self.closed = True
        await trio.lowlevel.checkpoint()


VSOCK = {"transports": ("vsock",)}


async def test_a_cid_is_claimed_handed_on_and_given_back(
    autojump_clock: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed, theirs = os.pipe()
    listener, driver = NoGuest(), Driver()
    monkeypatch.setattr(endpoint, "claim_cid", lambda: Claim(42, claimed))
    monkeypatch.setattr(endpoint, "listen_vsock", lambda port, **_: listener)
    result = await whole.run(await whole.prepare(driver=driver, can=VSOCK, dial=None))
    os.close(theirs)
    assert result.outcome.verdict == "guest did not dial in time"
    assert (driver.requests[-1].cid, driver.requests[-1].channel) == (42, "")
    assert driver.descriptors == {"vhost-vsock": claimed}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(claimed)
    assert listener.closed
    [made] = [r for r in whole.records() if r["kind"] == "acquired" and r["type"] == "cid"]
    assert made["handle"] == {"cid": 42, "port": 7881}
    assert not [r for r in whole.records() if r.get("about") == "port"]


async def test_a_cid_that_the_hypervisor_chose_is_expected_before_the_guest_runs(
    autojump_clock: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = SimpleNamespace(accept=trio.sleep_forever, close=lambda: None)
    shared = SharedPort(nobody, 7881)  # type: ignore[arg-type]
    listener = shared.join(-1)
    monkeypatch.setattr(endpoint, "listen_vsock", lambda port, **_: listener)
    expected: list[str] = []

    def change(machine: SimulatedMachine) -> None:
        ready = machine.ready

        async def look() -> None:
            with pytest.raises(TransportError, match="another session of this process has CID 77"):
                shared.join(77)
            expected.append("when it gets ready")
            await ready()

        machine.ready = look  # type: ignore[method-assign]

    monkeypatch.setattr(SimulatedMachine, "handle", {"cid": 77})
    driver = Driver(change)
    can = {**VSOCK, "assigns_cid": True}
    result = await whole.run(await whole.prepare(driver=driver, can=can, dial=None))
    assert result.outcome.verdict == "guest did not dial in time"
    assert expected == ["when it gets ready"]
    assert (driver.requests[-1].cid, driver.descriptors) == (None, {})


async def test_a_port_that_another_process_has_is_replaced_and_told(
    autojump_clock: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed, theirs = os.pipe()
    listener, seen = NoGuest(), []
    listener.port = 3_000_000_000

    def listen(port: int, *, cid: int, or_another: bool) -> NoGuest:
        seen.append((port, cid, or_another))
        return listener

    class Reading(Driver):
        def plan(self, request: LaunchRequest) -> LaunchPlan:
            config = next(disk.path for disk in request.disks if disk.role == "config")
            seen.append('KENAZ_CHANNEL="vsock:2:3000000000"' in Path(config, "kenaz.env").read_text())
            return super().plan(request)

    monkeypatch.setattr(endpoint, "claim_cid", lambda: Claim(42, claimed))
    monkeypatch.setattr(endpoint, "listen_vsock", listen)
    await whole.run(await whole.prepare(driver=Reading(), can=VSOCK, dial=None))
    os.close(theirs)
    assert seen == [(7881, 42, True), True]
    [note] = [r for r in whole.records() if r.get("about") == "port"]
    assert (note["wanted"], note["taken"]) == (7881, 3_000_000_000)


async def test_a_cid_is_free_again_where_nobody_can_listen(
    autojump_clock: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(port: int, **options: Any) -> None:
        raise TransportError("no AF_VSOCK", hint="take another")

    claimed, theirs = os.pipe()
    monkeypatch.setattr(endpoint, "claim_cid", lambda: Claim(42, claimed))
    monkeypatch.setattr(endpoint, "listen_vsock", refuse)
    result = await whole.run(await whole.prepare(driver=Driver(), can=VSOCK))
    os.close(theirs)
    assert result.outcome.verdict == "disks could not be made: no AF_VSOCK"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(claimed)


async def test_a_cid_is_given_back_also_where_there_is_no_machine(
    autojump_clock: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(Driver):
        def plan(self, request: LaunchRequest) -> LaunchPlan:
            raise DriverError("not with this machine", hint="another")

    claimed, theirs = os.pipe()
    monkeypatch.setattr(endpoint, "claim_cid", lambda: Claim(42, claimed))
    monkeypatch.setattr(endpoint, "listen_vsock", lambda port, **_: NoGuest())
    result = await whole.run(await whole.prepare(driver=Refusing(), can=VSOCK))
    os.close(theirs)
    assert result.outcome.verdict == "VM did not start: not with this machine"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(claimed)


def test_a_config_directory_is_for_its_owner_alone(tmp_path: Path) -> None:
    activities.write_directory(tmp_path / "config", {"kenaz.env": b"A=1\n"})
    assert (tmp_path / "config").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "config/kenaz.env").stat().st_mode & 0o777 == 0o400
    assert (tmp_path / "config/kenaz.env").read_bytes() == b"A=1\n"


class ClosingMachine:
    """A machine whose guest closes its port whenever `close` is called."""

    def __init__(self) -> None:
        self.asked = 0
        self._closed = trio.Event()

    def close(self) -> None:
        self._closed.set()

    async def port_closed(self) -> None:
        self.asked += 1
        await self._closed.wait()


class CountingPort:
    def __init__(self) -> None:
        self.openings, self.ended = 1, 0
        self._next = trio.Event()

    def guest_closed(self) -> None:
        self.ended += 1

    def begin(self) -> None:
        self.openings += 1
        self._next.set()
        self._next = trio.Event()

    async def next_opening(self, after: int) -> None:
        while self.openings <= after:
            await self._next.wait()


async def test_a_port_that_closes_ends_the_stream_of_the_writer_that_had_it(autojump_clock: Any) -> None:
    machine, port = ClosingMachine(), CountingPort()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.watch_port, machine, port)
        await trio.testing.wait_all_tasks_blocked()
        # Another has begun while the machine was asked: it is asked anew.
        port.begin()
        machine.close()
        await trio.testing.wait_all_tasks_blocked()
        assert (machine.asked, port.ended) == (2, 1)
        port.begin()
        await trio.testing.wait_all_tasks_blocked()
        assert (machine.asked, port.ended) == (3, 2)
        nursery.cancel_scope.cancel()


class Helped(Driver):
    """Machines that need a helper, of which there is none."""

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        return replace(super().plan(request), helpers=(Helper("daemon", ("daemon",), ("/s",)),))


@pytest.mark.parametrize("after", [0.1, 2.5])
async def test_a_helper_that_dies_takes_the_machine_with_it(
    autojump_clock: Any, whole: Any, monkeypatch: pytest.MonkeyPatch, after: float
) -> None:
    async def start_helper(work: Any, helper: Helper, mark: str, died: Callable[[str], None]) -> str:
        async def die(*, task_status: trio.TaskStatus[None]) -> None:
            task_status.started()
            await trio.sleep(after)
            died("SIGKILL killed daemon")

        await work.start(die)
        return "helper.daemon"

    monkeypatch.setattr(activities, "start_helper", start_helper)
    prepared = await whole.stays().prepare(driver=Helped(), dial=1.0)
    result = await whole.run(prepared)
    where = "before it dialled" if after < 1 else "while serving"
    assert result.outcome.verdict == f"VM exited {where}: SIGKILL killed daemon"
    assert whole.path()[-1] == "releasing"


async def test_a_hypervisor_that_connects_to_a_port_is_told_which_and_known_by_its_process(
    autojump_clock: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    owned = listen_owned(lambda here, there: 0)
    port = SerialPort(owned)
    expected: list[int] = []
    monkeypatch.setattr(owned, "expect", expected.append)
    monkeypatch.setattr(endpoint, "SERIAL_BY_PORT", True)
    monkeypatch.setattr(endpoint, "listen_serial_port", lambda: port)
    monkeypatch.setattr(SimulatedMachine, "handle", {"pid": 77})
    driver = Driver()
    can = {"transports": ("virtio-serial",)}
    result = await whole.run(await whole.prepare(driver=driver, can=can, dial=None))
    assert result.outcome.verdict == "guest did not dial in time"
    assert driver.requests[-1].channel == f"127.0.0.1:{owned.port}"
    assert expected == [77]
    [made] = [r for r in whole.records() if r["kind"] == "acquired" and r["resource"] == "socket"]
    assert (made["type"], made["handle"]) == ("port", {"address": f"tcp:127.0.0.1:{owned.port}"})
