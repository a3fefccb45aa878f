"""vfkit's own parser over the command lines of its driver: Go, built from vfkit's module, which `.ci/setup`
fetches where there is a Go that can build it (1.25, which vfkit asks for)."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings

from kenaz_drivers.contract import Capabilities, Disk, DriverError, LaunchRequest
from kenaz_drivers.vfkit.argv import build, on_virtio

HERE = Path(__file__).parent
TESTS = HERE.parent

Ask = Callable[[Sequence[str]], dict[str, Any]]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"vfkit_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


properties = _load(TESTS / "property/test_vfkit_properties.py")


def _go_is_recent() -> bool:
    binary = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if binary is None:
        return False
    told = subprocess.run([binary, "env", "GOVERSION"], capture_output=True, text=True, check=False).stdout
    numbers = re.match(r"go(\d+)\.(\d+)", told)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= (1, 25)


pytestmark = [pytest.mark.slow, pytest.mark.only_where(_go_is_recent())]


@pytest.fixture(scope="module")
def ask(go_program: Callable[[str], Path]) -> Iterator[Ask]:
    """vfkit's answer to a command line: the machine, or `error`."""
    with subprocess.Popen(
        [go_program("vfkit_parser")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parser:
        assert parser.stdin is not None
        assert parser.stdout is not None
        wanted, given = parser.stdin, parser.stdout

        def ask(argv: Sequence[str]) -> dict[str, Any]:
            wanted.write(json.dumps(argv) + "\n")
            wanted.flush()
            answer: dict[str, Any] = json.loads(given.readline())
            return answer

        yield ask
        wanted.close()


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A directory for disks, whose path says nothing to any parser."""
    with tempfile.TemporaryDirectory(prefix="kz-") as directory:
        yield Path(directory)


def disk_in(scratch: Path, disk: Disk, number: int) -> Disk:
    """The disk with a real file, whose name is as hostile as a file system lets it be."""
    name = re.sub(r"[/\x00\ud800-\udfff]", "_", disk.path).encode()[:200].decode(errors="ignore")
    path = scratch / f"{number}{name}"
    path.write_bytes(b"disk")
    return replace(disk, path=str(path))


def devices(told: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(device) for device in told["machine"]["devices"]]


def test_vfkit_reads_what_was_meant(ask: Ask, scratch: Path) -> None:
    seen = {"taken": 0, "refused": 0}

    @settings(max_examples=400)
    @given(properties.requests)
    def check(request: LaunchRequest) -> None:
        disks = tuple(disk_in(scratch, disk, number) for number, disk in enumerate(request.disks))
        request = replace(request, disks=disks)
        try:
            command = build(request, "vfkit")
        except DriverError:
            seen["refused"] += 1
            return
        seen["taken"] += 1
        told = ask(command.argv[1:])
        assert "error" not in told, (told, command.argv)
        machine = told["machine"]
        assert (machine["vcpus"], machine["memoryBytes"]) == (
            request.cpus,
            -(-request.memory // (1 << 20)) << 20,
        )
        assert told["rest"] == command.rest
        loader = machine["bootloader"]
        if request.kernel:
            read = loader["vmlinuzPath"], loader["initrdPath"], loader["kernelCmdLine"]
            assert read == (request.kernel, request.initrd, on_virtio(request.cmdline))
        else:
            read = loader["efiVariableStorePath"], loader["createVariableStore"]
            assert read == (command.variables, True)
        found = devices(told)
        blocks = [device for device in found if device["kind"] == "virtioblk"]
        assert [(d["imagePath"], d.get("readOnly", False)) for d in blocks] == [
            (disk.path, disk.readonly) for disk in disks
        ]
        [vsock] = [device for device in found if device["kind"] == "virtiosock"]
        assert (vsock["port"], vsock["socketURL"], vsock["listen"]) == (request.port, request.channel, True)
        assert [d["usesStdio"] for d in found if d["kind"] == "virtioserial"] == [True]
        nets = [device.get("nat") for device in found if device["kind"] == "virtionet"]
        assert nets == ([True] if request.network == "nat" else [])
        # What it would be told by whoever writes vfkit's command lines in Go reads the same.
        assert ask(told["words"] + ["--restful-uri", command.argv[-1]])["machine"] == machine

    check()
    assert min(seen.values()) >= 20, seen


BAD = [
    ["--cpus", "2", "--memory", "256"],
    ["--cpus", "-1", "--memory", "256", "--bootloader", "efi,variable-store=/v,create"],
    ["--cpus", "1", "--memory", "x", "--bootloader", "efi,variable-store=/v,create"],
    ["--cpus", "1", "--memory", "1", "--kernel", "/k", "--initrd", "/i"],
    ["--cpus", "1", "--memory", "1", "--bootloader", 'efi,variable-store="/v'],
    ["--cpus", "1", "--memory", "1", "--bootloader", "efi,variable-store=/v,create=yes"],
    ["--cpus", "1", "--memory", "1", "--bootloader", "efi,store=/v"],
    ["--cpus", "1", "--memory", "1", "--bootloader", "efi,create"],
]
BAD_DEVICES = [
    "virtio-blk,path=/no/such/disk",
    "virtio-blk,path=/dev/null",
    "virtio-blk,path={qcow2}",
    "virtio-blk,path={disk},readonly=yes",
    "virtio-blk,path={disk},cache=none",
    "virtio-vsock,port=x,socketURL=/s",
    "virtio-vsock,port=1",
    "virtio-vsock,port=1,socketURL=/s,both",
    "virtio-serial",
    "virtio-serial,stdio,logFilePath=/l",
    "virtio-rng,fast",
    "floppy",
]
EFI = ["--cpus", "1", "--memory", "1", "--bootloader", "efi,variable-store=/v,create"]


def test_the_stand_in_refuses_what_vfkit_refuses(ask: Ask, scratch: Path) -> None:
    (scratch / "qcow2").write_bytes(b"QFI\xfb....")
    (scratch / "disk").write_bytes(b"disk")
    names = {name: str(scratch / name) for name in ("qcow2", "disk")}
    bad = [[*words, "--restful-uri", "unix:///r"] for words in BAD]
    bad += [
        [*EFI, "--device", device.format(**names), "--restful-uri", "unix:///r"] for device in BAD_DEVICES
    ]
    bad += [
        [*EFI, "--restful-uri", uri]
        for uri in ("unix://host/r", "unix://", "ftp:///r", f"unix:///{'r' * 103}")
    ]
    bad.append([*EFI, "--nonsense", "1", "--restful-uri", "unix:///r"])
    assert "error" not in ask([*EFI, "--restful-uri", "unix:///r"])
    for words in bad:
        assert "error" in ask(words), words
        with pytest.raises((ValueError, OSError, LookupError)):
            properties.parse(words)


def test_the_path_of_a_socket_is_taken_out_of_a_uri(ask: Ask) -> None:
    told = ask([*EFI, "--restful-uri", "unix:///a%20b%25"])
    assert told["rest"] == "/a b%"
    assert properties.parse([*EFI, "--restful-uri", "unix:///a%20b%25"])["rest"] == told["rest"]


def test_each_character_of_a_path_is_read_as_it_is_or_refused(ask: Ask, scratch: Path) -> None:
    """One by one, for what is random may miss one."""
    plain = LaunchRequest(
        session="s",
        directory=str(scratch),
        runtime="/r",
        cpus=1,
        memory=1 << 20,
        transport="vfkit",
        channel="/c",
        port=1,
        capabilities=Capabilities(usable=True, reasons=(), arch="aarch64"),
    )
    refused = set()
    for char in map(chr, (*range(1, 47), *range(48, 256), 0x20AC, 0x1F600)):
        disk = scratch / f"a{char}41"
        disk.write_bytes(b"disk")
        requests = {
            "channel": replace(plain, channel=f"/a{char}41"),
            "runtime": replace(plain, runtime=f"/a{char}41"),
            "disk": replace(plain, disks=(Disk("root", str(disk), "raw"),)),
        }
        for place, request in requests.items():
            try:
                command = build(request, "vfkit")
            except DriverError:
                refused.add((place, char))
                continue
            told = ask(command.argv[1:])
            assert "error" not in told, (place, char, told)
            assert told["rest"] == command.rest
            found = [device for device in devices(told) if device["kind"] in {"virtioblk", "virtiosock"}]
            assert {device.get("imagePath", device.get("socketURL")) for device in found} == {
                request.channel,
                *(disk.path for disk in request.disks),
            }
    assert {char for place, char in refused if place == "disk"} == {","}
    assert {char for place, char in refused if place == "runtime"} == set()
    controls = {chr(number) for number in (*range(1, 32), 127)}
    assert {char for place, char in refused if place == "channel"} == {"%", "?", "#", ",", *controls}
