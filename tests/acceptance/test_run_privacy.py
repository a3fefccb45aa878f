"""What a session must not show: values of its environment, what is said on the channel, and its token."""

import json
import secrets
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")

SPEC = """
apiVersion: kenaz.dev/v1
kind: Session
metadata: {{name: private}}
spec:
  image: demo
  machine: {{memory: 256MiB, disk: 1GiB}}
  workbench:
    args: ["env:LITERAL", "env:GIVEN", demo]
    env: {{LITERAL: "{literal}", GIVEN: "${{env:KENAZ_TEST_SECRET}}"}}
  tools: {{allow: ["fs.*"], deny: ["fs.delete"]}}
"""

CONTENT = ("literal", "given", "arguments", "result", "delta", "answer", "question")
"""What is said in this session and known to no other."""


class Onlooker:
    """A harness full of secrets that looks around on the host while the session lives."""

    def __init__(self, world, token_of):
        self.secrets = {name: f"canary-{name}-{secrets.token_hex(8)}" for name in CONTENT}
        self.looked = False
        self._world = world
        self._token_of = token_of

    def __call__(self, message):
        match message["kind"]:
            case "prompt" if "fs.read" in message["text"]:
                self._look()
                return [{"kind": "prompt.result", "id": message["id"], "text": "bye"}, {"kind": "end"}]
            case "prompt":
                identifier = message["id"]
                return [
                    {"kind": "prompt.delta", "id": identifier, "text": self.secrets["delta"]},
                    {"kind": "prompt.result", "id": identifier, "text": self.secrets["answer"]},
                ]
            case "tool.invoke":
                arguments = {"path": self.secrets["arguments"]}
                return [
                    {"kind": "tool.invoke", "id": "h1", "tool": "fs.list", "arguments": arguments},
                    {"kind": "prompt", "id": "h2", "text": self.secrets["question"]},
                    {"kind": "tool.result", "id": message["id"], "result": [self.secrets["result"]]},
                ]
            case _:
                return []

    def _look(self):
        self.looked = True
        directory = self._world.directory("s1")
        [config] = [path for path in directory.iterdir() if path.name.startswith("config")]
        self.secrets["token"] = self._token_of(config)
        files = [config / "kenaz.env"] if config.is_dir() else [config]
        self.modes = [stat.S_IMODE(file.stat().st_mode) for file in files]
        self.closed = [stat.S_IMODE(path.stat().st_mode) for path in (directory, config) if path.is_dir()]
        # It really is there: the value of `literal` has gone to the guest.
        assert self.secrets["literal"].encode() in files[0].read_bytes()
        self.seen = subprocess.run(["ps", "-eo", "args"], capture_output=True, check=True).stdout
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                self.seen += process.read_bytes()
            except OSError:
                continue
        [machine] = [
            r for r in self._world.records("s1") if (r["kind"], r.get("resource")) == ("acquired", "vm")
        ]
        self.environment = Path(f"/proc/{machine['handle']['pid']}/environ").read_bytes()

    def found_in(self, data):
        """The names of what can be read there."""
        return [name for name, value in self.secrets.items() if value.encode() in data]


@pytest.mark.parametrize("driver", ["process", "qemu"])
def test_a_session_shows_none_of_its_content(world, harness, token_of, request, driver):
    if driver == "qemu":
        request.getfixturevalue("qemu")
    onlooker = Onlooker(world, token_of)
    far = harness(onlooker)
    world.environment["KENAZ_TEST_SECRET"] = onlooker.secrets["given"]
    text = SPEC.format(literal=onlooker.secrets["literal"])
    done = world.run(
        "--session-id", "s1", "--harness", far.address, "--json", spec="-", stdin=text, driver=driver
    )
    assert (done.returncode, done.stderr) == (0, "")
    far.finish()
    assert onlooker.looked
    assert [m["text"] for m in far.heard if m["kind"] == "prompt"][:2] == ["LITERAL is set", "GIVEN is set"]

    assert onlooker.found_in(onlooker.seen) == []
    assert onlooker.found_in(onlooker.environment) == []
    assert onlooker.found_in(done.stdout.encode()) == []
    kept = {path.name: path.read_bytes() for path in world.directory("s1").iterdir()}
    assert kept.keys() == {"journal.jsonl", "console.log"}
    assert {name: onlooker.found_in(data) for name, data in kept.items()} == {
        "journal.jsonl": [],
        "console.log": [],
    }
    # Structure is what a journal is for.
    named = {(r["message"], r.get("id")) for r in world.records("s1") if r["kind"] == "channel"}
    assert {("tool.invoke", "h1"), ("prompt", "h2")} <= named

    assert onlooker.modes == ([0o400] if driver == "process" else [0o600])
    assert set(onlooker.closed) == {0o700}


