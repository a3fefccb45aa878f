"""A guest that attacks: a real launcher, and this test in the guest's place. Each attack ends by a declared
path with one clear reason, in bounded memory, and harms no session beside it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")

MIB = 1 << 20
BOUND = 256 * MIB
"""What a launcher may take at most, whatever its guest does, at the default limits; also in
docs/explanation/security.md."""

DOCUMENT = Path(__file__).parents[2] / "docs/reference/hostile-guest.md"
ROW = re.compile(r"^\| ([^|]+) \| (\d+) MiB \|$", re.MULTILINE)
PEAKS: dict[str, int] = {}
"""Bytes that the launcher of each attack took at most."""

Message = dict[str, Any]


def frame(message: Message | bytes) -> bytes:
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    return len(data).to_bytes(4, "big") + data


class Guest:
    """The guest's end of a channel; the session's own agent is mute."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(session.channel)
        self._stream = self.socket.makefile("rb")
        session.guests.append(self)

    def close(self) -> None:
        self._stream.close()
        self.socket.close()

    def hello(self, **members: Any) -> Message:
        known = {"kind": "hello", "protocol": 1, "session": self.session.id, "token": self.session.token}
        said = {"agent": "hostile/1", "build": "", "capabilities": []}
        return known | said | members

    def welcomed(self) -> Guest:
        self.send(self.hello())
        assert self.receive()["kind"] == "welcome"
        return self

    def send(self, *messages: Message | bytes) -> None:
        self.socket.sendall(b"".join(map(frame, messages)))

    def raw(self, data: bytes) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # cut off in its middle, as it should be
            self.socket.sendall(data)

    def receive(self) -> Message:
        message: Message = json.loads(self._stream.read(int.from_bytes(self._stream.read(4), "big")))
        return message

    def told(self) -> Message:
        """The last thing that the launcher says."""
        last: Message = {}
        while head := self._stream.read(4):
            last = json.loads(self._stream.read(int.from_bytes(head, "big")))
        return last


class Session:
    """A launcher that runs, and how much memory it has taken at most."""

    def __init__(self, world: Any, identity: str, *words: str, **options: str) -> None:
        self.id = identity
        self.peak = 0
        self.guests: list[Guest] = []
        self._world = world
        self.launcher: subprocess.Popen[str] = world.start(
            "--session-id", identity, *words, behaviour="mute", **options
        )
        self._out: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        threading.Thread(target=self._watch, daemon=True).start()
        world.until(lambda: self.launcher.poll() is not None or "connecting" in self._path())
        (config,) = world.directory(identity).rglob("kenaz.env")
        text = config.read_text()
        self.token = re.search(r'HARNESS_VM_TOKEN="([^"]+)"', text)[1]  # type: ignore[index]
        self.channel = re.search(r'KENAZ_CHANNEL="unix:([^"]+)"', text)[1]  # type: ignore[index]

    def _path(self) -> list[str]:
        try:
            return self._world.path(self.id)  # type: ignore[no-any-return]
        except (OSError, ValueError):
            return []

    def _read(self) -> None:
        assert self.launcher.stdout is not None
        self._out.extend(self.launcher.stdout)

    def _watch(self) -> None:
        status = Path(f"/proc/{self.launcher.pid}/status")
        while self.launcher.returncode is None:
            try:
                self.peak = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024  # type: ignore[index]
            except (OSError, TypeError):
                return
            time.sleep(0.01)

    def ended(self) -> str:
        """The line that says how it went. Checks the bound."""
        self.launcher.wait(timeout=300)
        self._reader.join(10)
        out = "".join(self._out)
        assert 10 * MIB < self.peak < BOUND, f"{self.peak / MIB:.0f} MiB"
        assert "nothing left behind" in out
        return "\n".join(line for line in out.splitlines() if line.startswith("failed: "))


def patient(message: Message) -> list[Message]:
    """A harness that answers prompts and never ends the session."""
    return [{"kind": "prompt.result", "id": message["id"], "text": ""}] if message["kind"] == "prompt" else []


