"""What a session must not show: values of its environment, what is said on the channel, and its token."""

import json
import secrets
import stat
import subprocess
import sys
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
            timeout=60,
            env=environment,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "LITERAL" in done.stdout
        assert not any(canary in done.stdout for canary in canaries)
    json.loads(done.stdout)
