"""Kernel vsock, on a real kernel: a guest under TCG plays the host and loads vhost_vsock and vsock_loopback.

Its disk and its boot are in kernel_vsock/machine.py; what is proven inside is in kernel_vsock/checks.py. And,
since that takes a minute, `make test-all` has the launcher run a whole session in there, with a machine in
the machine.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from kenaz_engine.guest import build
from kenaz_engine.images.catalog import default_cache, find_image
from kenaz_engine.images.errors import ImageError
from kenaz_engine.images.manifest import Image

HERE = Path(__file__).parent / "kernel_vsock"
machine = runpy.run_path(str(HERE / "machine.py"), run_name="machine")
PYTHON, boot, make_disk = (machine[name] for name in ("PYTHON", "boot", "make_disk"))


def _ready() -> bool:
    try:
        find_image("demo", "x86_64", default_cache())
    except ImageError:
        return False
    tools = ("qemu-system-x86_64", "apt-get", "mke2fs", "depmod")
    return sys.version_info[:2] == (3, 11) and PYTHON.exists() and all(map(build._which, tools))


pytestmark = pytest.mark.skipif(
    not _ready(), reason="needs QEMU, the demo image (`make image`), and Debian 12 with its Python"
)


@pytest.fixture
def image() -> Image:
    return find_image("demo", "x86_64", default_cache())


def test_our_listener_our_claims_and_our_channel_on_a_kernel_that_is_a_host(
    image: Image, tmp_path: Path
) -> None:
    disk = make_disk(image, tmp_path, "python3.11 /lib/kenaz-host/checks.py", machines=False)
    lines = boot(image, disk, 512, 800)
    checks = re.findall(r"^(?:async )?def check_that_(\w+)", (HERE / "checks.py").read_text(), re.MULTILINE)
    assert [line for line in lines if line.startswith(("passed: ", "kenaz-host: "))] == [
        *(f"passed: {name}" for name in checks),
        "kenaz-host: status 0",
    ]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_session_with_a_machine_inside_the_machine(image: Image, tmp_path: Path) -> None:
    binary = "spec.driverOptions.qemu.binary=/lib/kenaz-host/qemu"
    words = [
        "spec.driver=qemu",
        "spec.channel.transport=vsock",
        binary,
        "spec.image=/lib/kenaz-host/image/image.json",
        "spec.timeouts.connecting=15m",  # two minutes where nothing else runs; a busy host takes eight
    ]
    sets = " ".join(f"--set {word}" for word in words)
    launcher = "python3.11 -c 'from kenaz_engine.cli.main import main; raise SystemExit(main())'"
    run = (
        "qemu-system-x86_64 -version >/dev/null\n"  # read from the disk once, for the probe has deadlines
        "python3.11 /lib/kenaz-host/intruder.py &\n"
        f"{launcher} run /lib/kenaz-host/hello.yaml --json {sets}\n"
        "status=$?; busybox cat /root/.local/state/kenaz/sessions/*/console.log; (exit $status)\n"
    )
    disk = make_disk(image, tmp_path, run, machines=True)
    lines = boot(image, disk, 2048, 2000)
    assert "kenaz-host: status 0" in lines
    assert "intruder: heard b''" in lines
    records = [json.loads(line) for line in lines if line.startswith('{"seq"')]
    header = records[0]
    assert (header["driver"], header["transport"], header["accelerator"]) == ("qemu", "vsock", "tcg")
    acquired = {r["resource"]: r["handle"] for r in records if r["kind"] == "acquired"}
    cid = acquired["socket"]["cid"]
    assert acquired["socket"]["port"] == 7881
    assert acquired["channel"] == {"peer": f"cid {cid}"}
    argv = next(r["intent"]["argv"] for r in records if r["kind"] == "intent" and r["resource"] == "vm")
    assert f"vhost-vsock-pci,guest-cid={cid},vhostfd=5" in argv
    said = [(r["direction"], r["message"]) for r in records if r["kind"] == "channel"]
    # What the guest tells besides depends on who is slow: the demo harness may end before it has spoken.
    assert said[:2] == [("from-guest", "hello"), ("to-guest", "welcome")]
    assert said[-1] == ("from-guest", "bye")
    end = records[-1]
    assert (end["kind"], end["success"], end["left"]) == ("end", True, [])