def test_the_text_for_people_shows_no_content_either(world, harness, token_of):
    onlooker = Onlooker(world, token_of)
    far = harness(onlooker)
    world.environment["KENAZ_TEST_SECRET"] = onlooker.secrets["given"]
    text = SPEC.format(literal=onlooker.secrets["literal"])
    done = world.run("--session-id", "s1", "--harness", far.address, spec="-", stdin=text)
    assert (done.returncode, done.stderr) == (0, "")
    assert onlooker.found_in(done.stdout.encode()) == []


def test_a_fault_beside_a_secret_does_not_quote_it(world):
    canary = f"canary-{secrets.token_hex(8)}"
    text = SPEC.format(literal=canary).replace("  tools:", "  tolls:")
    world.environment["KENAZ_TEST_SECRET"] = f"{canary}\x1b"
    done = world.run(spec="-", stdin=text)
    assert done.returncode == 2
    assert canary not in done.stdout + done.stderr


def test_plan_and_its_json_show_no_value(world):
    canaries = [f"canary-{secrets.token_hex(8)}" for _ in range(2)]
    environment = {**world.environment, "KENAZ_TEST_SECRET": canaries[1]}
    launcher = world.command()[0]
    for words in ([], ["--json"]):
        done = subprocess.run(
            [launcher, "plan", "-", "--set", "spec.driver=process", *words],
            input=SPEC.format(literal=canaries[0]),
            capture_output=True,
            text=True,
            timeout=300,
            env=environment,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "LITERAL" in done.stdout
        assert not any(canary in done.stdout for canary in canaries)
    json.loads(done.stdout)


# --- all the while, and whatever the end --------------------------------------------------------------------


class Lookout:
    """Looks at the host from a session's first moment to its last, as anybody else on it could.

    `seen` is what others may read: all command lines, and the names of files and sockets. `helpers` are the
    environments of what the launcher has started; its own is its user's, and so is a child's until it is
    another program, which is seen by its command line.
    """

    def __init__(self, world, token_of):
        self.launcher = 0
        self.seen, self.helpers, self.tokens = set(), set(), set()
        self._world, self._token_of = world, token_of
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def finish(self):
        self._over.set()
        self._thread.join()

    def _watch(self):
        while not self._over.wait(0.01):
            self.look()

    def look(self):
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, ValueError):
                words = (process / "cmdline").read_bytes()
                self.seen.add(words)
                if self._is_ours(int(process.name)) and words != self._words_of_the_launcher():
                    self.helpers.add((process / "environ").read_bytes())
        self.seen.add(Path("/proc/net/unix").read_bytes())
        with suppress(OSError):
            for root in (self._world.state, self._world.runtime):
                self.seen.update(str(path).encode() for path in root.rglob("*"))
        with suppress(OSError, ValueError, AssertionError):
            [config] = self._world.directory("s1").glob("config*")
            self.tokens.add(self._token_of(config))

    def _words_of_the_launcher(self):
        return Path(f"/proc/{self.launcher}/cmdline").read_bytes()

    def _is_ours(self, pid):
        """A child of the launcher's, or of one of these."""
        while pid > 1:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if pid == self.launcher:
                return True
        return False


class Talker:
    """A harness that says secrets of every kind, and then ends the session in one way or another."""

    def __init__(self, ending, look):
        self._look = look
        self.secrets = {
            name: f"canary-{name}-{secrets.token_hex(8)}" for name in (*CONTENT, "garbage", "words")
        }
        self._ending = ending

    def __call__(self, message):
        match message["kind"]:
            case "prompt" if "fs.read" in message["text"]:
                self._look()
                return self._end(message["id"])
            case "prompt":
                delta = {"kind": "prompt.delta", "id": message["id"], "text": self.secrets["delta"]}
                return [delta, {"kind": "prompt.result", "id": message["id"], "text": self.secrets["answer"]}]
            case "tool.invoke":
                arguments = {"path": self.secrets["arguments"]}
                return [
                    {"kind": "tool.invoke", "id": "h1", "tool": "fs.list", "arguments": arguments},
                    {"kind": "prompt", "id": "h2", "text": self.secrets["question"]},
                    {"kind": "tool.result", "id": message["id"], "result": [self.secrets["result"]]},
                ]
            case _:
                return []

    def _end(self, identifier):
        garbage, words = self.secrets["garbage"], self.secrets["words"]
        match self._ending:
            case "harness dies":
                return None
            case "no JSON":
                text = f'{{"kind": "prompt", "{garbage}": {words}}}'.encode()
                return [len(text).to_bytes(4) + text]
            case "no such kind":
                return [{"kind": "no.such.kind", "id": "h9", garbage: words}]
            case "no such request":
                return [{"kind": "tool.result", "id": "h9", garbage: words}]
            case "refused":
                error = {"kind": "prompt.error", "id": identifier, "code": "failed", "message": words}
                return [error, {"kind": "end"}]
        return [{"kind": "prompt.result", "id": identifier, "text": words}, {"kind": "end"}]


