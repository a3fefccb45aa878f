"""The work that states invoke. What each needs and acquires is declared in `vocabulary`.

An activity acquires through the ledger, so that what it made outlives it; it waits for readiness outside of
the acquisition. The long-lived things (machine, channel) are tasks of the session that put events into its
inbox.
"""

from __future__ import annotations

import math
import os
import secrets
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from kenaz_drivers.contract import Content, DriverError, LaunchPlan, Machine, Placing, Screen
from kenaz_engine.channel.transports import TransportError
from kenaz_engine.guest.recipe import CONSOLE_PATTERNS
from kenaz_engine.images.builds import Build, Offered
from kenaz_engine.images.catalog import default_cache
from kenaz_engine.images.config_disk import environment_file, write_config_disk
from kenaz_engine.images.disks import check_base, create_disk
from kenaz_engine.images.errors import ImageError
from kenaz_engine.images.locks import Held
from kenaz_engine.images.manifest import Image
from kenaz_engine.images.store import digest_of
from kenaz_engine.images.transfer import Meter, Notice, Progress, Watch
from kenaz_engine.images.vhdx import ensure_base
from kenaz_engine.lifecycle.machine import Event
from kenaz_engine.session.console import Console
from kenaz_engine.session.endpoint import RESOURCE, Endpoint
from kenaz_engine.session.guest import (
    ENVIRONMENT_FILE,
    MADE_THERE,
    Layout,
    contents_of,
    disk_formats,
    guest_variables,
    launch_request,
)
from kenaz_engine.session.helpers import start_helper
from kenaz_engine.session.ledger import AcquireTimeout, Made
from kenaz_engine.session.prepared import Prepared
from kenaz_engine.session.recorder import Recorder, RecordLost
from kenaz_engine.session.resources import file_handle, made_directory, made_file, planned_file
from kenaz_engine.session.runner import ActivityError, ActivityFunction, Work
from kenaz_engine.session.seams import Connect, Show, unless_exiting
from kenaz_engine.session.vocabulary import VOCABULARY
from kenaz_engine.shortage import what_to_do

if TYPE_CHECKING:
    from kenaz_engine.session.conversation import Conversation

LAST_WORDS = 1.0
"""Seconds for which the channel of a machine that is gone is read on, before `vm.exited` is put."""

PRESS_AGAIN = 2.0
"""Seconds after which the power button is pressed again."""

ALARMS = frozenset({"guest.panic", "guest.emergency", "firmware.shell"})
"""Names of console patterns after which a guest cannot go on; see docs/decisions/0009-console-alarms.md."""

CONSOLE_PAUSE = 0.25
"""Seconds of silence after which a line of the console counts although it has not ended: a prompt."""

ALARM_LENGTH = 200
"""Characters of a line of the console that a verdict quotes."""

CONSOLE_LINES = 12
"""Lines of the console that are shown when a guest fails."""


