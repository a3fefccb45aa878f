"""A guest as SigilOS is made, from its packages to nothing left behind: systemd, greetd, sway, the workbench.

Each boot under emulation costs some ten to twenty seconds of two processors, so each shows as much as it can.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kenaz_engine.images.catalog import default_cache, find_image

ROOT = Path(__file__).parents[2]
LAUNCHER = str(Path(sys.executable).with_name("kenaz-launcher"))
SIGILOS = str(ROOT / "specs/sessions/sigilos.yaml")
BOUND = 1500
"""Seconds for a build, or for a boot to a desktop, on a busy host that emulates."""

CONNECTING = "20m"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),  # its image is built first
    pytest.mark.skipif(
        not all(map(shutil.which, ("qemu-system-x86_64", "mmdebstrap"))), reason="needs QEMU and mmdebstrap"
    ),
]


@pytest.fixture(scope="module")
def image() -> str:
    """Builds the image, unless it is there and current, and takes no second build to see that it is."""
    for bound in (BOUND, 120):
        built = subprocess.run(
            ["make", "-s", "image-sigilos"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=bound,
            check=False,
        )
        assert built.returncode == 0, built.stdout + built.stderr
    assert "is current" in built.stdout
    return "sigilos"


def started(world: Any, session: str, *words: str, **options: str) -> subprocess.Popen[str]:
    spec = options.pop("spec", SIGILOS)
    options = {"timeouts.connecting": CONNECTING, **options}
    return world.start("--session-id", session, *words, spec=spec, driver="qemu", **options)


def pixels(picture: Path) -> set[bytes]:
    """The colours of a PNG of eight bits a channel, whose lines may be filtered."""
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    assert (depth, kind) == (8, 2)
    packed, at = b"", 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + length]
        at += 12 + length
    raw, stride = zlib.decompress(packed), 3 * width
    above, colours = bytes(stride), set()
    for row in range(height):
        start = row * (stride + 1)
        line = _unfiltered(raw[start], raw[start + 1 : start + 1 + stride], above)
        colours |= {line[x : x + 3] for x in range(0, stride, 3)}
        above = line
    return colours


def _unfiltered(how: int, line: bytes, above: bytes) -> bytes:
    """A line of a PNG (ISO 15948, 9.2), three bytes a pixel."""
    out = bytearray(line)
    for x in range(len(out)):
        left, up, corner = (out[x - 3], above[x], above[x - 3]) if x >= 3 else (0, above[x], 0)
        guess = left + up - corner
        near = min((left, up, corner), key=lambda value: abs(guess - value))
        out[x] = (out[x] + (0, left, up, (left + up) // 2, near)[how]) & 0xFF
    return bytes(out)


def test_the_desktop_is_seen_and_the_session_ends_along_the_declared_path(
    image: str, world: Any, harness: Callable[..., Any], tmp_path: Path
) -> None:
    """Over virtio-serial, with a screen: picture, path, clock, drain, bye, power button, nothing left."""
    heard: list[dict[str, Any]] = []

    def answer(message: dict[str, Any]) -> list[dict[str, Any]]:
        heard.append(message)
        if message["kind"] == "prompt":
            return [{"kind": "prompt.result", "id": message["id"], "text": "ok"}]
        if message["kind"] == "tool.invoke":
            return [{"kind": "tool.result", "id": message["id"], "result": "ok"}]
        return []

    peer = harness(answer)
    running = started(world, "desk", "--harness", peer.address)
    world.until(lambda: running.poll() is not None or sum(m["kind"] == "prompt" for m in heard) == 2, BOUND)
    [machine] = [
        r["handle"]["pid"] for r in world.records("desk") if r["kind"] == "acquired" and r["resource"] == "vm"
    ]
    command = Path(f"/proc/{machine}/cmdline").read_bytes().split(b"\0")
    seen = tmp_path / "desk.png"
    world.until(lambda: has_a_desktop(world, seen), BOUND)
    if where := os.environ.get("KENAZ_KEEP_PICTURE"):
        shutil.copy(seen, where)
    vnc = world.directory("desk") / "screen/vnc"
    assert vnc.is_socket()
    assert vnc.parent.stat().st_mode & 0o777 == 0o700
    assert world.call("end", "desk", f"--wait={BOUND}").returncode == 0
    out, _ = running.communicate(timeout=BOUND)
    assert running.returncode == 0, out
    assert world.path("desk")[-4:] == ["running", "draining", "stopping", "releasing"]
    assert re.search(r"kernel [\d.]+ s, user land [\d.]+ s, desktop [\d.]+ s, workbench [\d.]+ s", out)
    records = world.records("desk")
    assert [r["data"] for r in records if r["kind"] == "event" and r["type"] == "guest.bye"] == [
        {"reason": "drained"}
    ]
    [exited] = [r["data"] for r in records if r["kind"] == "event" and r["type"] == "vm.exited"]
    assert exited == {"clean": True, "message": "guest-shutdown: the guest powered off"}
    assert out.endswith("  nothing left behind\n")
    # The guest boundary: no network, no directory of the host, nothing secret on the kernel's command line,
    # and the config disk can only be read.
    words = b" ".join(command)
    assert not re.search(rb"netdev|virtfs|vhost-user-fs|-nic|:5900", words)
    assert b"TOKEN" not in command[command.index(b"-append") + 1]
    assert re.search(rb"id=KENAZMETA,format=raw,file=\S+,readonly=on", words)


def has_a_desktop(world: Any, picture: Path) -> bool:
    """Whether the screen shows sway's background, and a bar with writing in it."""
    done = world.call("screenshot", "desk", str(picture))
    if "not answer" in done.stderr:
        return False  # a busy host may take longer over one picture; the next one will do
    assert done.returncode == 0, done.stderr
    colours = pixels(picture)
    return {b"\x1d\x2f\x3f", b"\x0b\x16\x20"} <= colours and len(colours) > 8


