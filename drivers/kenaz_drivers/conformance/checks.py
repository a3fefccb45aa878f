"""The checks, each with what the engine would do wrong without it. They are told apart by their names.

A check is an async function of a Kit. `quick` ones start no machine, or one for a moment; a driver whose
machines are slow is checked on those first.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import trio

from kenaz_drivers.conformance.kit import SOON, Kit, listening, refused
from kenaz_drivers.contract import DriverError, Exit, Machine

Check = Callable[[Kit], Awaitable[None]]

PURE: list[Check] = []
"""The checks of `probe`, `plan` and options."""

MACHINES: list[Check] = []
"""The checks that start machines."""

PROBE_DEADLINE = 15.0
"""Seconds that a first look at the host may take; the engine shows nothing meanwhile."""

PATIENCE = 0.3
"""Seconds in which nothing should happen."""

KILL_DEADLINE = 10.0
"""Seconds for a machine to be gone: what the lifecycles give `vm.kill`, twice."""


def pure(check: Check) -> Check:
    PURE.append(check)
    return check


def machine(check: Check) -> Check:
    MACHINES.append(check)
    return check


def check_id(check: Check) -> str:
    """The name of a check, for people."""
    return getattr(check, "__name__", "").replace("_", "-")


@contextmanager
def within(seconds: float) -> Iterator[None]:
    with trio.fail_after(seconds):
        yield


# --- probe, plan, options -----------------------------------------------------------------------------------


@pure
async def has_all_of_the_contract(kit: Kit) -> None:
    """An entry point that leads to something else shows at the first session otherwise."""
    driver = kit.driver
    assert driver.name == kit.name
    for method in ("probe", "plan", "launch", "release"):
        assert callable(getattr(driver, method)), method
    assert isinstance(driver.options_schema, Mapping)


@pure
async def probe_is_quick_and_says_the_same_again(kit: Kit) -> None:
    """`driver: auto` and `plan` must not differ by the moment."""
    with within(PROBE_DEADLINE):
        first = await kit.driver.probe(kit.arch, kit.options)
    with within(PROBE_DEADLINE):
        assert await kit.driver.probe(kit.arch, kit.options) == first


@pure
async def probe_explains_itself(kit: Kit) -> None:
    """`doctor` shows nothing but these reasons."""
    found = await kit.capabilities()
    assert found.arch == kit.arch
    assert found.reasons
    assert all(reason.text and "\n" not in reason.text for reason in found.reasons)
    assert found.transports
    assert found.disk_formats
    assert found.deadline_scale >= 1
    assert found.accelerator
    assert json.loads(json.dumps(dict(found.data))) == dict(found.data), "Capabilities.data is no plain JSON"


@pure
async def probe_of_an_unknown_architecture_raises_nothing(kit: Kit) -> None:
    """What is wrong with a host is a Reason; an exception would end `doctor`."""
    found = await kit.driver.probe("pdp11", kit.options)
    assert found.usable or any(not reason.ok for reason in found.reasons)


@pure
async def probe_can_be_cancelled_anywhere(kit: Kit) -> None:
    """The user may press Ctrl-C while a driver looks around."""

    async def probe() -> None:
        await kit.driver.probe(kit.arch, kit.options)

    await cancelled_everywhere(kit, probe)


@pure
async def plan_is_pure_and_stable(kit: Kit) -> None:
    """What `plan` shows is what `run` does."""
    request = await kit.request("waits")
    before = sorted(kit.directory.rglob("*"))
    plan = kit.driver.plan(request)
    assert kit.driver.plan(request) == plan
    assert kit.driver.plan(replace(request)) == plan
    assert plan.driver == kit.name
    assert sorted(kit.directory.rglob("*")) == before, "plan wrote something"


@pure
async def plan_is_the_same_in_another_process(kit: Kit) -> None:
    """A plan must not depend on hash seeds, on the directory one is in, or on the environment."""
    request = await kit.request("waits")
    code = (
        "import pickle, sys\n"
        "from kenaz_drivers.registry import load\n"
        "name, hexed = sys.argv[1:]\n"
        "print(repr(load(name).plan(pickle.loads(bytes.fromhex(hexed)))))\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "HOME": "/nonexistent", "LANG": "tlh", "USER": "q"}
    command = [sys.executable, "-c", code, kit.name, pickle.dumps(request).hex()]
    run = partial(trio.run_process, command, capture_stdout=True, capture_stderr=True, check=False)
    done = await run(cwd="/", env=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().strip() == repr(kit.driver.plan(request))


@pure
async def plan_can_be_printed_and_recorded(kit: Kit) -> None:
    """It is shown to people and goes into the journal."""
    plan = kit.driver.plan(await kit.request("waits"))
    assert all(isinstance(word, str) and word and "\0" not in word for word in plan.argv)
    for each in (plan.data, plan.trace, plan.environment, list(plan.notes), plan.stdin):
        assert json.loads(json.dumps(each, default=dict)) == json.loads(json.dumps(each, default=dict))
        assert "mappingproxy" not in json.dumps(each, default=dict)
    assert all(note and "\n" not in note for note in plan.notes)


@pure
async def plan_carries_nothing_of_the_environment(kit: Kit) -> None:
    """A guest that breaks out must not find the launcher's secrets."""
    os.environ["KENAZ_CHECK_CANARY"] = "canary-7f3a"
    try:
        plan = kit.driver.plan(await kit.request("waits"))
    finally:
        del os.environ["KENAZ_CHECK_CANARY"]
    assert "canary-7f3a" not in repr(plan)