class Activities:
    """The activities of one session, and what they share."""

    def __init__(
        self,
        prepared: Prepared,
        layout: Layout,
        recorder: Recorder,
        connect: Connect,
        failed: Callable[[], bool],
        show: Show,
        watch: Watch,
    ) -> None:
        self._watch = watch
        self._console: Console | None = None
        self._prepared = prepared
        self._layout = layout
        self._recorder = recorder
        self._connect = connect
        self._failed = failed
        self._show = show
        self._conversation: Conversation | None = None
        self._token = secrets.token_urlsafe(32)
        self._image: Image | None = None
        self._build: Build | None = None
        self._endpoint = Endpoint(prepared, layout, recorder)
        self._helper_end = ""
        self._helper_ended = trio.Event()
        self._machine: Machine | None = None
        self._machine_ready_or_not = trio.Event()
        self._machine_exited = trio.Event()
        self._machine_gone = trio.Event()

    def table(self) -> dict[str, ActivityFunction]:
        """The activities by name: exactly those that are declared."""
        functions: dict[str, ActivityFunction] = {
            "image.ensure": self._ensure_image,
            "disk.allocate": self._allocate,
            "vm.start": self._start_machine,
            "channel.accept": self._talking(lambda talk, work: talk.accept(work)),
            "channel.reaccept": self._talking(lambda talk, work: talk.reaccept(work)),
            "session.serve": self._talking(lambda talk, work: talk.serve(work)),
            "session.exec": self._talking(lambda talk, work: talk.execute(work)),
            "session.drain": self._talking(lambda talk, work: talk.drain(work)),
            "vm.stop": self._stop_machine,
            "vm.kill": self._kill_machine,
            "resources.release": self._release,
        }
        assert functions.keys() == VOCABULARY.activities.keys()
        return {name: _explained(function) for name, function in functions.items()}

    def console_tail(self) -> tuple[str, ...]:
        """The last lines that the guest printed."""
        return tuple(self._console.tail(CONSOLE_LINES)) if self._console else ()

    async def photograph(self, path: str) -> None:
        """Writes what the guest's screen shows to `path`, as PNG. Raises DriverError."""
        if self._machine is None:
            raise DriverError("no machine runs yet")
        if not isinstance(self._machine, Screen):
            raise DriverError(f"the driver {self._prepared.driver.name} makes no pictures of screens")
        if self._prepared.resolved.machine.display == "none":
            raise DriverError("this machine has no screen", hint="machine.display: vnc or window")
        await self._machine.screenshot(path)

    @property
    def exit_code(self) -> int | None:
        """The exit code of the guest's command, where one was run to its end."""
        return self._conversation.exit_code if self._conversation else None

    def _talking(self, talk: Callable[[Conversation, Work], Awaitable[Any]]) -> ActivityFunction:
        """An activity of the channel's side, whose code is imported while the guest boots."""

        async def activity(work: Work) -> Any:
            from kenaz_engine.session.conversation import Conversation, explaining

            if self._conversation is None:
                assert self._endpoint.listener is not None
                self._conversation = Conversation(
                    self._prepared,
                    self._token,
                    self._endpoint.listener,
                    self._machine_exited,
                    self._recorder,
                    self._connect,
                    self._failed,
                    self._show,
                )
            with explaining():
                return await talk(self._conversation, work)

        return activity

    async def _ensure_image(self, work: Work) -> None:
        if not self._prepared.capabilities.boots_image:
            return
        from kenaz_engine.images.ensure import ensure

        resolved = self._prepared.resolved
        ensured = await ensure(
            resolved.image,
            self._prepared.arch,
            default_cache(),
            watch=self._seen,
            base=resolved.beside(""),
            offline=self._prepared.offline,
        )
        image, held = ensured.image, [ensured.held]
        for note in ensured.notes:
            self._note_image(note)

        async def make() -> tuple[Made, None]:
            async def release() -> None:
                for one in held:
                    one.close()

            return Made(file_handle(image.root), release), None

        try:
            if self._prepared.build is not None:
                held.append(await self._ensure_build(self._prepared.build))
            intent = {"digest": image.digest}
            if self._build is not None:
                intent["build"] = self._build.digest
            if disk_formats(self._prepared, image)[0] == "vhdx":
                await ensure_base(image, resolved.machine.disk, default_cache(), ensured.held)
            await work.ledger.acquire("image", "image-reference", intent, make)
        except BaseException:
            for one in held:
                one.close()
            raise
        if self._prepared.capabilities.elsewhere:
            image = await self._place(image)
        self._image = image

    async def _place(self, image: Image) -> Image:
        """Has the driver bring all that is never changed to the host of the machine. A disk of the user's
        own gets its digest here, by which it is known there."""
        driver, capabilities = self._prepared.driver, self._prepared.capabilities
        assert isinstance(driver, Placing)
        root = image.parts["root"]
        if not root.sha256:
            digest = await trio.to_thread.run_sync(digest_of, root.path, abandon_on_cancel=True)
            image = replace(image, parts={**image.parts, "root": replace(root, sha256=digest)})
        contents = contents_of(image, self._build)
        meters = {
            content: Meter(f"{name} to {capabilities.elsewhere}", 0) for name, content in contents.items()
        }

        def told(content: Content, done: int, whole: int, waiting: bool) -> None:
            meter = meters[content]
            meter.total, meter.waiting = whole, waiting
            self._seen(meter.at(trio.current_time(), done))

        await driver.place(capabilities, list(contents.values()), told)
        return image

    async def _ensure_build(self, offered: Offered) -> Held:
        from kenaz_engine.images.builds import ensure_build

        self._build, held = await ensure_build(
            offered, default_cache(), watch=self._seen, offline=self._prepared.offline
        )
        return held

    def _seen(self, seen: Progress | Notice) -> None:
        if isinstance(seen, Notice):
            self._note_image(seen.text)
        self._watch(seen)

    def _note_image(self, text: str) -> None:
        """What a fetch falls back on is never silent."""
        self._recorder.append("note", {"about": "image", "text": text})

    async def _allocate(self, work: Work) -> None:
        root_format, config_format = disk_formats(self._prepared, self._image)
        root = self._layout.disk("root", root_format)
        config = self._layout.disk("config", config_format)
        build = self._build or (self._prepared.build.planned if self._prepared.build else None)

        if root_format == MADE_THERE:
            assert self._image is not None
            base = self._image.parts["root"]
            check_base(base.path, self._image.root_format, self._prepared.resolved.machine.disk)

        async def make_root() -> tuple[Made, None]:
            if self._image is None:
                root.mkdir(mode=0o700)
                return made_directory(root), None
            if root_format == "vhdx":
                return planned_file(root), None
            image, size = self._image, self._prepared.resolved.machine.disk
            with _naming(root):
                how = await create_disk(
                    root, root_format, base=image.root, base_format=image.root_format, size=size
                )
            made = made_file(root)
            return Made({**made.handle, "made": how}, made.release), None

        async def make_config() -> tuple[Made, None]:
            port = self._endpoint.port
            variables = guest_variables(self._prepared, self._layout, self._token, build, port=port)
            files = {ENVIRONMENT_FILE: environment_file(variables)}
            directory = config_format == "directory"
            with _naming(config):
                (write_directory if directory else write_config_disk)(config, files)
            return made_directory(config) if directory else made_file(config), None

        if root_format != MADE_THERE:
            kind = {"directory": "directory", "vhdx": "planned-file"}.get(root_format, "file")
            await work.ledger.acquire("disk", kind, {"path": str(root)}, make_root)
        await self._endpoint.open(work.ledger)
        kind = "directory" if config_format == "directory" else "file"
        await work.ledger.acquire("config", kind, {"path": str(config)}, make_config)

    async def _start_machine(self, work: Work) -> None:
        request = launch_request(
            self._prepared, self._layout, self._image, self._build, **self._endpoint.asked
        )
        plan = self._prepared.driver.plan(request)

        mark, died = self._layout.mark, self._helper_died
        helpers = [await start_helper(work, helper, mark, died) for helper in plan.helpers]
        if request.display == "vnc":
            helpers.append(await self._make_screen(work))

        async def make() -> tuple[Made, Machine]:
            machine = await work.start(partial(self._own_machine, plan, work.ledger.last, work))
            return Made(machine.handle, self._end_machine), machine

        uses = ("disk", "config", RESOURCE, *helpers)
        intent = {"driver": plan.driver, "argv": list(plan.argv), "mark": self._layout.mark, **plan.trace}
        machine = await work.ledger.acquire("vm", "machine", intent, make, uses=uses)
        try:
            self._endpoint.expect(machine.handle)
            await machine.ready()
        finally:
            self._machine_ready_or_not.set()

    async def _make_screen(self, work: Work) -> str:
        """A directory for the socket that the driver makes, so that it goes with it."""
        path = self._layout.screen

        async def make() -> tuple[Made, None]:
            path.mkdir(mode=0o700)
            return made_directory(path), None

        await work.ledger.acquire("screen", "directory", {"path": str(path)}, make)
        return "screen"

    async def _own_machine(
        self, plan: LaunchPlan, ledger_id: int, work: Work, *, task_status: trio.TaskStatus[Machine]
    ) -> None:
        """Holds the machine from its start until it is gone, and says so."""

        def alarm(name: str, line: str) -> None:
            data = {"pattern": name, "message": line[:ALARM_LENGTH]}
            work.put(Event("guest.panic", data, id=ledger_id))

        self._console = Console(self._layout.directory / "console.log", self._patterns(), alarm)
        try:
            launching = self._prepared.driver.launch(plan, self._endpoint.descriptors)
            async with launching as machine, trio.open_nursery() as nursery:
                self._machine = machine
                self._endpoint.handed_over()
                task_status.started(machine)
                nursery.start_soon(self._read_console, machine)
                async with trio.open_nursery() as watching:
                    watching.start_soon(self._end_without_helper, machine)
                    watching.start_soon(self._endpoint.watch, machine)
                    ended = await machine.wait()
                    watching.cancel_scope.cancel()
                self._machine_exited.set()
                nursery.cancel_scope.deadline = trio.current_time() + LAST_WORDS
                # What the driver says of a machine that did not start goes before, for it says more.
                await self._machine_ready_or_not.wait()
                if self._conversation is not None:
                    await self._conversation.last_words()
            clean = ended.clean and not self._helper_end
            data = {"clean": clean, "message": self._helper_end or ended.reason}
            work.put(Event("vm.exited", data, id=ledger_id))
        finally:
            self._machine_exited.set()
            self._machine_gone.set()
            self._console.close()

    def _helper_died(self, how: str) -> None:
        """The machine is as good as gone: what its channel loses now is no event of its own."""
        self._helper_end = self._helper_end or how
        self._machine_exited.set()
        self._helper_ended.set()

    async def _end_without_helper(self, machine: Machine) -> None:
        await self._helper_ended.wait()
        await machine.kill()

    def _patterns(self) -> list[tuple[str, str]]:
        patterns = self._image.console_patterns if self._image else CONSOLE_PATTERNS
        return [(event, pattern) for event, pattern in patterns if event in ALARMS]

    async def _read_console(self, machine: Machine) -> None:
        console = self._console
        assert console is not None
        silence = trio.CancelScope()

        async def hear_pauses() -> None:
            nonlocal silence
            while True:
                with silence:
                    await trio.sleep_forever()
                console.pause()
                silence = trio.CancelScope()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hear_pauses)
            try:
                async for data in machine.console():
                    console.feed(data)
                    waits = CONSOLE_PAUSE if console.unfinished else math.inf
                    silence.deadline = trio.current_time() + waits
            finally:
                console.pause()
            nursery.cancel_scope.cancel()

    async def _end_machine(self) -> None:
        assert self._machine is not None
        await self._machine.kill()
        await self._machine_gone.wait()

    async def _stop_machine(self, work: Work) -> None:
        """Presses the power button until the machine is gone: a guest still starting hears no press."""
        machine = self._machine
        while machine is not None and not self._machine_exited.is_set():
            try:
                await machine.powerdown()
            except DriverError:
                await unless_exiting(self._machine_exited, PRESS_AGAIN)
                raise
            with trio.move_on_after(PRESS_AGAIN):
                await machine.wait()
                return

    async def _kill_machine(self, work: Work) -> None:
        if self._machine is not None:
            await self._machine.kill()

    async def _release(self, work: Work) -> None:
        seconds = work.timeout if work.timeout is not None else math.inf
        left = await work.ledger.release_all(trio.current_time() + seconds)
        if left:
            raise ActivityError("; ".join(f"the {entry.resource} {entry.error}" for entry in left))


