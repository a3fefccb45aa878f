"""vfkit's command lines, to the letter, and what its end means."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kenaz_drivers.contract import Capabilities, Disk, DriverError, LaunchRequest, Reason
from kenaz_drivers.vfkit.argv import build, on_virtio
from kenaz_drivers.vfkit.driver import VfkitDriver, describe_exit, hint_for

GOLDEN = Path(__file__).parent / "golden"

REQUEST = LaunchRequest(
    session="hello",
    directory="/state",
    runtime="/run/k",
    cpus=2,
    memory=(256 << 20) + 1,
    transport="vfkit",
    channel="/run/k/channel.sock",
    port=7881,
    capabilities=Capabilities(
        usable=True,
        reasons=(),
        arch="aarch64",
        accelerator="vz",
        data={"binary": "/opt/homebrew/bin/vfkit"},
    ),
    kernel="/cache/Image,1",
    initrd='/cache/"initrd"',
    cmdline='console=ttyAMA0 quiet x="a b"',
    disks=(
        Disk("root", "/state/root.raw", "raw"),
        Disk("config", "/state/config.raw", "raw", readonly=True),
        Disk("workbench", "/cache/blobs/ab", "raw", readonly=True),
    ),
    mark="hello-1",
)

CASES = {
    "kernel": REQUEST,
    "efi-nat": replace(REQUEST, kernel="", initrd="", cmdline="", network="nat"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_command_line_is_the_golden_one(name):
    plan = VfkitDriver().plan(CASES[name])
    lines = [*plan.argv, "--", *(f"makes: {path}" for path in plan.data["files"])]
    assert "\n".join(lines) + "\n" == (GOLDEN / f"vfkit-{name}.txt").read_text()
    assert plan.environment == {"LC_ALL": "C.UTF-8", "KENAZ_MARK": "hello-1"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("console=ttyS0 quiet", "console=hvc0 quiet"),
        ("quiet console=tty0 console=ttyAMA0,115200", "quiet console=hvc0"),
        ("console=hvc1 xconsole=ttyS0", "console=hvc1 xconsole=ttyS0"),
        ("quiet  splash", "quiet  splash"),
    ],
)
def test_the_console_is_the_one_that_there_is(before, after):
    assert on_virtio(before) == after


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"display": "window"}, "shows no screen"),
        ({"network": "bridged"}, "unknown to this driver"),
        ({"transport": "vsock"}, "no transport 'vsock'"),
        ({"initrd": ""}, "only with an initrd and a command line"),
        ({"cmdline": ""}, "only with an initrd and a command line"),
        ({"kernel": "a\0b"}, "NUL"),
        ({"disks": (Disk("root", "/r", "qcow2"),)}, "format 'qcow2'"),
        ({"disks": (Disk("root", "/a,readonly", "raw"),)}, "no path with ','"),
        ({"channel": "/run/a,b"}, "no path with ','"),
        ({"channel": "/run/100%41"}, "no socket with '%'"),
        ({"channel": "/run/a?b"}, "no socket with '?'"),
        ({"channel": "/run/a#b"}, "no socket with '#'"),
        ({"channel": "/run/a\tb"}, "no socket with '\\t'"),
        ({"channel": "//run/a"}, "no socket with '//'"),
        ({"channel": "/" + "x" * 103}, "has 104 bytes"),
        ({"channel": "relative"}, "path of a socket"),
        ({"runtime": "/" + "ö" * 50}, "has 111 bytes"),
        ({"kernel": "", "directory": '/a"b'}, "no path with '\"'"),
        ({"kernel": "", "directory": "/a,b"}, "no path with ','"),
    ],
)
def test_what_vfkit_cannot_be_told_is_refused(changes, words):
    with pytest.raises(DriverError) as caught:
        build(replace(REQUEST, **changes), "vfkit")
    assert words in str(caught.value)
    assert caught.value.hint or "format" in words


def test_a_socket_can_be_where_macos_has_the_state_of_programs():
    state = "/Library/Application Support/kenaz/sessions/hello"
    argv = build(replace(REQUEST, directory=state, channel=f"{state}/channel.sock"), "vfkit").argv
    assert f"virtio-vsock,port=7881,socketURL={state}/channel.sock,listen" in argv


@pytest.mark.parametrize(
    ("directory", "variable"), [("/run/100%", "KENAZ_STATE_DIR"), ("/state", "XDG_RUNTIME_DIR")]
)
def test_what_moves_the_socket_is_named(directory, variable):
    with pytest.raises(DriverError) as caught:
        build(replace(REQUEST, directory=directory, channel="/run/100%/channel.sock"), "vfkit")
    assert caught.value.hint == f"set {variable} to another directory"


def test_a_host_that_was_not_probed_gives_no_plan():
    nothing = Capabilities(False, (Reason(False, "vfkit runs on macOS only"),), "aarch64")
    with pytest.raises(DriverError, match="planned for: vfkit runs on macOS only"):
        VfkitDriver().plan(replace(REQUEST, capabilities=nothing))


@pytest.mark.parametrize(
    ("code", "cut", "no_channel", "clean", "words"),
    [
        (0, False, "", True, "the guest powered off"),
        (0, True, "", False, "the launcher cut the power"),
        (1, False, "", False, "vfkit ended with code 1: last words"),
        (-9, True, "", False, "SIGKILL killed vfkit"),
        (-99, False, "", False, "signal 99 killed vfkit"),
        (-9, False, "no vsock", False, "gave the guest no channel: no vsock"),
    ],
)
def test_how_a_machine_ended(code, cut, no_channel, clean, words):
    ended = describe_exit(code, cut=cut, log=("first", "last words"), no_channel=no_channel)
    assert (ended.clean, ended.code) == (clean, code)
    assert words in ended.reason


def test_what_vfkit_says_becomes_what_to_do():
    said = "kernel must be uncompressed, /k is a compressed file"
    assert "Image" in hint_for(("other", said))
    assert hint_for(("other",)) == ""


@pytest.mark.only_where(sys.platform != "darwin")
async def test_a_host_without_macos_cannot_run_it():
    found = await VfkitDriver().probe("x86_64", {})
    assert (found.usable, found.transports) == (False, ())
    assert [reason.text for reason in found.reasons] == ["vfkit runs on macOS only"]
    found = await VfkitDriver().probe("x86_64", {"binary": "/no/such/vfkit"})
    assert [reason.text for reason in found.reasons] == ["/no/such/vfkit is no program"]