@pure
async def plan_uses_the_mark(kit: Kit) -> None:
    """Whatever a launch makes is found by it, also when nobody saw it made."""
    if not kit.lives_in_process:
        request = await kit.request("waits")
        assert kit.driver.plan(request) != kit.driver.plan(replace(request, mark="another"))


@pure
async def plan_refuses_a_transport_that_it_does_not_have(kit: Kit) -> None:
    """One line now, instead of a guest that never dials."""
    request = await kit.request("waits")
    with refused():
        kit.driver.plan(replace(request, transport="carrier-pigeon"))


@pure
async def plan_refuses_what_no_command_line_can_hold(kit: Kit) -> None:
    """A NUL in a path must not become another path."""
    if kit.lives_in_process:
        return
    request = await kit.request("waits")
    disks = tuple(replace(disk, path=f"{disk.path}\0") for disk in request.disks)
    with refused():
        kit.driver.plan(replace(request, disks=disks, agent=(*request.agent, "\0")))


@pure
async def plan_of_odd_paths_is_what_it_says(kit: Kit) -> None:
    """A path with commas, quotes and spaces is one path still."""
    request = await kit.request("waits")
    odd = replace(request, disks=tuple(replace(d, path=f"/a b,,c='&<\"ü{d.role}") for d in request.disks))
    plan = kit.driver.plan(odd)
    assert plan == kit.driver.plan(odd)
    assert plan != kit.driver.plan(request)


@pure
async def options_have_a_closed_schema(kit: Kit) -> None:
    """A typing error in `driverOptions` must be told, with its line."""
    import jsonschema

    schema = kit.driver.options_schema
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid({})
    assert not validator.is_valid({"no-such-option": 1})
    assert validator.is_valid(dict(kit.options)), "the options that the checks were given are not valid"


@pure
async def options_explain_themselves(kit: Kit) -> None:
    """Editors show title, description and examples."""
    import jsonschema

    def look(schema: Mapping[str, Any], path: str) -> None:
        for name, each in schema.get("properties", {}).items():
            assert {"title", "description"} <= set(each), f"{path}{name} is not described"
            for value in [*each.get("examples", ()), *([each["default"]] if each.get("default") else ())]:
                jsonschema.validate(value, each, jsonschema.Draft202012Validator)
            look(each, f"{path}{name}.")

    look(kit.driver.options_schema, "")


# --- a machine's life ---------------------------------------------------------------------------------------


@machine
async def a_guest_runs_and_is_heard(kit: Kit) -> None:
    """The console is what a failing guest is judged by."""
    async with kit.running("waits") as running:
        assert b"up" in running.printed


@machine
async def the_channel_is_connected(kit: Kit) -> None:
    """Whoever the transport says connects does so, by the time that the guest is up."""
    request = await kit.request("waits")
    if not request.channel:
        return
    async with listening(request.channel) as connected:
        from kenaz_drivers.conformance.guests import guests_for

        plan = kit.driver.plan((kit.guests or guests_for(request, kit.name))(request, "waits"))
        async with kit.driver.launch(plan, {}) as made, trio.open_nursery() as nursery:
            nursery.start_soon(drain, made)
            await made.ready()
            with within(SOON):
                await connected.wait()
            nursery.cancel_scope.cancel()


