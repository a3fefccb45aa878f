"""The lifecycle standard-reconnect: a guest is lost and comes back, its machine and its harness stay."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from kenaz_engine.channel.connection import Connection
from kenaz_engine.channel.framing import LengthPrefixed
from kenaz_engine.guest.build import build

SPEC = Path(__file__).parents[2] / "specs/sessions/reconnect.yaml"
SECONDS = 120.0

Message = dict[str, Any]

needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-system-x86_64") is None or shutil.which("apt-get") is None,
    reason="needs QEMU and a Debian host",
)


class Harness:
    """Listens where the launcher dials, and notes what comes."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.heard: list[Message] = []

    async def receive(self) -> Message | None:
        payload = await self._connection.receive()
        if payload is None:
            return None
        message: Message = json.loads(payload)
        self.heard.append(message)
        return message

    async def until(self, kind: str) -> Message:
        while (message := await self.receive()) is not None:
            if message["kind"] == kind:
                return message
        raise AssertionError(f"no {kind} among {self.heard}")

    async def say(self, **message: Any) -> None:
        self._connection.put(json.dumps(message).encode())
        await self._connection.flush()


Play = Callable[[Harness], Awaitable[None]]


async def session(
    directory: Path, driver: str, words: list[str], play: Play
) -> tuple[Message, list[Message]]:
    """Runs a session whose harness plays; its result, and the records of its journal."""
    path = directory / "harness"
    listening = trio.socket.socket(trio.socket.AF_UNIX)
    await listening.bind(str(path))
    listening.listen()
    settings = {"spec.driver": driver, "spec.workbench.args": json.dumps(words)}
    sets = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    program = [sys.executable, "-m", "kenaz_engine.cli.main", "run", str(SPEC), "--json"]

    async def serve() -> None:
        with listening:
            connected, _ = await listening.accept()
        connection = Connection(trio.SocketStream(connected), LengthPrefixed(), queue=1 << 20, write=10)
        try:
            await play(Harness(connection))
        finally:
            await connection.aclose()

    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            ran = await trio.run_process(
                [*program, "--harness", f"unix:{path}", *sets],
                env={**os.environ, "XDG_STATE_HOME": str(directory)},
                capture_stdout=True,
                check=False,
            )
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    return lines[-1], lines[:-1]


def way(records: list[Message]) -> list[str]:
    return [record["state"] for record in records if record["kind"] == "entered"]


USUAL = ["resolving", "allocating", "booting", "connecting", "running"]
ENDING = ["draining", "stopping", "releasing"]


async def answer_then_end(harness: Harness) -> None:
    """Sees the guest go and come back, answers one prompt, and ends the session."""
    opened = await harness.until("session.open")
    assert "tools" in opened["capabilities"]
    assert (await harness.receive()) == {"kind": "guest.lost"}
    assert ((await harness.receive()) or {})["kind"] == "guest.back"
    prompt = await harness.until("prompt")
    await harness.say(kind="prompt.result", id=prompt["id"], text="")
    await harness.say(kind="end")
    assert (await harness.until("session.close"))["outcome"] == "success"


def check(result: Message, records: list[Message], reason: str) -> None:
    assert (result["success"], result["exit"], result["left"]) == (True, 0, [])
    assert way(records) == [*USUAL, "reconnecting", "running", *ENDING]
    (lost,) = [r for r in records if r["kind"] == "event" and r["type"] == "channel.lost"]
    assert lost["data"]["message"] == reason
    channels = [r for r in records if r.get("resource") == "channel"]
    assert [r["kind"] for r in channels] == ["intent", "acquired", "released"] * 2
    machines = [r["kind"] for r in records if r.get("resource") == "vm"]
    assert machines == ["intent", "acquired", "released"]


async def test_a_connection_that_is_cut_is_made_again(tmp_path: Path) -> None:
    words = ["hangup", "read:/nothing"]
    result, records = await session(tmp_path, "process", words, answer_then_end)
    check(result, records, "the guest closed the channel without a bye")


async def test_a_guest_that_resumes_is_not_missed(tmp_path: Path) -> None:
    """Its connection breaks in the middle of a message, twice. Its harness hears each once, and no more."""

    async def play(harness: Harness) -> None:
        await harness.until("session.open")
        for _ in range(3):
            message = await harness.receive()
            assert message is not None
            await harness.say(kind="prompt.result", id=message["id"], text="")
        await harness.say(kind="end")
        await harness.until("session.close")
        said = [m.get("text") for m in harness.heard[1:4]]
        assert said == ["said in two pieces", "said in two pieces", "/nothing does not exist"]
        assert [m["kind"] for m in harness.heard[4:]] == ["session.close"]

    result, records = await session(tmp_path, "process", ["cut", "cut", "read:/nothing"], play)
    assert (result["success"], result["exit"], result["left"]) == (True, 0, [])
    assert way(records) == [*USUAL, *(["reconnecting", "running"] * 2), *ENDING]
    hellos = [r["outcome"] for r in records if r["kind"] == "channel" and r["message"] == "hello"]
    assert hellos == ["taken", "resumed", "resumed"]


async def test_requests_of_both_sides_end_with_the_guest_that_is_lost(tmp_path: Path) -> None:
    """The guest hangs up while each side waits for the other. Late answers hit nobody."""

    async def play(harness: Harness) -> None:
        first = await harness.until("prompt")
        await harness.say(kind="prompt", id="mine", text="")
        await harness.say(kind="prompt.result", id=first["id"], text="")
        assert (await harness.until("prompt.error"))["code"] == "gone"
        assert ((await harness.receive()) or {})["kind"] == "guest.lost"
        assert ((await harness.receive()) or {})["kind"] == "guest.back"
        second = await harness.until("prompt")
        assert second["id"] != first["id"]
        await harness.say(kind="prompt.result", id=second["id"], text="")
        await harness.say(kind="end")
        await harness.until("session.close")

    words = ["read:/one", "hangup", "read:/two"]
    result, records = await session(tmp_path, "process", words, play)
    assert (result["success"], result["left"]) == (True, [])
    assert way(records).count("reconnecting") == 1


async def test_the_sixth_loss_is_one_too_many(tmp_path: Path) -> None:
    async def play(harness: Harness) -> None:
        assert (await harness.until("session.close"))["outcome"] == "failure"
        assert [m["kind"] for m in harness.heard].count("guest.lost") == 6
        assert [m["kind"] for m in harness.heard].count("guest.back") == 5

    result, records = await session(tmp_path, "process", ["hangup"] * 6, play)
    assert (result["success"], result["exit"], result["left"]) == (False, 1, [])
    assert result["verdict"].startswith("channel lost too often")
    assert way(records).count("reconnecting") == 5


async def test_a_guest_that_dies_is_not_waited_for(tmp_path: Path) -> None:
    """Without a machine, the agent is the guest."""

    async def play(harness: Harness) -> None:
        await harness.until("session.close")

    result, records = await session(tmp_path, "process", ["exit:9"], play)
    assert "reconnecting" not in way(records)
    assert (result["success"], result["left"]) == (False, [])


@needs_qemu
@pytest.mark.parametrize("word", ["hangup", "once:exit:9"])
async def test_an_agent_in_a_machine_starts_again(tmp_path: Path, word: str) -> None:
    """Its port stays open on the host's side: a mark tells."""
    build("x86_64")
    result, records = await session(tmp_path, "qemu", [word, "read:/nothing"], answer_then_end)
    check(result, records, "the guest's agent started again")
