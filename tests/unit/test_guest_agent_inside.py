"""The guest agent as a thread of the test: the same conversations, where coverage sees them."""

from __future__ import annotations

import hashlib
import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kenaz_engine.guest import agent as guest
from kenaz_engine.images.config_disk import environment_file

Message = dict[str, Any]
SECONDS = 20


class Inside:
    """The launcher's side of socket pairs whose other ends the agent gets whenever it dials."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.status: object = None
        self._dialled: queue.Queue[socket.socket] = queue.Queue()
        self._connection: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def open_channel(self, channel: str) -> int:
        ours, theirs = socket.socketpair()
        ours.settimeout(SECONDS)
        self._dialled.put(ours)
        return theirs.detach()

    def start(self, *words: str, channel: str = "unix:x", **options: Any) -> guest.Agent:
        variables = {
            "KENAZ_SESSION_ID": "s1",
            "KENAZ_CHANNEL": channel,
            "KENAZ_WORKBENCH_ARGS": json.dumps(words),
            "KENAZ_ENVGRANT_KEY": "canary",
            "KENAZ_ENVGRANT_PATH": "/usr/bin:/bin",
        }
        agent = guest.Agent(guest.Settings(variables), root=str(self.directory), **options)
        self.thread(agent.run)
        return agent

    def thread(self, act: Callable[[], object]) -> None:
        def run() -> None:
            try:
                self.status = act()
            except SystemExit as exc:
                self.status = exc.code

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def accept(self) -> None:
        self.hang_up()
        self._connection = self._dialled.get(timeout=SECONDS)

    def hang_up(self) -> None:
        if self._connection is not None:
            # A command has been forked from this process, and holds a copy.
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            self._connection.close()
            self._connection = None

    def send(self, **message: Any) -> None:
        self.send_raw(guest.encode(message))

    def send_raw(self, data: bytes) -> None:
        assert self._connection is not None
        self._connection.sendall(data)

    def raw(self, count: int) -> bytes:
        assert self._connection is not None
        data = b""
        while len(data) < count and (more := self._connection.recv(count - len(data))):
            data += more
        return data

    def receive(self) -> Message:
        message = json.loads(self.raw(int.from_bytes(self.raw(4), "big")) or b"{}")
        assert isinstance(message, dict)
        return message

    def welcome(self, *capabilities: str) -> Message:
        """Accepts, reads hello, welcomes."""
        self.accept()
        hello = self.receive()
        self.send(kind="welcome", capabilities=list(capabilities), limits={"frame": 4096})
        return hello

    def answers(self, text: str) -> None:
        """The next message is a prompt that begins so; it is answered."""
        asked = self.receive()
        assert asked["text"].startswith(text), asked
        self.send(kind="prompt.result", id=asked["id"], text="")

    def drains(self) -> None:
        """Ends the agent gracefully."""
        self.send(kind="drain", deadline=SECONDS)
        assert self.receive() == {"kind": "bye", "reason": "drained"}
        self.ends()

    def ends(self) -> None:
        assert self._thread is not None
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()

    def close(self) -> None:
        """Ends an agent that a failed test left: whatever it dials says nothing but drain."""
        self.hang_up()
        while self._thread is not None and self._thread.is_alive():
            try:
                self._connection = self._dialled.get(timeout=0.1)
                self.send(kind="welcome")
                self.send(kind="drain", deadline=0)
            except (queue.Empty, OSError):
                continue
        self.hang_up()


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Inside]:
    inside = Inside(tmp_path)
    monkeypatch.setattr(guest, "open_channel", inside.open_channel)
    for pause in ("FIRST_BACKOFF", "LAST_BACKOFF", "REFUSED_BACKOFF"):
        monkeypatch.setattr(guest, pause, 0.0)
    yield inside
    inside.close()


def test_the_demo_plays_to_its_end(inside: Inside) -> None:
    inside.start()
    hello = inside.welcome("tools", "prompts")
    assert (hello["kind"], hello["session"]) == ("hello", "s1")
    assert "clock" not in hello
    inside.answers("hello from SigilOS demo")
    read = inside.receive()
    inside.send(kind="tool.result", id="another", result={})
    inside.send(kind="tool.result", id=read["id"], result={})
    delete = inside.receive()
    inside.send(kind="tool.error", id=delete["id"], code="denied")
    inside.answers("fs.read answered; fs.delete refused (denied)")
    inside.send(kind="ping", nonce=7)
    assert inside.receive() == {"kind": "pong", "nonce": 7}
    inside.drains()


def test_words_are_played_in_order(inside: Inside, capfd: pytest.CaptureFixture[str]) -> None:
    inside.start("zork", "emergency", "write:/f", "read:/f", "read:/g", "env:KEY", "env:NO", "disk", "idle")
    inside.welcome()
    for text in ("wrote /f", "/f exists", "/g does not exist", "KEY is set", "NO is not set", "root file"):
        inside.answers(text)
    inside.drains()
    assert (inside.directory / "f").read_text() == "written by the guest\n"
    said = capfd.readouterr().err
    assert "unknown word zork" in said
    assert "kenaz: emergency: asked for" in said


def test_a_build_is_found_by_its_serial_number(
    inside: Inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, place in {"BUILD": "files", "DISKS": "disks", "DEVICES": "devices"}.items():
        (tmp_path / place).mkdir()
        monkeypatch.setattr(guest, name, str(tmp_path / place))
    for disk, serial in {"vda": "root", "vdb": "KENAZWB"}.items():
        (tmp_path / "disks" / disk).mkdir()
        (tmp_path / "disks" / disk / "serial").write_text(serial)
    (tmp_path / "disks/loop0").mkdir()
    (tmp_path / "devices/vdb").write_bytes(b"a build")
    (tmp_path / "files/bin").mkdir()
    (tmp_path / "files/bin/tool").touch()
    digest = hashlib.sha256(b"a build").hexdigest()
    monkeypatch.setattr(guest, "grow_root", lambda: None)
    inside.start("workbench", owns_machine=True)
    inside.welcome()
    # It has neither the digest that was promised, for none was, nor is it protected here.
    told = f"build : 7 bytes, sha256:{digest}, NOT as promised, writable, holds bin/tool"
    inside.answers(told)
    inside.drains()


def test_without_a_machine_there_is_no_build(inside: Inside) -> None:
    inside.start("workbench")
    inside.welcome()
    inside.answers("no build is attached for no name")
    inside.drains()


def test_a_word_is_played_once_on_a_disk(inside: Inside) -> None:
    inside.start("once:bye", "once:write:/f")
    inside.welcome()
    assert inside.receive() == {"kind": "bye", "reason": "done"}
    inside.ends()
    inside.start("once:bye", "once:idle")
    inside.welcome()
    inside.drains()


def test_a_drain_ends_the_tool_that_is_under_way(inside: Inside) -> None:
    inside.start()
    inside.welcome()
    inside.answers("hello")
    read = inside.receive()
    inside.send(kind="drain", deadline=SECONDS)
    assert inside.receive() == {"kind": "tool.cancel", "id": read["id"]}
    inside.send(kind="tool.error", id=read["id"], code="cancelled")
    assert inside.receive() == {"kind": "bye", "reason": "drained"}


def test_a_drain_waits_for_no_answer_beyond_its_time(inside: Inside) -> None:
    inside.start()
    inside.welcome()
    inside.receive()
    inside.send(kind="drain", deadline=0.01)
    assert inside.receive() == {"kind": "bye", "reason": "drained"}


def test_a_lost_connection_is_dialled_again(inside: Inside, capfd: pytest.CaptureFixture[str]) -> None:
    inside.start("disk", "hangup", "read:/f")
    inside.welcome()
    inside.receive()
    inside.welcome()  # which hangs up before
    inside.welcome()  # the script did
    inside.answers("/f does not exist")
    inside.send(kind="error", code="bad", message="frame")
    inside.welcome()
    inside.drains()
    said = capfd.readouterr().err
    assert "connection closed: asked for" in said
    assert "connection closed: bad: frame" in said


def test_a_refused_guest_dials_again(inside: Inside, capfd: pytest.CaptureFixture[str]) -> None:
    inside.start("idle")
    inside.accept()
    inside.receive()
    inside.send(kind="ping", nonce=1)
    assert inside.receive() == {"kind": "pong", "nonce": 1}
    inside.send(kind="refused", code="token", message="wrong")
    inside.welcome()
    inside.drains()
    assert "kenaz-guest: refused: token: wrong\n" in capfd.readouterr().err


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\0\0\0\1{", b"\0\0\0\2[]"])
def test_nonsense_ends_the_connection(inside: Inside, data: bytes) -> None:
    inside.start("idle")
    inside.welcome()
    inside.send_raw(data)
    inside.welcome()
    inside.drains()


@pytest.mark.parametrize(
    ("word", "status"), [("exit:3", 3), ("poweroff", guest.POWER_OFF), ("reboot", guest.REBOOT)]
)
def test_the_agent_ends_as_asked(inside: Inside, word: str, status: int) -> None:
    inside.start(word)
    inside.welcome()
    inside.ends()
    assert inside.status == status


def test_a_stream_that_outlives_agents_begins_at_a_mark(inside: Inside) -> None:
    inside.start("idle", channel="virtio-serial:x")
    inside.accept()
    assert inside.raw(4) == guest.MARK
    assert inside.receive()["kind"] == "hello"
    inside.send_raw(b"the rest of what was for another" + guest.MARK)
    inside.send_raw(guest.MARK)
    inside.send(kind="welcome")
    inside.drains()


# Commands


def output(inside: Inside, ended: str) -> tuple[dict[str, str], Message]:
    """What a command wrote until it ended, by stream, and the message that says so."""
    texts = {"stdout": "", "stderr": ""}
    while (message := inside.receive())["kind"] == "exec.output":
        texts[message["stream"]] += message["text"]
    assert message["kind"] == ended
    return texts, message


def test_a_command_is_run_and_its_output_handed_on(inside: Inside) -> None:
    inside.start()
    inside.welcome("exec")
    inside.send(kind="exec", id="x1", argv=["sh", "-c", "echo out $KEY; echo err >&2; exit 3"])
    texts, ended = output(inside, "exec.result")
    assert texts == {"stdout": "out canary\n", "stderr": "err\n"}
    assert ended["code"] == 3
    inside.send(kind="exec", id="x2", argv=["/none"])
    _, ended = output(inside, "exec.error")
    assert (ended["code"], ended["message"]) == ("not_started", "No such file or directory")
    inside.drains()


@pytest.mark.parametrize("kind", ["exec.cancel", "drain"])
def test_a_command_that_does_not_listen_is_ended(
    inside: Inside, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(guest, "TERM_GRACE", 0.05)
    inside.start()
    inside.welcome("exec")
    inside.send(kind="exec", id="x1", argv=["sh", "-c", "trap '' TERM; echo here; while :; do sleep 1; done"])
    assert inside.receive()["text"] == "here\n"
    for _ in range(2):
        inside.send(kind=kind, id="x1", deadline=SECONDS)
    _, ended = output(inside, "exec.error")
    assert ended["code"] == "cancelled"
    if kind == "drain":
        assert inside.receive() == {"kind": "bye", "reason": "drained"}
    else:
        inside.drains()


def test_a_command_ends_with_its_connection(inside: Inside) -> None:
    inside.start()
    inside.welcome("exec")
    inside.send(kind="exec", id="x1", argv=["sleep", "1000"])
    inside.send(kind="ping", nonce=1)
    assert inside.receive() == {"kind": "pong", "nonce": 1}
    inside.welcome()
    assert inside.receive()["kind"] == "prompt"


# The command line


def test_in_a_machine_the_boot_is_told(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    env = inside.directory / "kenaz.env"
    env.write_bytes(environment_file({"KENAZ_CHANNEL": "unix:x", "KENAZ_WORKBENCH_ARGS": '["idle"]'}))
    grown: list[bool] = []
    monkeypatch.setattr(guest, "grow_root", lambda: grown.append(True))
    monkeypatch.setenv("KENAZ_CLOCK_INIT", "0.5")
    inside.thread(lambda: guest.main(["--env", str(env), "--machine"]))
    clock = inside.welcome()["clock"]
    assert clock["init"] == 0.5
    assert clock["agent"] <= clock["hello"]
    inside.drains()
    assert (inside.status, grown) == (0, [True])


def test_a_unix_socket_is_dialled(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "c"))
        listener.listen()
        wire = guest.Wire(guest.open_channel(f"unix:{tmp_path / 'c'}"))
        accepted, _ = listener.accept()
        with accepted:
            wire.send({"kind": "ping"})
            assert accepted.recv(64) == guest.encode({"kind": "ping"})
        wire.close()


@pytest.mark.parametrize("knows", [True, False])
def test_a_port_of_this_host_is_dialled_where_its_owner_knows_the_secret(
    tmp_path: Path, *, knows: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        said = {"port": listening.getsockname()[1], "ask": "a" * 43, "answer": "b" * 43}
        (tmp_path / "c").write_text(json.dumps(said))
        heard: list[bytes] = []

        def answer() -> None:
            with listening.accept()[0] as connection:
                heard.append(connection.recv(44))
                connection.sendall((b"b" if knows else b"x") * 43 + b"\n\0\0\0\x02{}")
                with suppress(ConnectionError):
                    connection.recv(1)

        owner = threading.Thread(target=answer)
        owner.start()
        try:
            if knows:
                wire = guest.Wire(guest.open_channel(f"loopback:{tmp_path / 'c'}"))
                assert wire._get(6) == b"\0\0\0\x02{}"  # nothing behind the line is lost
                wire.close()
            else:
                with pytest.raises(OSError, match="not the launcher"):
                    guest.open_channel(f"loopback:{tmp_path / 'c'}")
        finally:
            owner.join(5)
        assert heard == [b"a" * 43 + b"\n"]
