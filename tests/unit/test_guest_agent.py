"""The guest agent over a socket pair, without a machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kenaz_engine import __version__
from kenaz_engine.guest import agent as guest
from kenaz_engine.images.config_disk import environment_file

Message = dict[str, Any]
SECONDS = 20


class Host:
    """The launcher's side: listens on a UNIX socket, talks to the agent that is a child process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "channel"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(SECONDS)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._connection: socket.socket | None = None
        self.child: subprocess.Popen[str] | None = None

    def start(self, *words: str, **variables: str) -> None:
        environment = {
            "KENAZ_SESSION_ID": "s-1",
            "HARNESS_VM_TOKEN": "canary-token",
            "KENAZ_CHANNEL": f"unix:{self.path}",
            "KENAZ_WORKBENCH_BUILD": "2026.11",
            "KENAZ_WORKBENCH_ARGS": json.dumps(words),
            **variables,
        }
        env = self.directory / "kenaz.env"
        env.write_bytes(environment_file(environment))
        command = [sys.executable, "-I", guest.__file__, "--env", str(env), "--root", str(self.directory)]
        self.child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def accept(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection, _ = self._listener.accept()
        self._connection.settimeout(SECONDS)

    def send(self, **message: Any) -> None:
        assert self._connection is not None
        self._connection.sendall(guest.encode(message))

    def send_raw(self, data: bytes) -> None:
        assert self._connection is not None
        self._connection.sendall(data)

    def receive(self) -> Message | None:
        header = self._exactly(4)
        if not header:
            return None
        message = json.loads(self._exactly(int.from_bytes(header, "big")))
        assert isinstance(message, dict)
        return message

    def _exactly(self, count: int) -> bytes:
        assert self._connection is not None
        data = b""
        while len(data) < count and (more := self._connection.recv(count - len(data))):
            data += more
        return data

    def welcome(self) -> Message:
        """Accepts, reads hello, welcomes."""
        self.accept()
        hello = self.receive()
        assert hello is not None
        self.send(kind="welcome", protocol=1, session="s-1", capabilities=["tools"], limits={}, tools={})
        return hello

    def ends(self) -> tuple[int, str]:
        """Exit status, and what was said on the console."""
        assert self.child is not None
        _, console = self.child.communicate(timeout=SECONDS)
        return self.child.returncode, console

    def close(self) -> None:
        for closing in (self._connection, self._listener):
            if closing is not None:
                closing.close()
        if self.child is not None:
            self.child.terminate()
            try:
                self.child.communicate(timeout=1)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.communicate()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    host.close()


def test_hello_carries_who_the_guest_is(host: Host) -> None:
    host.start("idle")
    assert host.welcome() == {
        "kind": "hello",
        "protocol": 1,
        "session": "s-1",
        "token": "canary-token",
        "agent": f"kenaz-guest/{__version__}",
        "build": "2026.11",
        "capabilities": ["tools", "prompts", "exec", "resume"],
    }


def test_the_demo_greets_uses_tools_reports_and_waits_for_drain(host: Host) -> None:
    host.start()
    host.welcome()
    greeting = host.receive()
    assert greeting is not None
    assert greeting["kind"] == "prompt"
    assert greeting["text"].startswith("hello from SigilOS demo, kernel Linux ")
    host.send(kind="prompt.delta", id=greeting["id"], text="h")
    host.send(kind="prompt.result", id=greeting["id"], text="hi")
    read = host.receive()
    assert read is not None
    assert (read["kind"], read["tool"], read["arguments"]) == (
        "tool.invoke",
        "fs.read",
        {"path": "/etc/os-release"},
    )
    host.send(kind="tool.result", id="another", result={})
    host.send(kind="tool.result", id=read["id"], result={"content": "x"})
    delete = host.receive()
    assert delete is not None
    assert delete["tool"] == "fs.delete"
    host.send(kind="tool.error", id=delete["id"], code="denied", message="no")
    report = host.receive()
    assert report is not None
    assert report["text"] == "fs.read answered; fs.delete refused (denied)"
    host.send(kind="prompt.result", id=report["id"], text="well")
    host.send(kind="ping", nonce="n1")
    assert host.receive() == {"kind": "pong", "nonce": "n1"}
    host.send(kind="drain", deadline=5)
    assert host.receive() == {"kind": "bye", "reason": "drained"}
    assert host.receive() is None
    assert host.ends() == (0, "")


def test_drain_cancels_the_tool_and_waits_for_its_end(host: Host) -> None:
    host.start()
    host.welcome()
    greeting = host.receive()
    assert greeting is not None
    host.send(kind="prompt.result", id=greeting["id"], text="")
    read = host.receive()
    assert read is not None
    host.send(kind="drain", deadline=10)
    assert host.receive() == {"kind": "tool.cancel", "id": read["id"]}
    host.send(kind="tool.error", id=read["id"], code="cancelled", message="")
    assert host.receive() == {"kind": "bye", "reason": "drained"}


def test_drain_does_not_wait_for_an_answer_that_never_comes(host: Host) -> None:
    host.start()
    host.welcome()
    host.receive()
    host.send(kind="drain", deadline=0.02)
    assert host.receive() == {"kind": "bye", "reason": "drained"}


def test_a_lost_connection_is_dialled_again_and_the_script_goes_on(host: Host) -> None:
    host.start("write:/first", "read:/first")
    host.welcome()
    assert (host.receive() or {})["text"] == "wrote /first"
    host.welcome()
    assert (host.receive() or {})["text"] == "/first exists"
    assert (host.directory / "first").read_text() == "written by the guest\n"


@pytest.mark.parametrize(
    "data",
    [
        (guest.MAX_FRAME + 1).to_bytes(4, "big"),
        b"\0\0\0\1{",
        b"\0\0\0\2[]",
        b"\0\0\0\2{}",
        guest.encode({"kind": "error", "code": "bad", "message": "frame"}),
    ],
)
def test_nonsense_and_errors_of_the_host_end_the_connection(host: Host, data: bytes) -> None:
    host.start("idle")
    host.welcome()
    host.send_raw(data)
    assert host.receive() is None
    host.welcome()


def test_a_refused_guest_says_why_and_waits(host: Host) -> None:
    host.start("idle")
    host.accept()
    host.receive()
    host.send(kind="ping", nonce=1)
    assert host.receive() == {"kind": "pong", "nonce": 1}
    host.send(kind="refused", code="token", message="wrong token")
    assert host.receive() is None
    assert host.child is not None
    host.child.send_signal(signal.SIGTERM)
    assert host.ends() == (0, "kenaz-guest: refused: token: wrong token\n")


def test_a_hanging_guest_hears_neither_drain_nor_sigterm(host: Host) -> None:
    host.start("hang")
    host.welcome()
    host.send(kind="ping", nonce=1)
    assert host.receive() == {"kind": "pong", "nonce": 1}
    host.send(kind="drain", deadline=0)
    assert host.child is not None
    host.child.send_signal(signal.SIGTERM)
    host.send(kind="ping", nonce=2)
    assert host.receive() == {"kind": "pong", "nonce": 2}


@pytest.mark.parametrize(
    ("word", "status", "console"),
    [
        ("exit:3", 3, ""),
        ("poweroff", guest.POWER_OFF, ""),
        ("reboot", guest.REBOOT, ""),
        ("panic", -signal.SIGABRT, "Kernel panic - not syncing: asked for (this guest is a process)\n"),
        ("early:exit:4", 4, ""),
    ],
)
def test_ends_as_asked(host: Host, word: str, status: int, console: str) -> None:
    host.start(word)
    if not word.startswith("early:"):
        host.welcome()
    assert host.ends() == (status, console)


def test_bye_is_said_at_once(host: Host) -> None:
    host.start("bye")
    host.welcome()
    assert host.receive() == {"kind": "bye", "reason": "done"}
    assert host.ends() == (0, "")


def test_grants_are_reported_by_name_only(host: Host) -> None:
    host.start("env:API_KEY", "env:OTHER", KENAZ_ENVGRANT_API_KEY="canary-value")
    host.welcome()
    first = host.receive()
    assert first is not None
    assert first["text"] == "API_KEY is set"
    host.send(kind="prompt.result", id=first["id"], text="")
    assert (host.receive() or {})["text"] == "OTHER is not set"


def test_prompts_of_the_disk_and_unknown_words(host: Host) -> None:
    host.start("zork", "emergency", "disk")
    host.welcome()
    size = os.statvfs(host.directory)
    assert (host.receive() or {})["text"] == f"root file system has {size.f_blocks * size.f_frsize} bytes"
    assert host.child is not None
    host.child.terminate()
    _, console = host.ends()
    assert console.startswith("kenaz-guest: unknown word zork; known are bye, cut, demo,")
    assert console.endswith("kenaz: emergency: asked for\n")


def test_a_flood_goes_to_the_console_and_ends_with_the_agent(host: Host) -> None:
    host.start("flood")
    host.welcome()
    assert host.child is not None
    assert host.child.stderr is not None
    assert host.child.stderr.readline() == "flood " * 20 + "\n"
    host.send(kind="ping", nonce=1)
    assert host.receive() == {"kind": "pong", "nonce": 1}
    host.child.terminate()
    # The pipe only ends when the flooding child is gone, too.
    host.ends()


def test_a_mute_guest_never_dials(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slept(Exception):
        pass

    def sleep(seconds: float) -> None:
        raise Slept

    monkeypatch.setattr(guest.time, "sleep", sleep)
    dialled: list[str] = []
    monkeypatch.setattr(guest, "open_channel", dialled.append)
    agent = guest.Agent(guest.Settings({"KENAZ_WORKBENCH_ARGS": '["demo", "mute"]'}))
    with pytest.raises(Slept):
        agent.run()
    assert dialled == []


def test_an_early_word_must_not_need_the_channel() -> None:
    agent = guest.Agent(guest.Settings({"KENAZ_WORKBENCH_ARGS": '["early:demo"]'}))
    with pytest.raises(ValueError, match="needs no channel"):
        agent.run()


def test_dialling_backs_off_up_to_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    slept: list[float] = []

    def unreachable(channel: str) -> int:
        tried.append(channel)
        raise ConnectionRefusedError

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(guest, "open_channel", unreachable)
    monkeypatch.setattr(guest.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        guest.Agent(guest.Settings({"HARNESS_VM_PORT": "7000"})).run()
    assert tried[:2] == ["vsock:2:7000", "virtio-serial:dev.kenaz.channel"]
    assert slept == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


def test_a_channel_of_no_known_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown kind of channel: pigeon"):
        guest.open_channel("pigeon:1")


@pytest.mark.parametrize(
    "argv", [[], ["--env"], ["--env", "a", "--zork", "b"], ["--env", "/nonexistent"], ["--machine"]]
)
def test_a_bad_command_line_is_one_line_and_status_2(
    argv: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert guest.main(argv) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_a_bad_environment_file_is_one_line_and_status_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kenaz.env"
    path.write_text("KENAZ_WORKBENCH_ARGS=[\n")
    assert guest.main(["--env", str(path)]) == 2
    assert capfd.readouterr().err.startswith(f"kenaz-guest: {path}: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("A=b", {"A": "b"}),
        ("A=b\nC=d\n", {"A": "b", "C": "d"}),
        ("# A=1\n; B=2\nno assignment\n\nC=3", {"C": "3"}),
        ("  A = b  c \t\n", {"A": "b  c"}),
        ("A=", {"A": ""}),
        ("1A=b\nB=c", {"B": "c"}),
        ("A='it\\n\"s'", {"A": 'it\\n"s'}),
        ('A="x\\"y\\\\z\\$\\`\\n"', {"A": 'x"y\\z$`\\n'}),
        ('A="two\nlines"\nB=1', {"A": "two\nlines", "B": "1"}),
        ('A="one \\\nline"', {"A": "one line"}),
        ("A=one\\\ntwo", {"A": "onetwo"}),
        ("A=a\\ b\\ \n", {"A": "a b "}),
        ("A='a'\"b\"c", {"A": "abc"}),
        ("A=it's", {"A": "it's"}),
        ("A=\\", {"A": ""}),
        ('A="open', {"A": "open"}),
    ],
)
def test_environment_files_are_read_as_systemd_reads_them(text: str, expected: dict[str, str]) -> None:
    assert guest.parse_environment(text) == expected


VALUES = st.text(
    st.characters(
        exclude_categories=["Cs"], exclude_characters=[chr(c) for c in (*range(9), *range(11, 32), 127)]
    )
)
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)


@given(st.dictionaries(NAMES, VALUES, max_size=5))
def test_what_the_launcher_writes_the_agent_reads(variables: dict[str, str]) -> None:
    assert guest.parse_environment(environment_file(variables).decode()) == variables


@given(st.text())
def test_the_parser_takes_any_text(text: str) -> None:
    guest.parse_environment(text)


def test_frames_may_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    wire = guest.Wire(theirs.detach())
    with ours:
        frames = guest.encode({"kind": "ping", "nonce": "ä"}) + guest.encode({"kind": "drain"})
        ours.sendall(frames[:7])
        assert wire.receive(0) is None
        ours.sendall(frames[7:])
        assert wire.receive() == {"kind": "ping", "nonce": "ä"}
        assert wire.receive() == {"kind": "drain"}
    with pytest.raises(guest.Closed, match="end of stream"):
        wire.receive()
    with pytest.raises(guest.Closed, match="Broken pipe"):
        wire.send({"kind": "ping"})
    wire.close()
    with pytest.raises(guest.Closed, match="Bad file descriptor"):
        wire.receive()


def test_bye_to_nobody_ends_the_agent_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(guest, "open_channel", lambda channel: theirs.detach())
    agent = guest.Agent(guest.Settings({"KENAZ_WORKBENCH_ARGS": '["bye"]'}))
    ours.sendall(guest.encode({"kind": "welcome"}))
    converse: Callable[[guest.Wire], float] = agent.converse

    def cut(wire: guest.Wire) -> float:
        try:
            return converse(wire)
        finally:
            ours.close()

    monkeypatch.setattr(agent, "converse", cut)
    agent.run()
    assert capfd.readouterr().err == "kenaz-guest: bye is not heard: Broken pipe\n"
