"""From the command's start to the guest's hello, against a shell script that boots the same image by the
same command line; and from the power button to nothing left. Prints JSON. Needs QEMU and the demo image.

The script makes the overlay and starts QEMU; this program stands at its sockets, as the launcher does, and
takes the time of the first whole frame. Both kinds of run take turns, so that both see the same machine.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kenaz_drivers.contract import VIRTIO_SERIAL_PORT
from kenaz_engine.images.catalog import default_cache, find_image
from kenaz_engine.images.config_disk import environment_file, write_config_disk

ROUNDS = int(os.environ.get("KENAZ_BENCH_ROUNDS", "7"))
LAUNCHER = str(Path(sys.executable).with_name("kenaz-launcher"))
SPEC = str(Path(__file__).resolve().parents[2] / "specs" / "sessions" / "hello.yaml")
BOUNDS = {"handshake_ratio": 1.05, "end_extra_ms": 100.0}
PATIENCE = 120.0


def launched(state: Path) -> dict[str, Any]:
    """A run of the launcher: seconds from its exec to the hello, and from `stopping` to the process's end."""
    environment = {**os.environ, "KENAZ_STATE_DIR": str(state)}
    began = time.time()
    command = [LAUNCHER, "run", SPEC, "--json"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, timeout=PATIENCE)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    hello = next(r["wall"] for r in records if r.get("about") == "hello")
    stopping = next(r["t"] for r in records if r["kind"] == "entered" and r["state"] == "stopping")
    end = next(r["t"] for r in records if r["kind"] == "end")
    argv = next(r["intent"]["argv"] for r in records if r["kind"] == "intent" and r["resource"] == "vm")
    return {"handshake": hello - began, "end": end - stopping, "argv": argv}


def scripted(argv: list[str], folder: Path) -> dict[str, float]:
    """The same by a shell script: `qemu-img create`, then QEMU."""
    old = Path(next(word for word in argv if "path=" in word).split("path=")[1]).parent
    words = [word.replace(str(old), str(folder)) for word in argv]
    root = next(word for word in words if "id=root," in word).split("file=")[1].split(",")[0]
    base = find_image("demo", platform.machine(), default_cache()).root
    variables = {
        "KENAZ_SESSION_ID": "bench",
        "HARNESS_VM_TOKEN": "bench",
        "KENAZ_CHANNEL": f"virtio-serial:{VIRTIO_SERIAL_PORT}",
    }
    write_config_disk(folder / "config.raw", {"kenaz.env": environment_file(variables)})
    script = folder / "boot.sh"
    script.write_text(
        "set -e\n"
        f"qemu-img create -q -f qcow2 -F raw -b {shlex.quote(str(base))} {shlex.quote(root)} 1G\n"
        f"exec {shlex.join(words)}\n"
    )
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(folder / "channel.sock"))
    listening.listen(1)
    qmp, qmp_theirs = socket.socketpair()
    console, console_theirs = socket.socketpair()
    # A shell knows only descriptors of one digit.
    passed = [fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD, 5) for theirs in (qmp_theirs, console_theirs)]
    began = time.time()
    child = subprocess.Popen(
        ["sh", "-c", f"exec sh {shlex.quote(str(script))} 3<&{passed[0]} 4<&{passed[1]}"], pass_fds=passed
    )
    try:
        listening.settimeout(PATIENCE)
        channel, _ = listening.accept()
        channel.settimeout(PATIENCE)
        frame(channel)
        handshake = time.time() - began
        # The guest hears the button only once its services are up; the launcher's guest has worked by then.
        time.sleep(1)
        reader = qmp.makefile("rwb")
        reader.readline()
        for command in ("qmp_capabilities", "system_powerdown"):
            pressed = time.time()
            reader.write(json.dumps({"execute": command}).encode() + b"\n")
            reader.flush()
        child.wait(PATIENCE)
        Path(root).unlink()
        return {"handshake": handshake, "end": time.time() - pressed}
    finally:
        child.kill()
        child.wait()
        for one in (listening, qmp, qmp_theirs, console, console_theirs):
            one.close()
        for file in passed:
            os.close(file)


def frame(channel: socket.socket) -> bytes:
    """One length-prefixed payload; a mark before it (rule F6 of the protocol) is passed over."""
    stream = channel.makefile("rb")
    first = b"\xff"
    while first == b"\xff":
        first = stream.read(1)
    (size,) = struct.unpack(">I", first + stream.read(3))
    return stream.read(size)


def main() -> int:
    """Measures, prints, and returns 1 when a bound is not held."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        argv = launched(Path(folder, "warm"))["argv"]
        for number in range(ROUNDS):
            place = Path(folder, f"script-{number}")
            place.mkdir()
            theirs.append(scripted(argv, place))
            ours.append(launched(Path(folder, f"launcher-{number}")))
    found = {
        "handshake_launcher_s": round(statistics.median(r["handshake"] for r in ours), 3),
        "handshake_script_s": round(statistics.median(r["handshake"] for r in theirs), 3),
        "end_launcher_s": round(statistics.median(r["end"] for r in ours), 3),
        "end_script_s": round(statistics.median(r["end"] for r in theirs), 3),
    }
    ratios = {
        "handshake_ratio": round(found["handshake_launcher_s"] / found["handshake_script_s"], 3),
        "end_extra_ms": round((found["end_launcher_s"] - found["end_script_s"]) * 1e3, 1),
    }
    missed = [name for name, bound in BOUNDS.items() if ratios[name] > bound]
    print(json.dumps({**found, **ratios, "rounds": ROUNDS, "bounds": BOUNDS, "missed": missed}, indent=2))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
