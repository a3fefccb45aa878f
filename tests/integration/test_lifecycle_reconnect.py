"""The lifecycle standard-reconnect: a guest is lost and comes back, its machine and its harness stay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kenaz_engine.channel.connection import Connection
from kenaz_engine.guest.build import build

SPEC = Path(__file__).parents[2] / "specs/sessions/reconnect.yaml"
SECONDS = 240.0

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


Run = Callable[[str, list[str], Play], Awaitable[tuple[Message, list[Message]]]]


@pytest.fixture
def session(with_harness: Callable[..., Awaitable[tuple[Message, list[Message]]]]) -> Run:
    """Runs a session of that driver whose guest does what the words say and whose harness plays."""

    async def run(driver: str, words: list[str], play: Play) -> tuple[Message, list[Message]]:
        sets = [f"spec.driver={driver}", f"spec.workbench.args={json.dumps(words)}"]
        return await with_harness(SPEC, sets, lambda it: play(Harness(it)), seconds=SECONDS)

    return run


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


def check(result: Message, records: list[Message], *reasons: str) -> None:
    assert (result["success"], result["exit"], result["left"]) == (True, 0, [])
    assert way(records) == [*USUAL, "reconnecting", "running", *ENDING]
    (lost,) = [r for r in records if r["kind"] == "event" and r["type"] == "channel.lost"]
    assert lost["data"]["message"] in reasons
    channels = [r for r in records if r.get("resource") == "channel"]
    assert [r["kind"] for r in channels] == ["intent", "acquired", "released"] * 2
    machines = [r["kind"] for r in records if r.get("resource") == "vm"]
    assert machines == ["intent", "acquired", "released"]


async def test_a_connection_that_is_cut_is_made_again(session: Run) -> None:
    words = ["hangup", "read:/nothing"]
    result, records = await session("process", words, answer_then_end)
    check(result, records, "the guest closed the channel without a bye")


async def test_a_guest_that_resumes_is_not_missed(session: Run) -> None:
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

    result, records = await session("process", ["cut", "cut", "read:/nothing"], play)
    assert (result["success"], result["exit"], result["left"]) == (True, 0, [])
    assert way(records) == [*USUAL, *(["reconnecting", "running"] * 2), *ENDING]
    hellos = [r["outcome"] for r in records if r["kind"] == "channel" and r["message"] == "hello"]
    assert hellos == ["taken", "resumed", "resumed"]


async def test_requests_of_both_sides_end_with_the_guest_that_is_lost(session: Run) -> None:
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
    result, records = await session("process", words, play)
    assert (result["success"], result["left"]) == (True, [])
    assert way(records).count("reconnecting") == 1


async def test_the_sixth_loss_is_one_too_many(session: Run) -> None:
    async def play(harness: Harness) -> None:
        assert (await harness.until("session.close"))["outcome"] == "failure"
        assert [m["kind"] for m in harness.heard].count("guest.lost") == 6
        assert [m["kind"] for m in harness.heard].count("guest.back") == 5

    result, records = await session("process", ["hangup"] * 6, play)
    assert (result["success"], result["exit"], result["left"]) == (False, 1, [])
    assert result["verdict"].startswith("channel lost too often")
    assert way(records).count("reconnecting") == 5


async def test_a_guest_that_dies_is_not_waited_for(session: Run) -> None:
    """Without a machine, the agent is the guest."""

    async def play(harness: Harness) -> None:
        await harness.until("session.close")

    result, records = await session("process", ["exit:9"], play)
    assert "reconnecting" not in way(records)
    assert (result["success"], result["left"]) == (False, [])


@needs_qemu
@pytest.mark.parametrize("word", ["hangup", "once:exit:9"])
async def test_an_agent_in_a_machine_starts_again(session: Run, word: str) -> None:
    """Its port stays open on the host's side: its mark tells, or QEMU before it, where it takes a second."""
    build("x86_64")
    result, records = await session("qemu", [word, "read:/nothing"], answer_then_end)
    reasons = "the guest's agent started again", "the guest closed the channel without a bye"
    check(result, records, *reasons)
