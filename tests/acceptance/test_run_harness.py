"""`run --harness`: a real harness on the far side, and what becomes of the session when it is not one."""

import json
import socket
import sys
import threading
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")


def polite(message):
    """Answers all, and ends after the guest's second prompt."""
    match message["kind"]:
        case "tool.invoke":
            return [{"kind": "tool.result", "id": message["id"], "result": {"text": "contents"}}]
        case "prompt" if "fs.read" in message["text"]:
            return [{"kind": "prompt.result", "id": message["id"], "text": "well done"}, {"kind": "end"}]
        case "prompt":
            return [
                {"kind": "prompt.delta", "id": message["id"], "text": "he"},
                {"kind": "prompt.result", "id": message["id"], "text": "hello"},
            ]
        case _:
            return []


def test_a_harness_serves_the_guest_and_ends_the_session(world, harness):
    far = harness(polite)
    done = world.run("--session-id", "s1", "--harness", far.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert world.path("s1")[-4:] == ["running", "draining", "stopping", "releasing"]
    assert done.stdout.endswith("  nothing left behind\n")
    far.finish()
    assert far.kinds == ["session.open", "prompt", "tool.invoke", "prompt", "session.close"]
    opened, _, invoked, said, closed = far.heard
    assert opened.pop("resume") == {"connection": 1, "received": 0, "window": 1 << 20, "grace": 10.0}
    assert opened == {
        "kind": "session.open",
        "session": "s1",
        "build": "2026.11",
        "capabilities": ["prompts", "tools"],
        "protocol": 1,
    }
    # What the policy denies never came this way, and the guest was told.
    assert (invoked["tool"], invoked["arguments"]) == ("fs.read", {"path": "/etc/os-release"})
    assert said["text"] == "fs.read answered; fs.delete refused (denied)"
    assert closed["outcome"] == "success"


def test_the_spec_may_come_from_stdin_with_overrides(world):
    head = "apiVersion: kenaz.dev/v1\nkind: Session\nmetadata: {name: piped}\n"
    text = head + "spec: {driver: process, image: demo}\n"
    done = world.run("--session-id", "s1", "--set", 'spec.tools.allow=["fs.*"]', spec="-", stdin=text)
    assert (done.returncode, done.stderr) == (0, "")
    assert "guest says: fs.read answered; fs.delete answered" in done.stdout
    header = world.records("s1")[0]
    assert header["session"] == "s1"

    done = world.run("--session-id", "s2", spec="-", stdin=text.replace("image", "imgae"))
    assert done.returncode == 2
    assert "did you mean `image`?" in done.stderr
    assert "<stdin>:4:" in done.stderr
    assert not world.directory("s2").exists()


@pytest.mark.parametrize(
    ("address", "code", "says"),
    [
        ("unix:{}/none", 3, "nothing is at {}/none (start the harness first"),
        ("unix:{}/none/h", 3, "{}/none is no directory"),
        ("unix:{}/file", 2, "{}/file is not a socket"),
        ("loopback:{}/file", 2, "{}/file: that file names no port and secrets"),
        ("unix:", 2, "it must be unix:PATH or loopback:FILE"),
        ("tcp:localhost:1", 2, "it must be unix:PATH or loopback:FILE"),
    ],
)
def test_a_wrong_address_is_found_before_anything_is_made(world, tmp_path, address, code, says):
    (tmp_path / "file").write_text("no secrets")
    done = world.run("--harness", address.format(tmp_path), **{"channel.grace": "0s"})
    assert done.returncode == code
    assert done.stderr.startswith("kenaz-launcher: --harness")
    assert says.format(tmp_path) in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not world.state.exists()


def failure(done):
    """The line that says how the session failed."""
    [line] = [line for line in done.stdout.splitlines() if line.startswith("failed: ")]
    return line


def test_a_socket_on_which_nobody_listens_ends_the_session_by_a_clear_line(world, tmp_path):
    path = tmp_path / "h"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    done = world.run("--session-id", "s1", "--harness", f"unix:{path}", **{"channel.grace": "300ms"})
    assert done.returncode == 1
    assert f"the harness at {path} cannot be reached: Connection refused" in failure(done)
    assert world.path("s1")[-1] == "releasing"
    assert "nothing left behind" in done.stdout


def test_a_harness_that_dies_while_it_serves_ends_the_session_as_the_lifecycle_says(world, harness):
    # By the protocol, closing is how a harness ends a session: the guest is drained, and what it waits for
    # is answered for the harness.
    far = harness(lambda message: None if message["kind"] == "tool.invoke" else polite(message))
    done = world.run("--session-id", "s1", "--harness", far.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert world.path("s1")[-4:] == ["running", "draining", "stopping", "releasing"]
    [invoked] = [message["id"] for message in far.heard if message["kind"] == "tool.invoke"]
    answers = [(r.get("id"), r["message"]) for r in world.records("s1") if r.get("direction") == "to-guest"]
    assert (invoked, "tool.error") in answers
    assert "nothing left behind" in done.stdout


@pytest.mark.parametrize(
    ("garbage", "says"),
    [
        (b"\xff\xff\xff\xff", "frame_too_large"),
        (b"\0\0\0\4nope", "bad_json"),
        ({"kind": "tool.result", "id": "t99", "result": 1}, "unknown_id"),
        ({"kind": "bye", "reason": "tired"}, "bad_kind"),
    ],
)
def test_a_harness_that_breaks_a_rule_is_told_and_cut_off(world, harness, garbage, says):
    far = harness(lambda message: [garbage] if message["kind"] == "prompt" else [])
    done = world.run("--session-id", "s1", "--harness", far.address)
    assert done.returncode == 1
    assert "protocol violated" in failure(done)
    assert "harness" in failure(done)
    assert world.path("s1")[-3:] == ["running", "stopping", "releasing"]
    far.finish()
    [told] = [message for message in far.heard if message["kind"] == "error"]
    assert told["code"] == says
    assert "nothing left behind" in done.stdout


def test_a_harness_that_is_gone_leaves_no_file_descriptor_or_socket_of_ours(world, harness):
    far = harness(lambda message: None)  # dies as soon as it hears of the session
    done = world.run("--session-id", "s1", "--harness", far.address)
    assert done.returncode == 0
    assert far.kinds == ["session.open"]
    assert not Path(world.directory("s1"), "control.sock").exists()


def test_a_harness_that_never_comes_ends_the_session_when_its_grace_is_over(world, tmp_path):
    done = world.run("--session-id", "s1", "--harness", f"unix:{tmp_path}/h", **{"channel.grace": "300ms"})
    assert done.returncode == 1
    assert f"no harness listens at {tmp_path}/h" in failure(done)
    assert world.path("s1")[-3:] == ["running", "stopping", "releasing"]


def test_a_harness_may_come_late(world, harness, tmp_path):
    launcher = world.start("--session-id", "s1", "--harness", f"unix:{tmp_path}/h", **{"channel.grace": "1m"})
    world.wait_for("s1", "running")  # the guest is there, and waits
    far = harness(polite)
    _, err = launcher.communicate(timeout=300)
    assert (launcher.returncode, err) == (0, "")
    far.finish()
    assert far.kinds == ["session.open", "prompt", "tool.invoke", "prompt", "session.close"]


class Resuming:
    """A harness that says `resume`, and whose connection breaks after each message that it hears."""

    def __init__(self, path, *, forgets=False, returns=True):
        self.heard = []
        self.connections = 0
        self._forgets, self._returns = forgets, returns
        self._said = []
        self._ended = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def finish(self):
        self._thread.join(60)
        self._listener.close()
        assert not self._thread.is_alive()

    def _serve(self):
        while not self._ended:
            connection, _ = self._listener.accept()
            self.connections += 1
            with connection, connection.makefile("rb") as stream:
                self._converse(connection, stream)
            if not self._returns:
                self._listener.close()
                return

    def _converse(self, connection, stream):
        opened = self._hear(stream)
        assert opened["resume"]["connection"] == self.connections
        self._say(connection, {"kind": "resume", "received": 0 if self._forgets else len(self.heard)})
        for message in self._said[opened["resume"]["received"] :]:
            self._say(connection, message)
        while (message := self._hear(stream)) is not None:
            if message["kind"] == "ack":
                continue
            self.heard.append(message)
            answers = polite(message)
            self._said += answers
            if self.connections % 2:
                for answer in answers:
                    self._say(connection, answer)
                self._ended = {"kind": "end"} in answers
            if answers:
                return  # every other time before the answer is said

    def _hear(self, stream):
        head = stream.read(4)
        return json.loads(stream.read(int.from_bytes(head, "big"))) if head else None

    def _say(self, connection, message):
        data = json.dumps(message).encode()
        connection.sendall(len(data).to_bytes(4, "big") + data)


def test_a_harness_that_goes_and_returns_hears_and_says_all_once(world, tmp_path):
    far = Resuming(tmp_path / "h")
    done = world.run("--session-id", "s1", "--harness", f"unix:{tmp_path}/h")
    assert (done.returncode, done.stderr) == (0, "")
    far.finish()
    assert [m["kind"] for m in far.heard] == ["prompt", "tool.invoke", "prompt"]
    assert far.heard[2]["text"] == "fs.read answered; fs.delete refused (denied)"
    assert far.connections == 3
    assert "reconnecting" not in world.path("s1")


def test_a_harness_that_does_not_return_ends_the_session_by_a_clear_line(world, tmp_path):
    far = Resuming(tmp_path / "h", returns=False)
    done = world.run("--session-id", "s1", "--harness", f"unix:{tmp_path}/h", **{"channel.grace": "300ms"})
    assert done.returncode == 1
    assert "the harness went away and did not come back within 0.3 s" in failure(done)
    assert world.path("s1")[-3:] == ["running", "stopping", "releasing"]
    far.finish()