@machine
async def the_handle_is_json_and_stays(kit: Kit) -> None:
    """It goes into the journal as soon as the machine is made, and never again."""
    async with kit.planned("waits") as plan, kit.driver.launch(plan, {}) as made:
        handle = dict(made.handle)
        assert handle
        assert json.loads(json.dumps(handle)) == handle
        await made.ready()
        assert dict(made.handle) == handle


@machine
async def wait_waits_and_may_be_given_up(kit: Kit) -> None:
    """Watchers come and go."""
    async with kit.running("waits") as running:
        for _ in range(2):
            with trio.move_on_after(PATIENCE) as scope:
                await running.machine.wait()
            assert scope.cancelled_caught
        with trio.move_on_after(PATIENCE) as scope:
            await running.machine.port_closed()
        await running.machine.ready()


@machine
async def all_who_wait_hear_the_same_end(kit: Kit) -> None:
    """Several tasks wait, some of them late."""
    ends: list[Exit] = []

    async def hear(made: Machine) -> None:
        ends.append(await made.wait())

    async with kit.running("powers off") as running, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(hear, running.machine)
        with within(SOON):
            await running.machine.wait()
        nursery.start_soon(hear, running.machine)
    assert len(ends) == 4
    assert all(end == ends[0] for end in ends)


@machine
async def a_power_off_by_the_guest_is_clean(kit: Kit) -> None:
    """A session that ends well is told by this alone."""
    async with kit.running("powers off") as running:
        with within(SOON):
            ended = await running.machine.wait()
    assert ended.clean, ended
    assert ended.reason


@machine
async def a_crash_of_the_guest_is_not_clean(kit: Kit) -> None:
    """No success may be claimed of it."""
    async with kit.running("crashes") as running:
        with within(SOON):
            ended = await running.machine.wait()
    assert not ended.clean, ended
    assert ended.reason


@machine
async def the_power_button_is_obeyed(kit: Kit) -> None:
    """The way in which sessions end."""
    async with kit.running("obeys") as running:
        with within(SOON):
            while True:  # a guest that has said that it is up may listen a moment later
                await running.machine.powerdown()
                with trio.move_on_after(1):
                    ended = await running.machine.wait()
                    break
    assert ended.clean, ended


@machine
async def a_deaf_guest_goes_on(kit: Kit) -> None:
    """The button returns at once, and does no more than it says."""
    async with kit.running("waits") as running:
        with within(KILL_DEADLINE):
            await running.machine.powerdown()
        with trio.move_on_after(PATIENCE) as scope:
            await running.machine.wait()
        assert scope.cancelled_caught


@machine
async def the_button_of_a_dead_machine_hangs_nobody(kit: Kit) -> None:
    """The guest may power off in the moment in which it is told to."""
    async with kit.running("waits") as running:
        await running.machine.kill()
        with within(KILL_DEADLINE), suppress(DriverError):
            await running.machine.powerdown()


@machine
async def kill_ends_the_machine_before_it_returns(kit: Kit) -> None:
    """What comes next removes its disk."""
    async with kit.running("waits") as running:
        with within(KILL_DEADLINE):
            await running.machine.kill()
        with within(0.5):
            ended = await running.machine.wait()
        assert not ended.clean, ended
        assert ended.reason


