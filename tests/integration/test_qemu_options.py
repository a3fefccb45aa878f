"""The golden command lines held to what the QEMU of this host says of itself: also those for systems that it
does not run on, as far as it knows their options."""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from tests import wine

GOLDEN = sorted((Path(__file__).parents[1] / "unit/golden").glob("qemu-*.txt"))
ELSEWHERE = {"hvf", "whpx"}
"""Accelerators of other systems: no QEMU of Linux knows them."""

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-system-x86_64") is None or shutil.which("qemu-system-aarch64") is None,
    reason="needs qemu-system-x86_64 and qemu-system-aarch64",
)


def words_of(path: Path) -> list[str]:
    """The command line of a golden file."""
    return path.read_text().split("\n--\n")[0].splitlines()


@functools.cache
def told(program: str, *question: str) -> str:
    """What QEMU answers; one of Windows answers by way of Wine."""
    windows = program == wine.QEMU_BINARY
    command = ["wine", program] if windows else [program]
    done = subprocess.run(
        [*command, *question],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env=wine.environment() if windows else None,
    )
    return done.stdout + done.stderr


def properties(program: str, device: str) -> set[str]:
    """The options of a device."""
    lines = told(program, "-device", f"{device},help").splitlines()
    return {line.split("=")[0].strip() for line in lines if "=" in line}


def pairs(option: str) -> dict[str, str]:
    """The keys and values of an option; a comma of a value is doubled."""
    parts = option.replace(",,", "\0").split(",")
    return {key: value.replace("\0", ",") for key, _, value in (part.partition("=") for part in parts)}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_this_qemu_knows_each_option(path: Path) -> None:
    program = Path(words_of(path)[0]).name
    assert shutil.which(program)
    hold(path, program, ELSEWHERE)


@pytest.mark.only_where(wine.is_ready())
@pytest.mark.parametrize("path", [path for path in GOLDEN if "whpx" in path.stem], ids=lambda path: path.stem)
def test_a_qemu_for_windows_knows_each_option_and_the_accelerator(path: Path) -> None:
    hold(path, wine.QEMU_BINARY, set())


def hold(path: Path, program: str, unknown: set[str]) -> None:
    """Each option of the golden command line is one that this QEMU knows, but for these accelerators."""
    words = words_of(path)[1:]
    flags = [(flag, value) for flag, value in zip(words, [*words[1:], ""], strict=True) if flag[0] == "-"]
    help_text = told(program, "-help")
    for flag, value in flags:
        assert f"\n{flag}" in help_text, flag
        first, *_ = value.split(",")
        match flag:
            case "-machine":
                machines = {
                    line.split()[0] for line in told(program, "-machine", "help").splitlines() if line
                }
                assert first in machines
            case "-accel":
                assert first in unknown | set(told(program, "-accel", "help").split())
            case "-cpu":
                names = set(told(program, "-cpu", "help").split())
                assert first in names | {"host", "max"}, first  # which are listed where they can be had
            case "-device":
                wanted = pairs(value).keys() - {first, "id"}
                assert wanted <= properties(program, first), (first, wanted)
            case "-chardev":
                assert first in told(program, "-machine", "none", "-chardev", "help").split(), first
            case _:
                continue


def test_a_command_line_for_windows_runs_but_for_its_accelerator(tmp_path: Path) -> None:
    """QMP over stdin and stdout, the console over a pipe, the channel over TCP."""
    words = words_of(next(path for path in GOLDEN if path.stem == "qemu-q35-whpx-serial"))
    for direction in ("in", "out"):
        os.mkfifo(tmp_path / f"console.{direction}")
    (tmp_path / "kernel").write_bytes(b"")
    with socket.create_server(("127.0.0.1", 0)) as channel:
        changes = {
            "whpx,kernel-irqchip=off": "tcg",
            "pipe,id=console,path=kenaz-hello-1-console": f"pipe,id=console,path={tmp_path}/console",
            "socket,id=channel,host=127.0.0.1,port=49152": "socket,id=channel,host=127.0.0.1,port="
            f"{channel.getsockname()[1]}",
        }
        assert changes.keys() <= set(words)
        command = [changes.get(word, word) for word in words]
        # The files that are named are not here, and nothing is to be booted.
        for flag in ("-kernel", "-append", "-drive"):
            while flag in command:
                at = command.index(flag)
                value = command[at + 1]
                del command[at : at + 2]
                if flag == "-drive":
                    drive = pairs(value)["id"]
                    device = next(n for n, word in enumerate(command) if f"drive={drive}," in word)
                    del command[device - 1 : device + 1]
        while "-initrd" in command:
            at = command.index("-initrd")
            del command[at : at + 2]
        with subprocess.Popen(
            [*command, "-S"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as qemu:
            said, complaints = qemu.communicate(
                '{"execute":"qmp_capabilities"}\n{"execute":"query-status"}\n{"execute":"quit"}\n', timeout=30
            )
            channel.settimeout(5)
            channel.accept()[0].close()
    assert (qemu.returncode, complaints) == (0, "")
    replies = [json.loads(line) for line in said.splitlines()]
    assert "QMP" in replies[0]
    assert replies[2]["return"]["status"] == "prelaunch"