TEXT, EVENTS = ("--debug",), ("--json", "--debug")
LONG = pytest.mark.slow

ENDINGS = [
    ("process", "success", 0, EVENTS),
    ("process", "no JSON", 1, TEXT),
    ("process", "panic", 1, EVENTS),
    pytest.param("process", "success", 0, TEXT, marks=LONG),
    pytest.param("process", "no JSON", 1, EVENTS, marks=LONG),
    pytest.param("process", "no such kind", 1, EVENTS, marks=LONG),
    pytest.param("process", "no such request", 1, TEXT, marks=LONG),
    pytest.param("process", "refused", 0, EVENTS, marks=LONG),
    pytest.param("process", "harness dies", 0, EVENTS, marks=LONG),
    pytest.param("process", "exit:3", 1, TEXT, marks=LONG),
    pytest.param("qemu", "success", 0, EVENTS, marks=LONG),
    pytest.param("qemu", "no JSON", 1, TEXT, marks=LONG),
    pytest.param("qemu", "panic", 1, EVENTS, marks=LONG),
]
"""Who runs it, how it ends (`panic` and `exit:3` are the guest's ways), with what exit code, shown how."""


def look_everywhere(world, told):
    """All that a session leaves to be read, by where it is."""
    places = {"stdout": told[0], "stderr": told[1]}
    for path in world.directory("s1").iterdir():
        places[path.name] = path.read_text(errors="replace")
    shown = (["logs", "s1"], ["logs", "s1", "--json"], ["logs", "s1", "--console"], ["ps", "--all", "--json"])
    for words in (*shown, ["replay", "s1", "--step"], ["graph", "--journal", "s1"], ["reap", "--json"]):
        done = subprocess.run(
            [world.command()[0], *words],
            capture_output=True,
            text=True,
            timeout=300,
            env={name: value for name, value in world.environment.items() if name != "KENAZ_TEST_SECRET"},
            stdin=subprocess.DEVNULL,
            check=False,
        )
        places[" ".join(words)] = done.stdout + done.stderr
    return places


@pytest.mark.parametrize(("driver", "ending", "code", "form"), ENDINGS)
def test_no_end_shows_content_while_the_session_lives_or_after(
    world, harness, token_of, request, driver, ending, code, form
):
    if driver == "qemu":
        request.getfixturevalue("qemu")
    lookout = Lookout(world, token_of)
    talker = Talker(ending, lookout.look)
    far = harness(talker)
    world.environment["KENAZ_TEST_SECRET"] = talker.secrets["given"]
    text = SPEC.format(literal=talker.secrets["literal"])
    if ending in ("panic", "exit:3"):
        text = text.replace("demo]", f'demo, "{ending}"]')
    spec = world.state.with_name("spec.yaml")
    spec.write_text(text)
    words = ("--session-id", "s1", "--harness", far.address, *form)
    try:
        running = world.start(*words, spec=str(spec), driver=driver)
        lookout.launcher = running.pid
        told = running.communicate(timeout=300)
    finally:
        lookout.finish()
    far.was_cut_off()
    assert running.returncode == code, told
    # There was something to be seen, and somebody who saw it.
    assert "GIVEN is set" in [message.get("text") for message in far.heard]
    assert lookout.helpers
    [token] = lookout.tokens
    canaries = {**talker.secrets, "token": token}

    def found(text):
        return [name for name, value in canaries.items() if value in text]

    places = {
        "what others see": b"\n".join(lookout.seen).decode(errors="replace"),
        "environments of helpers": b"\n".join(lookout.helpers).decode(errors="replace"),
        **look_everywhere(world, told),
    }
    assert {place: names for place, text in places.items() if (names := found(text))} == {}