@machine
async def kill_may_be_called_by_many_and_often(kit: Kit) -> None:
    """A release and an abort meet."""
    async with kit.running("waits") as running:
        with within(KILL_DEADLINE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(running.machine.kill)
                nursery.start_soon(running.machine.kill)
            await running.machine.kill()


@machine
async def kill_is_not_cut_short(kit: Kit) -> None:
    """A cancelled kill would leave half a machine."""
    async with kit.running("waits") as running:
        with trio.CancelScope() as scope:
            scope.cancel()
            await running.machine.kill()
        with within(KILL_DEADLINE):
            await running.machine.wait()


@machine
async def kill_before_it_is_ready(kit: Kit) -> None:
    """An abort while the machine starts."""
    async with kit.planned("waits") as plan, kit.driver.launch(plan, {}) as made:
        with within(KILL_DEADLINE):
            await made.kill()
            assert not (await made.wait()).clean


@machine
async def ready_of_a_dead_machine_raises(kit: Kit) -> None:
    """Nobody may connect to what is not there."""
    async with kit.planned("waits") as plan, kit.driver.launch(plan, {}) as made:
        await made.kill()
        with within(KILL_DEADLINE), refused():
            await made.ready()


@machine
async def leaving_the_context_ends_the_machine(kit: Kit) -> None:
    """Whatever happens in it."""
    async with kit.planned("waits") as plan:
        async with kit.driver.launch(plan, {}) as made:
            await made.ready()
        with within(1):
            assert not (await made.wait()).clean


@machine
async def what_the_body_raises_comes_out_as_it_is(kit: Kit) -> None:
    """The engine tells errors apart by their types."""

    class Own(Exception):
        pass

    async with kit.planned("waits") as plan:
        try:
            async with kit.driver.launch(plan, {}) as made:
                raise Own
        except Own:
            pass
        with within(1):
            await made.wait()


@machine
async def the_console_ends_with_the_machine(kit: Kit) -> None:
    """Its last lines are waited for, and no longer."""
    async with kit.running("waits") as running:
        await running.machine.kill()
        with within(SOON):
            await running.console_ended.wait()


@machine
async def a_flood_comes_in_bounded_pieces(kit: Kit) -> None:
    """A hostile guest costs bounded memory."""
    async with kit.planned("floods") as plan, kit.driver.launch(plan, {}) as made:
        await read_for(made, 100_000)
        with within(KILL_DEADLINE):
            await made.kill()


@machine
async def a_flood_that_nobody_reads_does_not_keep_the_machine(kit: Kit) -> None:
    """A session that ends reads no more."""
    async with kit.planned("floods") as plan, kit.driver.launch(plan, {}) as made:
        await read_for(made, 100)
        await trio.sleep(PATIENCE)
        with within(KILL_DEADLINE):
            await made.kill()


async def read_for(made: Machine, size: int) -> None:
    """Reads the console until the machine is ready and so many bytes have come."""
    ready = trio.Event()

    async def read() -> None:
        total = 0
        async for data in made.console():
            assert 0 < len(data) <= 1 << 20
            total += len(data)
            if total > size and ready.is_set():
                return

    with within(SOON):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await made.ready()
            ready.set()


@machine
async def a_launch_that_fails_says_why_and_leaves_nothing(kit: Kit) -> None:
    """It fails when it is launched or when it should be ready: the engine takes both."""
    async with kit.planned("broken") as plan:
        with within(SOON), refused():
            async with kit.driver.launch(plan, {}) as made:
                await made.ready()


@machine
async def after_a_failure_the_next_launch_is_as_good_as_any(kit: Kit) -> None:
    """Retries are what lifecycles do."""
    async with kit.planned("broken") as plan:
        with within(SOON), refused():
            async with kit.driver.launch(plan, {}) as made:
                await made.ready()
    async with kit.running("waits"):
        pass


@machine
async def a_plan_can_be_launched_again(kit: Kit) -> None:
    """When a machine is gone, so is all that would stand in the way of the next."""
    async with kit.planned("waits") as plan:
        for _ in range(2):
            async with kit.driver.launch(plan, {}) as made:
                await made.ready()


@machine
async def two_at_once_do_not_know_each_other(kit: Kit) -> None:
    """Sessions share nothing."""
    async with kit.running("waits") as one, kit.running("waits") as other:
        assert dict(one.machine.handle) != dict(other.machine.handle)
        await one.machine.kill()
        with trio.move_on_after(PATIENCE) as scope:
            await other.machine.wait()
        assert scope.cancelled_caught
        await other.machine.ready()


# --- release ------------------------------------------------------------------------------------------------


@machine
async def release_by_handle_ends_it_and_a_second_one_finds_nothing(kit: Kit) -> None:
    """Releasing is idempotent, for a reaper may be killed, too."""
    async with kit.running("waits") as running:
        handle = running.machine.handle
        for _ in range(2):
            with within(SOON):
                await kit.driver.release(handle)
        with within(SOON):
            assert not (await running.machine.wait()).clean


@machine
async def release_from_another_process(kit: Kit) -> None:
    """`reap` has nothing but the journal."""
    async with kit.running("waits") as running:
        await kit.release_elsewhere(json.loads(json.dumps(dict(running.machine.handle))))
        if not kit.lives_in_process:
            with within(SOON):
                await running.machine.wait()


@machine
async def release_by_mark_from_another_process(kit: Kit) -> None:
    """The launcher died before it could write the handle down."""
    request = await kit.request("waits")
    async with kit.running("waits", mark=request.mark) as running:
        await kit.release_elsewhere({"mark": request.mark, **running.plan.trace})
        if not kit.lives_in_process:
            with within(SOON):
                await running.machine.wait()


@machine
async def release_touches_nothing_else(kit: Kit) -> None:
    """Least of all another session's machine."""
    async with kit.running("waits") as kept, kit.running("waits") as other:
        await other.machine.kill()
        await kit.driver.release(other.machine.handle)
        await kit.driver.release({"mark": "check-of-nobody-0123456789abcdef", **kept.plan.trace})
        with trio.move_on_after(PATIENCE) as scope:
            await kept.machine.wait()
        assert scope.cancelled_caught


@machine
async def a_killed_launcher_leaves_what_release_can_end(kit: Kit) -> None:
    """The machine goes by itself, or by its handle; then the same plan can be launched again."""
    if kit.lives_in_process:
        return
    async with kit.planned("waits") as plan:
        code = (
            "import json, pickle, sys, trio\n"
            "from kenaz_drivers.registry import load\n"
            "async def main():\n"
            "    plan = pickle.loads(bytes.fromhex(sys.argv[2]))\n"
            "    async with load(sys.argv[1]).launch(plan, {}) as machine:\n"
            "        await machine.ready()\n"
            "        print(json.dumps(dict(machine.handle)), flush=True)\n"
            "        await trio.sleep_forever()\n"
            "trio.run(main)\n"
        )
        command = [sys.executable, "-c", code, kit.name, pickle.dumps(plan).hex()]
        launcher = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
        said = b""
        assert launcher.stdout is not None
        async with launcher.stdout:
            with within(SOON):
                while not said.endswith(b"\n"):
                    data = await launcher.stdout.receive_some()
                    assert data, "the machine did not start"
                    said += data
            launcher.kill()
            await launcher.wait()
        with within(SOON):
            await kit.driver.release(json.loads(said))
        for path in Path(plan.data.get("console", "/nowhere")), *Path(kit.directory).rglob("console*"):
            path.unlink(missing_ok=True)  # the engine removes the directory of a dead session's sockets
        async with kit.driver.launch(plan, {}) as made:
            await made.ready()


# --- cancellation -------------------------------------------------------------------------------------------


@machine
async def a_launch_can_be_cancelled_anywhere(kit: Kit) -> None:
    """From the first step to a machine that runs, nothing is left whenever it is cut short."""
    async with kit.planned("waits") as plan:

        async def live() -> None:
            async with kit.driver.launch(plan, {}) as made, trio.open_nursery() as nursery:
                nursery.start_soon(drain, made)
                await made.ready()
                nursery.cancel_scope.cancel()

        await cancelled_everywhere(kit, live)


@machine
async def a_power_down_can_be_cancelled_anywhere(kit: Kit) -> None:
    """The machine is as good as before."""
    async with kit.running("waits") as running:
        await cancelled_everywhere(kit, running.machine.powerdown)
        await running.machine.ready()


@machine
async def a_release_can_be_cancelled_anywhere(kit: Kit) -> None:
    """Another one then finishes it."""
    async with kit.running("waits") as running:
        handle = running.machine.handle

        async def release() -> None:
            await kit.driver.release(handle)

        await cancelled_everywhere(kit, release)
        with within(SOON):
            await kit.driver.release(handle)
            await running.machine.wait()


class Steps(trio.abc.Instrument):
    """Cancels a scope before a task takes its nth step."""

    def __init__(self, task: trio.lowlevel.Task, number: float, scope: trio.CancelScope) -> None:
        self._task, self._left, self._scope = task, number, scope
        self.taken = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self.taken += 1
            if self.taken > self._left:
                self._scope.cancel()


async def cancelled_everywhere(kit: Kit, act: Callable[[], Awaitable[None]]) -> None:
    """Acts again and again, each time cancelled one step later, until it gets to its end.

    Unless the kit is thorough, steps are left out, ever more of them: the first ones differ most.
    """
    number = 0
    while True:
        with trio.CancelScope() as scope:
            counting = Steps(trio.lowlevel.current_task(), number, scope)
            trio.lowlevel.add_instrument(counting)
            try:
                await act()
            finally:
                trio.lowlevel.remove_instrument(counting)
        if not scope.cancel_called:
            return
        number += 1 if kit.thorough else max(1, math.ceil(number / 2))
        assert number < 1000, "it never comes to an end"


async def drain(made: Machine) -> None:
    """Reads the console to its end."""
    async for _ in made.console():
        pass


CHECKS: tuple[Check, ...] = (*PURE, *MACHINES)