def test_every_point_of_the_contract_holds_over_vsock_and_without_a_screen(image: str, world: Any) -> None:
    """`image check`, over vhost-user-vsock where this host has the daemon: sway is headless then."""
    values = ("channel.transport=vhost-user-vsock", f"timeouts.connecting={CONNECTING}")
    sets = [word for value in values for word in ("--set", f"spec.{value}")]
    done = subprocess.run(
        [LAUNCHER, "image", "check", image, "--json", *sets],
        capture_output=True,
        text=True,
        timeout=BOUND,
        env=world.environment,
        check=False,
    )
    told = json.loads(done.stdout)
    assert [(point["number"], point["holds"]) for point in told["points"]] == [
        (n, True) for n in range(1, 9)
    ], told
    assert (done.returncode, told["ok"]) == (0, True)


def test_the_root_has_the_room_that_the_session_gives_it(image: str, world: Any) -> None:
    words = {"workbench.args": '["sh", "-c", "df -m / | tail -n 1"]', "lifecycle": "ephemeral-exec"}
    options = {**words, "machine.disk": "3GiB", "machine.display": "none"}
    out, err = started(world, "s1", image=image, **options).communicate(timeout=BOUND)
    [size] = re.findall(r"^    \| \S+ +(\d+) +\d+ +\d+ +\d+% /$", out, re.MULTILINE)
    assert 2800 < int(size) < 3072, (out, err)


def test_another_build_of_it_is_the_same_to_the_byte(image: str, tmp_path: Path) -> None:
    subprocess.run(
        [LAUNCHER, "image", "build", image, "--output", tmp_path / "again"],
        capture_output=True,
        timeout=BOUND,
        check=True,
    )
    manifest = find_image(image, "x86_64", default_cache()).manifest
    assert manifest is not None
    first, again = (json.loads(path.read_bytes()) for path in (manifest, tmp_path / "again/image.json"))
    assert again["parts"] == first["parts"]


# --- what goes wrong inside ---------------------------------------------------------------------------------

FAULTS = """#!/bin/sh
# What the session's variable FAULT asks for, done by root before anybody logs in.
faults=$(sed -n 's/^KENAZ_ENVGRANT_FAULT="\\(.*\\)"$/\\1/p' /mnt/kenaz.env)
for fault in $faults; do
    case $fault in
        panic) echo c >/proc/sysrq-trigger ;;
        reboot) reboot -f ;;
        emergency) systemctl --no-block isolate emergency.target ;;
        sway) mount --bind /bin/false /usr/bin/sway ;;
        greetd) mount --bind /bin/false /usr/sbin/greetd ;;
        full)
            /usr/lib/systemd/systemd-growfs /
            dd if=/dev/zero of=/fill bs=1M 2>/dev/null
            df / | grep -q 100% || echo "kenaz: emergency: not full" >/dev/console
            ;;
        once) chmod 777 / ;;
        stubborn) systemctl --no-block start stubborn.service ;;
    esac
done
"""
FAULT_SERVICE = """[Unit]
DefaultDependencies=no
Before=kenaz-meta.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh /usr/lib/kenaz/faults
"""
STUBBORN_SERVICE = """[Service]
ExecStart=/bin/sh -c 'trap "" TERM; while :; do sleep 1000 & wait; done'
KillMode=process
TimeoutStopSec=infinity
"""


