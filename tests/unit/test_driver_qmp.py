"""QMP: the codec alone, and the client against a scripted QEMU on trio's memory streams."""

import json
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from kenaz_drivers.qemu.driver import QemuMachine
from kenaz_drivers.qemu.qmp import (
    MAX_LINE,
    Event,
    Greeting,
    QmpClient,
    QmpCodec,
    QmpError,
    QmpRefused,
    Reply,
)

GREETING = b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": []}}\r\n'


def test_each_kind_of_message_is_told_from_the_others():
    lines = [
        b'{"return": {"status": "running"}, "id": 4}',
        b'{"id": 5, "error": {"class": "GenericError", "desc": "no such thing"}}',
        b'{"event": "SHUTDOWN", "data": {"guest": true}, "timestamp": {}}',
        b"",
    ]
    assert QmpCodec().feed(GREETING + b"\r\n".join(lines)) == [
        Greeting("7.2.22"),
        Reply(4, value={"status": "running"}),
        Reply(5, error="no such thing"),
        Event("SHUTDOWN", {"guest": True}),
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"qemu: hello",
        b"[]",
        b"17",
        b"{}",
        b'{"return": 1}',
        b'{"return": 1, "id": null}',
        b'{"error": "x", "id": 1}',
        b'{"event": "X", "data": 3}',
        b'{"QMP": {}}',
        b"\xff\xfe",
        b"[" * 100_000,
        b"x" * (MAX_LINE + 1),
    ],
)
def test_what_is_no_qmp_is_an_error_and_no_traceback(line):
    with pytest.raises(QmpError):
        QmpCodec().feed(line + b"\n")


def test_an_endless_line_is_not_kept():
    with pytest.raises(QmpError, match="line of more than"):
        QmpCodec().feed(b"x" * (MAX_LINE + 1))


def test_commands_are_numbered_and_arguments_left_out_when_there_are_none():
    codec = QmpCodec()
    assert codec.command("quit", {}) == (1, b'{"execute": "quit", "id": 1}\n')
    number, data = codec.command("device_del", {"id": "x"})
    assert json.loads(data) == {"execute": "device_del", "id": number, "arguments": {"id": "x"}}


class Qemu:
    """The other end of the monitor."""

    def __init__(self, stream):
        self.stream = stream
        self.rest = b""

    async def say(self, *messages):
        for message in messages:
            await self.stream.send_all(json.dumps(message).encode() + b"\r\n")

    async def command(self):
        while b"\n" not in self.rest:
            self.rest += await self.stream.receive_some()
        line, _, self.rest = self.rest.partition(b"\n")
        return json.loads(line)

    async def serve(self, *names, **values):
        """Answers the commands expected, each with its value from `values`."""
        for name in names:
            command = await self.command()
            assert command["execute"] == name
            await self.say({"return": values.get(name, {}), "id": command["id"]})


@pytest.fixture
async def monitor(nursery):
    ours, theirs = trio.testing.memory_stream_pair()
    events = []
    client = QmpClient(ours, events.append)
    nursery.start_soon(client.run)
    await theirs.send_all(GREETING)
    return client, Qemu(theirs), events


async def test_negotiates_once_and_answers_in_any_order(monitor, nursery):
    client, qemu, events = monitor
    nursery.start_soon(qemu.serve, "qmp_capabilities")
    await client.negotiate()
    answers = {}

    async def ask(name):
        answers[name] = await client.execute(name)

    async with trio.open_nursery() as asking:
        asking.start_soon(ask, "a")
        asking.start_soon(ask, "b")
        first, second = await qemu.command(), await qemu.command()
        await qemu.say({"event": "STOP", "data": {}}, {"return": 2, "id": second["id"]})
        await qemu.say({"return": 1, "id": first["id"]})
    assert answers == {first["execute"]: 1, second["execute"]: 2}
    assert events == [Event("STOP")]


async def test_a_refusal_leaves_the_monitor_well(monitor, nursery):
    client, qemu, _ = monitor
    nursery.start_soon(qemu.serve, "qmp_capabilities")
    await client.negotiate()

    async def refuse():
        command = await qemu.command()
        await qemu.say({"error": {"class": "X", "desc": "not now"}, "id": command["id"]})
        await qemu.serve("query-status", **{"query-status": "fine"})

    nursery.start_soon(refuse)
    with pytest.raises(QmpRefused, match="cont: not now"):
        await client.execute("cont")
    assert await client.execute("query-status") == "fine"


