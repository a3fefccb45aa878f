"""Sessions with a stand-in of today's harness-vm in a real machine: NDJSON over a forwarded port, the host
dials. The stand-in is tests/integration/harness_vm, with the traps of the original."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kenaz_engine.channel.connection import Connection
from kenaz_engine.channel.framing import LINE_OUT
from kenaz_engine.guest import cpio
from kenaz_engine.guest.build import build
from kenaz_engine.guest.recipe import FILES
from kenaz_engine.images.catalog import default_cache, find_image

SECONDS = 180.0
Message = dict[str, Any]

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-system-x86_64") is None or shutil.which("apt-get") is None,
    reason="needs QEMU and a Debian host",
)

SPEC = """\
apiVersion: kenaz.dev/v1
kind: Session
metadata: {{name: harness-vm}}
spec:
  lifecycle: standard-reconnect
  driver: qemu
  image: {image}
  tools: {{allow: ["fs.*", "web-search.*"]}}
  network: nat
  channel: {{transport: tcp, framing: ndjson, dial: host, approvals: harness}}
"""


def replaced(text: str, old: str, new: str) -> bytes:
    assert text.count(old) == 1
    return text.replace(old, new).encode()


@pytest.fixture(scope="module")
def image(go_program: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo image with the stand-in in its agent's place: its initrd puts it onto the throw-away disk."""
    build("x86_64")
    demo = find_image("demo", "x86_64", default_cache())
    assert demo.manifest is not None
    assert demo.initrd is not None
    manifest = json.loads(demo.manifest.read_text())
    variant = tmp_path_factory.mktemp("image")
    for name in ("kernel", "root"):
        (variant / manifest["parts"][name]["file"]).symlink_to(demo.parts[name].path)
    steps = "busybox cp /harness-vm root/usr/bin/harness-vm\nbusybox cp /harness-init root/sbin/init\n"
    into_root = "busybox mount -o move /sys /root/sys"
    agent = re.compile(r"^ *python3\.11 .*--machine$", re.MULTILINE)
    init = (FILES / "init.sh").read_text()
    assert len(agent.findall(init)) == 1
    start = "set -a; . /run/kenaz/meta/kenaz.env; set +a; /usr/bin/harness-vm"
    added = [
        cpio.file(
            "init", replaced((FILES / "initrd-init.sh").read_text(), into_root, steps + into_root), 0o755
        ),
        cpio.file("harness-init", agent.sub(start, init).encode(), 0o755),
        cpio.file("harness-vm", go_program("harness_vm").read_bytes(), 0o755),
    ]
    initrd = demo.initrd.read_bytes() + cpio.archive(added)
    (variant / "initrd").write_bytes(initrd)
    manifest["name"] = "harness-vm"
    manifest["parts"]["initrd"] |= {"size": len(initrd), "sha256": hashlib.sha256(initrd).hexdigest()}
    (variant / "image.json").write_text(json.dumps(manifest))
    return variant / "image.json"