@pytest.fixture(scope="module")
def faulty(image: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image with a service in it that does what FAULT says: the same bytes otherwise."""
    directory = tmp_path_factory.mktemp("faulty")
    found = find_image(image, "x86_64", default_cache())
    assert found.manifest is not None
    document = json.loads(found.manifest.read_bytes())
    for name, part in found.parts.items():
        subprocess.run(
            ["cp", "--sparse=always", part.path, directory / document["parts"][name]["file"]], check=True
        )
    disk = directory / document["parts"]["root"]["file"]
    disk.chmod(0o600)
    commands = ["cd /etc/systemd/system"]
    files = {"faults": FAULTS, "fault.service": FAULT_SERVICE}
    for name, text in {**files, "stubborn.service": STUBBORN_SERVICE}.items():
        (directory / name).write_text(text)
        commands.append(f"write {directory / name} {name if '.' in name else f'/usr/lib/kenaz/{name}'}")
    commands.append("mkdir kenaz-meta.service.wants")
    commands.append("symlink kenaz-meta.service.wants/fault.service ../fault.service")
    tool = shutil.which("debugfs", path=f"{os.environ['PATH']}:/usr/sbin")
    assert tool is not None
    said = subprocess.run(
        [tool, "-w", "-f", "-", disk], input="\n".join(commands), capture_output=True, text=True, check=True
    )
    assert said.stderr.count("\n") <= 1, said.stderr
    with disk.open("rb") as file:
        document["parts"]["root"]["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    manifest = directory / "image.json"
    manifest.write_text(json.dumps(document))
    return str(manifest)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("sway", "failed: guest panicked while booting: .*kenaz: emergency: sway ended with status 1"),
        ("greetd", "failed: guest panicked while booting: .*kenaz: emergency: greetd.service failed"),
        ("full", "failed: guest panicked while booting: .*kenaz: emergency: sway ended with status 1"),
        ("panic", "failed: guest panicked while booting: .*Kernel panic - not syncing"),
        ("emergency", "failed: guest panicked while booting: .*You are in emergency mode"),
        ("reboot", "failed: VM exited before it dialled: guest-reset: the guest asked for a reboot"),
    ],
)
def test_what_fails_inside_is_told_in_one_line(faulty: str, world: Any, fault: str, says: str) -> None:
    running = started(world, "s1", image=faulty, **{"workbench.env.FAULT": fault, "machine.display": "none"})
    out, err = running.communicate(timeout=BOUND)
    assert (running.returncode, err) == (1, "")
    assert re.search(says, out), out
    assert out.endswith("  nothing left behind\n")


def test_a_disk_that_is_filled_while_the_guest_serves_is_the_guests_own_trouble(
    image: str, world: Any
) -> None:
    """The user takes all the room there is: what writes is told so, and the session ends as any."""
    script = "dd if=/dev/zero of=$HOME/fill bs=1M; df / | tail -n 1; echo more >$HOME/more || exit 9"
    words = {"workbench.args": json.dumps(["sh", "-c", script]), "lifecycle": "ephemeral-exec"}
    options = {**words, "machine.disk": "1GiB", "machine.display": "none"}
    out, err = started(world, "s1", image=image, **options).communicate(timeout=BOUND)
    assert "No space left on device" in out, out + err
    assert " 100% /\n" in out
    assert "failed: the command failed: exit code 9" in out
    assert world.path("s1")[-3:] == ["draining", "stopping", "releasing"]
    assert out.endswith("  nothing left behind\n")


def test_a_crash_is_lived_with_and_a_service_that_refuses_to_stop_is_cut_off(
    faulty: str, world: Any, harness: Callable[..., Any]
) -> None:
    peer = harness(lambda message: [])
    faults = {
        "workbench.env.FAULT": "once stubborn",
        "machine.display": "none",
        "timeouts.stopping": "15s",
    }
    options = {"lifecycle": "standard-reconnect", "workbench.args": '["once:exit:3", "idle"]', **faults}
    running = started(world, "s1", "--harness", peer.address, image=faulty, **options)

    def came_back() -> bool:
        assert running.poll() is None
        return world.status("s1") is not None and world.path("s1").count("running") == 2

    world.until(came_back, BOUND)
    assert world.call("end", "s1").returncode == 0
    out, _ = running.communicate(timeout=BOUND)
    assert running.returncode == 0, out
    path = world.path("s1")
    assert path[-6:] == ["reconnecting", "running", "draining", "stopping", "killing", "releasing"]
    assert "! guest did not power off" in out
    entered = {r["state"]: r["t"] for r in world.records("s1") if r["kind"] == "entered"}
    assert 15 <= entered["killing"] - entered["stopping"] < 17