def _explained(function: ActivityFunction) -> ActivityFunction:
    """What the parts raise, as what the session reports: one line, and what to do."""

    async def explained(work: Work) -> Any:
        try:
            return await function(work)
        except DriverError as exc:
            hint = exc.hint or what_to_do(exc.__context__)
            raise ActivityError(str(exc), hint=hint, transient=exc.transient) from exc
        except ImageError as exc:
            hint = exc.hint or what_to_do(exc.__context__)
            raise ActivityError(str(exc), hint=hint, transient=exc.transient) from exc
        except TransportError as exc:
            raise ActivityError(str(exc), hint=exc.hint) from exc
        except (AcquireTimeout, RecordLost) as exc:
            raise ActivityError(str(exc)) from exc
        except OSError as exc:
            what = f"{exc.filename or 'the system'}: {exc.strerror or exc}"
            raise ActivityError(what, hint=what_to_do(exc)) from exc

    return explained


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A full disk shows in a write, which knows no path."""
    try:
        yield
    except OSError as exc:
        exc.filename = exc.filename or str(path)
        raise


def write_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """The config disk as a directory, for drivers that run no machine: 0700, its files 0400. On Windows what
    is read-only could not be removed."""
    mode = 0o600 if sys.platform == "win32" else 0o400
    path.mkdir(mode=0o700)
    for name, content in files.items():
        file = os.open(path / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(file, "wb") as stream:
            stream.write(content)