class Harness:
    """Reads and writes payloads as they are on the wire."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def receive(self) -> bytes:
        payload = await self._connection.receive()
        assert payload is not None
        return payload

    async def expect(self, kind: str, **members: Any) -> Message:
        message: Message = json.loads(await self.receive())
        assert message["kind"] == kind, message
        assert members.items() <= message.items()
        return message

    async def say(self, payload: bytes | None = None, **message: Any) -> None:
        self._connection.put(json.dumps(message).encode() if payload is None else payload)
        await self._connection.flush()


Play = Callable[[Harness], Awaitable[None]]
Run = Callable[..., Awaitable[tuple[Message, list[Message]]]]


@pytest.fixture
def session(with_harness: Run, image: Path, tmp_path: Path) -> Run:
    """Runs a session with that image, whose harness plays."""
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC.format(image=image))

    async def run(play: Play, *sets: str) -> tuple[Message, list[Message]]:
        return await with_harness(spec, sets, lambda it: play(Harness(it)), seconds=SECONDS)

    return run


async def reads(harness: Harness) -> None:
    """What passes is not touched: order, escapes, sizes."""
    await harness.say(b'{ "req_id":"r1",  "kind":"sessions.list" , "args":{}}')
    assert await harness.receive() == (
        rb'{"kind":"sessions.list.ok","req_id":"r1","sessions":[{"createdAt":"","id":"c1",'
        rb'"name":"a \u003cb\u003e \u0026 c","updatedAt":""}]}'
    )
    await harness.say(kind="sessions.list_messages", req_id="r2", args={"sessionID": "c1"})
    assert len(await harness.receive()) > 2_000_000
    await harness.say(kind="tools.list", req_id="r3")
    tools = await harness.expect("tools.list.ok", req_id="r3")
    assert [tool["name"] for tool in tools["tools"]] == ["fs", "web-search"]
    await harness.say(kind="providers.list", req_id="r4")
    await harness.expect("providers.list.error", req_id="r4", code="unavailable")


async def lines(harness: Harness) -> None:
    """A line of 64 KiB passes; one byte more would end the connection, and is answered instead."""
    frame = json.dumps({"kind": "task.start", "task_id": "long", "prompt": ""}).encode()
    fits = frame.replace(b'""', b'"echo ' + b"y" * (LINE_OUT - 1 - len(frame) - 5) + b'"')
    assert len(fits) + 1 == LINE_OUT
    await harness.say(fits.replace(b"y", b"yy", 1))
    await harness.expect("task.error", task_id="long", code="line_too_long")
    await harness.say(fits)
    for kind in ("task.running", "task.running", "task.complete"):
        await harness.expect(kind, task_id="long")
    # What JSON calls white space would be two lines for the guest.
    await harness.say(b'{"kind":"task.start",\n"task_id":"two","prompt":"echo"}')
    await harness.expect("task.error", task_id="two", code="line_break")
    await harness.say(b"no json")
    await harness.expect("task.error", code="bad_request")


async def tasks(harness: Harness) -> None:
    """One task at a time; a cancel hits the one that it names, and no other."""
    await harness.say(kind="task.start", task_id="t1", prompt="wait")
    await harness.say(kind="task.start", task_id="t2", prompt="echo")
    await harness.expect("task.error", task_id="t2", code="task_conflict")
    await harness.say(kind="task.cancel", task_id="t2")
    await harness.say(kind="ping", nonce="n")
    await harness.expect("pong", nonce="n")
    await harness.say(kind="task.cancel", task_id="t1")
    await harness.expect("task.cancelled", task_id="t1")
    await harness.say(kind="task.start", task_id="t3", prompt="ask")
    await harness.say(kind="task.cancel", task_id="t1")  # late: it would end t3
    asked = await harness.expect("task.approval_requested", task_id="t3", summary="rm -rf <all> & more")
    decision = {"task_id": "t3", "approval_id": asked["approval_id"], "decision": "allow_once"}
    await harness.say(kind="task.approval_decision", **decision)
    await harness.expect("task.approval_resolved", decision="allow_once", source="host")
    await harness.expect("task.running", text="allow_once")
    await harness.expect("task.complete", task_id="t3")
    await harness.say(kind="task.approval_decision", **decision)  # late: no reply
    await harness.say(kind="task.start", task_id="t4", prompt="x", run_params={"autonomy_tier": "wild"})
    await harness.expect("task.error", task_id="t4", code="bad_request")
    await harness.say(kind="task.start", task_id="t5", prompt="fail")
    await harness.expect("task.error", task_id="t5", code="graph_run_failed")


async def a_drop(harness: Harness) -> None:
    """The connection breaks with a task on it. The launcher dials again."""
    await harness.say(kind="task.start", task_id="t6", prompt="drop")
    await harness.expect("task.error", task_id="t6", code="gone")
    assert await harness.receive() == b'{"kind":"guest.lost"}'
    await harness.expect("guest.back", capabilities=["approval"])
    await harness.say(kind="task.start", task_id="t7", prompt="echo again")
    await harness.expect("task.running", text="echo again")
    await harness.expect("task.running", text="again")
    await harness.expect("task.complete", task_id="t7")


async def the_end(harness: Harness) -> None:
    """The task that runs is cancelled, its end is waited for and passed on."""
    await harness.say(kind="task.start", task_id="t8", prompt="wait")
    await harness.say(kind="end")
    await harness.expect("task.cancelled", task_id="t8")
    await harness.expect("session.close", outcome="success")


async def test_a_session_with_all_that_this_guest_does(session: Run) -> None:
    async def play(harness: Harness) -> None:
        await harness.expect("session.open", build="", capabilities=["approval"], protocol=1)
        for part in (reads, lines, tasks, a_drop, the_end):
            await part(harness)

    result, records = await session(play)
    assert (result["success"], result["exit"], result["left"]) == (True, 0, []), result
    way = [r["state"] for r in records if r["kind"] == "entered"]
    assert way[-6:] == ["running", "reconnecting", "running", "draining", "stopping", "releasing"]
    header = records[0]
    assert header["transport"] == "tcp"
    assert any("every user of this host" in note for note in header["notes"])
    [port] = [r["handle"] for r in records if r["kind"] == "acquired" and r["type"] == "port"]
    [vm] = [r for r in records if r["kind"] == "intent" and r["resource"] == "vm"]
    forward = f"hostfwd=tcp:127.0.0.1:{port['port']}-:7881"
    assert sum(forward in word for word in vm["intent"]["argv"]) == 1
    text = json.dumps(records)
    assert "rm -rf" not in text
    assert "echo" not in text
    late = [(r["message"], r["id"]) for r in records if r.get("outcome") == "late"]
    assert late[:2] == [("task.cancel", "t2"), ("task.cancel", "t1")]
    assert [r["message"] for r in records if r.get("direction") == "to-guest"].count("task.cancel") == 1


@pytest.mark.slow
async def test_approvals_are_asked_for_only_where_somebody_decides(session: Run) -> None:
    async def play(harness: Harness) -> None:
        await harness.expect("session.open", capabilities=[])
        await harness.say(kind="task.start", task_id="t1", prompt="ask")
        await harness.expect("task.running", text="not asked")
        await harness.expect("task.complete", task_id="t1")
        await harness.say(
            kind="task.approval_decision", task_id="t1", approval_id="rid-1", decision="allow_once"
        )
        await harness.expect("task.error", code="bad_request")
        await harness.say(kind="end")
        await harness.expect("session.close", outcome="success")

    result, _ = await session(play, "spec.channel.approvals=none")
    assert (result["success"], result["left"]) == (True, [])