async def test_the_end_of_qemu_fails_what_waits_and_what_comes_later(monitor, nursery):
    client, qemu, _ = monitor

    async def vanish():
        await qemu.serve("qmp_capabilities")
        await qemu.command()
        await qemu.say({"event": "SHUTDOWN", "data": {}})
        await qemu.stream.aclose()

    nursery.start_soon(vanish)
    with pytest.raises(QmpError, match="closed its monitor"):
        await client.execute("quit")
    await client.ended.wait()
    with pytest.raises(QmpError, match="closed its monitor"):
        await client.execute("quit")


async def test_no_greeting_at_all_is_the_end_too():
    ours, theirs = trio.testing.memory_stream_pair()
    client = QmpClient(ours, lambda event: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        await theirs.aclose()
        with pytest.raises(QmpError, match="closed its monitor"):
            await client.negotiate()


async def test_garbage_breaks_the_monitor_with_its_own_words(monitor):
    client, qemu, _ = monitor
    await qemu.stream.send_all(b"Segmentation fault\n")
    await client.ended.wait()
    with pytest.raises(QmpError, match="no QMP: b'Segmentation fault'"):
        await client.execute("quit")


async def test_the_answer_to_a_command_that_was_given_up_is_dropped(monitor, nursery, autojump_clock):
    client, qemu, _ = monitor
    nursery.start_soon(qemu.serve, "qmp_capabilities")
    await client.negotiate()
    with trio.move_on_after(0.01):
        await client.execute("slow")
    command = await qemu.command()
    await qemu.say({"return": {}, "id": command["id"]})
    nursery.start_soon(qemu.serve, "fast")
    assert await client.execute("fast") == {}


async def test_a_qemu_that_does_not_read_does_not_hold_us(autojump_clock):
    ours, _theirs = trio.testing.lockstep_stream_pair()  # sending waits until the other end has read
    client = QmpClient(ours, lambda event: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        await _theirs.send_all(GREETING)
        with pytest.raises(QmpError, match="does not read"):
            await client.execute("quit")
        assert trio.current_time() < 2
        nursery.cancel_scope.cancel()


async def test_sending_into_a_closed_monitor_is_an_ordinary_error(nursery):
    ours, theirs = trio.testing.memory_stream_pair()
    client = QmpClient(ours, lambda event: None)
    nursery.start_soon(client.run)
    await theirs.send_all(GREETING)
    await trio.testing.wait_all_tasks_blocked()
    theirs.receive_stream.close()
    with pytest.raises(QmpError):
        await client.execute("quit")


async def test_a_port_is_closed_when_qemu_says_so_of_this_moment():
    """QEMU tells of a port once a second at the most: the event is a reason to ask, and no answer."""
    ours, theirs = trio.testing.memory_stream_pair()
    machine = QemuMachine(SimpleNamespace(handle={}), ours, theirs)
    states = [True, False]
    asked = 0

    def event(state, name="channel"):
        data = {"id": name, "open": state}
        return json.dumps({"event": "VSERPORT_CHANGE", "data": data}).encode() + b"\n"

    async def qemu():
        nonlocal asked
        await theirs.send_all(GREETING)
        # Never opened, or another's: nobody asks.
        await theirs.send_all(event(False) + event(True, "other"))
        await trio.testing.wait_all_tasks_blocked()
        assert asked == 0
        await theirs.send_all(event(True))
        async for data in theirs:
            for line in data.splitlines():
                command = json.loads(line)
                value = {}
                if command["execute"] == "query-chardev":
                    asked += 1
                    value = [
                        {"label": "console", "frontend-open": True},
                        {"label": "channel", "frontend-open": states.pop(0)},
                    ]
                await theirs.send_all(json.dumps({"return": value, "id": command["id"]}).encode() + b"\n")
                if asked == 1 and value:
                    await theirs.send_all(event(False))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.serve_monitor)
        nursery.start_soon(qemu)
        with trio.fail_after(5):
            await machine.port_closed()
        assert asked == 2
        nursery.cancel_scope.cancel()


async def test_the_port_of_a_machine_that_ends_is_never_said_to_be_closed(autojump_clock):
    ours, theirs = trio.testing.memory_stream_pair()
    machine = QemuMachine(SimpleNamespace(handle={}), ours, theirs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.serve_monitor)
        await theirs.send_all(GREETING)
        await theirs.send_all(b'{"event": "VSERPORT_CHANGE", "data": {"id": "channel", "open": true}}\n')
        await trio.testing.wait_all_tasks_blocked()
        await theirs.aclose()
        with trio.move_on_after(60) as waiting:
            await machine.port_closed()
        assert waiting.cancelled_caught
        nursery.cancel_scope.cancel()