def name_of(request: pytest.FixtureRequest) -> str:
    """The attack, as the table calls it."""
    callspec = getattr(request.node, "callspec", None)
    return callspec.id if callspec else request.function.__name__.removeprefix("test_").replace("_", " ")


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """The document names each attack and what it costs; KENAZ_GOLDEN=write has it say what was found now."""
    yield
    text = DOCUMENT.read_text()
    known = {name: int(size) for name, size in ROW.findall(text)}
    found = {name: -(-peak // MIB) for name, peak in PEAKS.items()}
    if os.environ.get("KENAZ_GOLDEN") == "write":
        rows = "\n".join(f"| {name} | {size} MiB |" for name, size in sorted({**known, **found}.items()))
        head, _, rest = text.partition("| --- | --- |\n")
        tail = ROW.sub("", rest).strip()
        DOCUMENT.write_text(f"{head}| --- | --- |\n{rows}\n\n{tail}\n")
    else:
        assert found.keys() <= known.keys(), "write the table anew: KENAZ_GOLDEN=write"
    assert max(known.values(), default=0) * MIB < BOUND


@pytest.fixture
def attacked(world: Any, harness: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., Session]]:
    sessions: list[Session] = []

    def start(identity: str = "s1", *words: str, answer: Any = patient, **options: str) -> Session:
        words = (*words, "--harness", harness(answer).address)
        sessions.append(Session(world, identity, *words, **options))
        return sessions[-1]

    yield start
    PEAKS[name_of(request)] = max(session.peak for session in sessions)
    for session in sessions:
        for guest in session.guests:
            guest.close()
        session.launcher.kill()
        session.launcher.wait()
        session._reader.join()
        for pipe in (session.launcher.stdout, session.launcher.stderr):
            assert pipe is not None
            pipe.close()


@contextmanager
def bystander(attacked: Callable[..., Session]) -> Iterator[None]:
    """A session beside the attacked one; its guest is served as ever."""
    beside = attacked("beside")
    guest = Guest(beside).welcomed()
    yield
    guest.send({"kind": "ping", "nonce": "n1"}, {"kind": "prompt", "id": "p1", "text": "still here"})
    assert guest.receive() == {"kind": "pong", "nonce": "n1"}
    assert guest.receive()["kind"] == "prompt.result"
    guest.send({"kind": "bye", "reason": "done"})
    assert beside.ended() == ""
    assert beside.launcher.returncode == 0


INVOKE = {"kind": "tool.invoke", "id": "t1", "tool": "fs.delete", "arguments": {}}


@pytest.mark.parametrize(
    ("data", "code"),
    [
        pytest.param(b"\xff\xff\xff\xff", "frame_too_large", id="giant length"),
        pytest.param(b"\0\0\0\0", "frame_empty", id="zero length"),
        pytest.param(frame(b'{"kind":"x-a","a":' + b"[" * (4 * MIB - 99)), "too_deep", id="deep nesting"),
        pytest.param(frame(b'{"kind":"x-a","kind":"x-b"}'), "duplicate_key", id="duplicate keys"),
        pytest.param(frame(b'{"kind":"x-a","a":"\xff"}'), "bad_utf8", id="invalid UTF-8"),
        pytest.param(frame(b'{"kind":"x-a","a":NaN}'), "bad_number", id="NaN"),
        pytest.param(frame(b'{"kind":"x-a","a":1e999}'), "bad_number", id="huge exponent"),
        pytest.param(frame(b'{"kind":"x-a","a":' + b"1" * (3 * MIB) + b"}"), "bad_number", id="huge integer"),
        pytest.param(
            frame(b'{"kind":"X","a":[' + b"{}," * (MIB + MIB // 4) + b"0]}"), "bad_kind", id="many objects"
        ),
        pytest.param(
            frame({"kind": "tool.result", "id": "t9", "result": 1}), "unknown_id", id="out of order"
        ),
        pytest.param(frame({"kind": "welcome"}), "bad_kind", id="the launcher's words"),
    ],
)
def test_nonsense_ends_the_session_with_its_reason(attacked: Any, data: bytes, code: str) -> None:
    session = attacked()
    guest = Guest(session).welcomed()
    guest.raw(data)
    assert guest.told()["code"] == code
    assert f"({code})" in session.ended()
    assert session.launcher.returncode == 1


@pytest.mark.parametrize(
    ("members", "code"),
    [
        pytest.param({"token": "0" * 43}, "bad_token", id="wrong token"),
        pytest.param({"session": "another"}, "bad_session", id="the hello of another session"),
        pytest.param({"protocol": 2}, "bad_protocol", id="another protocol"),
        pytest.param({"kind": "prompt", "id": "p1", "text": ""}, "bad_hello", id="no hello"),
    ],
)
def test_who_does_not_prove_itself_is_told_why(attacked: Any, members: Message, code: str) -> None:
    session = attacked()
    guest = Guest(session)
    guest.send(guest.hello(**members))
    assert guest.told() | {"message": ""} == {"kind": "refused", "code": code, "message": ""}
    assert session.ended().startswith("failed: handshake failed")


def test_a_handshake_that_is_never_ended(attacked: Any) -> None:
    session = attacked(**{"channel.limits.handshake": "300ms"})
    Guest(session).raw(b"\0\0")
    assert "did not end it within 0.3 s" in session.ended()


def test_one_byte_at_a_time_is_slow_and_no_more(attacked: Any) -> None:
    session = attacked()
    guest = Guest(session)
    for byte in frame(guest.hello()) + frame(INVOKE) + frame({"kind": "bye", "reason": "done"}):
        guest.socket.send(bytes([byte]))
    assert guest.receive()["kind"] == "welcome"
    assert guest.receive()["code"] == "denied"
    assert session.ended() == ""


def test_a_token_that_is_used_twice_and_one_of_another_machine(attacked: Any, world: Any) -> None:
    session, other = attacked(), attacked("s2")
    guest = Guest(session).welcomed()
    replayed = Guest(session)
    replayed.send(replayed.hello())
    assert replayed.told()["code"] == "already_connected"
    stranger = Guest(other)  # the guest of the first session, with all it knows
    stranger.send({**guest.hello()})
    assert stranger.told()["code"] == "bad_session"
    assert "bad_session" in other.ended() or "another session" in other.ended()
    guest.send({"kind": "bye", "reason": "done"})
    assert session.ended() == ""


def test_a_flood_of_frames_stops_where_the_harness_stops(attacked: Any) -> None:
    """100 MB for a harness that takes none of it in. The guest is slowed down, not the session beside."""
    halt = threading.Event()

    def answer(message: Message) -> list[Message]:
        if message["kind"] == "x-flood":
            halt.wait(60)
        return []

    with bystander(attacked):
        session = attacked(answer=answer)
        guest = Guest(session).welcomed()
        guest.socket.settimeout(2)
        data, sent = frame({"kind": "x-flood", "text": "x" * 65536}), 0
        with pytest.raises(TimeoutError):
            while sent < 100 * MIB:
                guest.socket.sendall(data)
                sent += len(data)
        assert sent < 8 * MIB
        halt.set()
    guest.socket.shutdown(socket.SHUT_RDWR)
    assert "channel lost" in session.ended()


def test_a_flood_of_invocations_is_answered_one_by_one(attacked: Any, world: Any) -> None:
    with bystander(attacked):
        session = attacked(**{"tools.allow": '["fs.*"]', "tools.deny": '["fs.delete"]'})
        guest = Guest(session).welcomed()
        count = 5000
        flood = [{**INVOKE, "id": f"t{n}", "arguments": {"path": "CANARY"}} for n in range(count)]
        writer = threading.Thread(target=lambda: guest.send(*flood))
        writer.start()
        answers = [guest.receive() for _ in range(count)]
        writer.join()
        assert [a["id"] for a in answers] == [f"t{n}" for n in range(count)]
        assert {(a["kind"], a["code"]) for a in answers} == {("tool.error", "denied")}
        guest.send({**INVOKE, "id": "m1", "tool": "CANARY CANARY"})
        assert guest.receive()["code"] == "malformed"
        guest.send({"kind": "bye", "reason": "done"})
        assert session.ended() == ""
    journal = (world.directory("s1") / "journal.jsonl").read_text()
    assert "CANARY" not in journal
    assert journal.count('"outcome":"denied"') == count
    assert journal.count('"outcome":"malformed"') == 1


def test_a_frame_that_is_cut_by_the_end_of_its_guest(attacked: Any) -> None:
    session = attacked()
    guest = Guest(session).welcomed()
    guest.raw(frame({"kind": "x-a", "text": "x" * 1000})[:500])
    guest.socket.shutdown(socket.SHUT_RDWR)
    assert "the stream ended 500 bytes into a frame" in session.ended()


@pytest.mark.slow
def test_a_guest_that_never_reads_is_lost(attacked: Any) -> None:
    with bystander(attacked):
        session = attacked()
        guest = Guest(session).welcomed()
        guest.socket.settimeout(50)
        flood = b"".join(frame({**INVOKE, "id": f"t{n}"}) for n in range(100_000))
        guest.raw(flood)
        assert "the peer took nothing for 30 s" in session.ended()
