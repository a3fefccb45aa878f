"""The command lines of QEMU, to the letter: one golden file each."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from kenaz_drivers.contract import Capabilities, Disk, DriverError, LaunchRequest
from kenaz_drivers.qemu.argv import Facts, build
from kenaz_drivers.qemu.driver import QemuDriver
from kenaz_drivers.qemu.probe import firmware_places

GOLDEN = Path(__file__).parent / "golden"

FACTS = {
    "x86_64": Facts("/usr/bin/qemu-system-x86_64", "7.2", ("microvm", "q35"), ("kvm", "tcg"), True),
    "aarch64": Facts("/usr/bin/qemu-system-aarch64", "7.2", ("virt",), ("hvf", "tcg"), False),
}

MACOS = "/opt/homebrew/share/qemu/edk2-aarch64-code.fd"
PLATFORMS = {
    "hvf": {"platform": "darwin", "sandbox": False, "firmware": MACOS, "accelerators": ("hvf", "tcg")},
    "whpx": {"platform": "win32", "sandbox": False, "accelerators": ("tcg", "whpx")},
}


def facts_for(request):
    facts = FACTS[request.capabilities.arch]
    return replace(facts, **PLATFORMS.get(request.capabilities.accelerator, {}))


DISKS = (
    Disk("root", "/state/root.qcow2", "qcow2"),
    Disk("config", "/state/config.iso", "raw", readonly=True),
    Disk("workbench", "/cache/blobs/ab", "raw", readonly=True),
)


def request_for(arch="x86_64", accel="tcg", **changes):
    capabilities = Capabilities(usable=True, reasons=(), arch=arch, accelerator=accel)
    request = LaunchRequest(
        session="hello",
        directory="/state",
        runtime="/run/k",
        cpus=2,
        memory=256 << 20,
        transport="virtio-serial",
        channel="/run/k/channel",
        port=7881,
        capabilities=capabilities,
        kernel="/cache/vmlinuz",
        initrd="/cache/initrd",
        cmdline="console=ttyS0 quiet",
        disks=DISKS,
    )
    return replace(request, **changes)


def over_vhost_user(daemon="/usr/bin/vhost-device-vsock", accel="tcg", **changes):
    data = {"vhost-device-vsock": daemon} if daemon else {}
    capabilities = Capabilities(usable=True, reasons=(), arch="x86_64", accelerator=accel, data=data)
    request = request_for(transport="vhost-user-vsock", channel="/run/k/vsock_7881")
    return replace(request, capabilities=capabilities, **changes)


def on_a_desktop(**changes):
    capabilities = Capabilities(
        usable=True, reasons=(), arch="x86_64", accelerator="tcg", data={"window": "gtk"}
    )
    return replace(request_for(), capabilities=capabilities, **changes)


CASES = {
    "auto-tcg-serial": request_for(),
    "auto-kvm-serial": request_for(accel="kvm"),
    "microvm-tcg-serial": request_for(options={"machine": "microvm"}),
    "microvm-kvm-vsock": request_for(accel="kvm", transport="vsock", channel="", cid=42),
    "microvm-nat": request_for(accel="kvm", network="nat"),
    "q35-tcg-serial": request_for(options={"machine": "q35"}),
    "q35-kvm-vsock-disk": request_for(
        accel="kvm", transport="vsock", cid=42, kernel="", initrd="", cmdline=""
    ),
    "q35-nat": request_for(options={"machine": "q35"}, network="nat"),
    "q35-tcp": request_for(
        options={"machine": "q35"}, network="nat", transport="tcp", channel="", forward=49152
    ),
    "q35-tcg-vhost-user": over_vhost_user(),
    "microvm-kvm-vhost-user": over_vhost_user(accel="kvm", memory=(64 << 20) + 1),
    "q35-hvf-serial": request_for(accel="hvf"),
    "virt-hvf-disk": request_for("aarch64", "hvf", kernel="", initrd="", cmdline=""),
    "q35-whpx-serial": request_for(accel="whpx", channel="127.0.0.1:49152", mark="hello-1"),
    "q35-whpx-disk-tcp": request_for(
        accel="whpx",
        kernel="",
        initrd="",
        cmdline="",
        disks=(Disk("root", "C:\\Users\\a b,c\\root.qcow2", "qcow2"),),
        network="nat",
        transport="tcp",
        channel="",
        forward=49152,
        mark="hello-1",
    ),
    "q35-vnc": request_for(display="vnc"),
    "q35-window": on_a_desktop(display="window"),
    "virt-hvf-serial": request_for("aarch64", "hvf"),
    "virt-tcg-vsock": request_for("aarch64", transport="vsock", cid=7, initrd="", cmdline="", disks=()),
}


@pytest.mark.parametrize("name", CASES)
def test_the_command_line_is_the_golden_one(name):
    request = CASES[name]
    command = build(request, facts_for(request))
    lines = [*command.argv, "--", *(f"{number}={use}" for number, use in command.descriptors.items())]
    for helper in command.helpers:
        lines += ["-- before: " + helper.name, *helper.argv, *(f"makes: {path}" for path in helper.sockets)]
    text = "\n".join([*lines, *(f"note: {note}" for note in command.notes)]) + "\n"
    golden = GOLDEN / f"qemu-{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": "/a\0b"}, "NUL"),
        ({"cmdline": "a\0b"}, "NUL"),
        ({"display": "gtk"}, "display"),
        ({"display": "vnc", "runtime": "/run/" + "k" * 100}, "116 bytes"),
        ({"network": "bridge"}, "network"),
        ({"disks": (Disk("root", "/d", "directory"),)}, "directory"),
        ({"disks": (Disk("swap", "/d", "raw"),)}, "swap"),
        ({"channel": ""}, "0 bytes"),
        ({"channel": "/" + "ä" * 54}, "109 bytes"),
        ({"transport": "unix"}, "unix"),
        ({"transport": "tcp", "channel": ""}, "no network"),
        ({"transport": "vsock", "cid": None}, "vsock"),
        ({"options": {"machine": "virt"}}, "no machine 'virt'"),
        ({"options": {"machine": "microvm"}, "kernel": ""}, "microvm boots no disk"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(changes, message):
    with pytest.raises(DriverError, match=message):
        build(request_for(**changes), FACTS["x86_64"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"daemon": ""}, "no vhost-device-vsock"),
        ({"channel": "/run/k/vsock"}, "no socket for port 7881"),
        ({"channel": "/run/k/vsock_7882"}, "no socket for port 7881"),
        ({"channel": "/run/k/" + "v" * 100 + "_7881"}, "112 bytes"),
        ({"runtime": "/run/" + "k" * 100}, "111 bytes"),
    ],
)
def test_a_vsock_device_that_cannot_be_is_refused(changes, message):
    with pytest.raises(DriverError, match=message):
        build(over_vhost_user(**changes), FACTS["x86_64"])


def test_a_window_is_refused_where_there_is_no_desktop():
    with pytest.raises(DriverError, match="no desktop to open a window on") as caught:
        build(request_for(display="window"), FACTS["x86_64"])
    assert caught.value.hint == "display: vnc"


def test_an_explicit_machine_that_is_missing_names_the_others():
    with pytest.raises(DriverError) as caught:
        build(request_for(options={"machine": "virt"}), FACTS["x86_64"])
    assert "microvm or q35" in caught.value.hint


@pytest.mark.parametrize("machines", [(), ("microvm",)])
def test_a_qemu_without_a_machine_for_the_image_is_refused(machines):
    with pytest.raises(DriverError, match="no machine"):
        build(request_for(kernel=""), replace(FACTS["x86_64"], machines=machines))


def test_commas_in_paths_are_doubled_where_qemu_splits_and_only_there():
    argv = build(request_for(channel="/r,un/c", kernel="/k,1"), FACTS["x86_64"]).argv
    assert "socket,id=channel,path=/r,,un/c" in argv
    assert "/k,1" in argv


def test_memory_is_rounded_up_to_whole_mebibytes():
    argv = build(request_for(memory=(64 << 20) + 1), FACTS["x86_64"]).argv
    assert argv[argv.index("-m") + 1] == "65M"


def test_a_plan_for_windows_says_where_the_console_is_and_what_the_program_needs():
    facts = replace(FACTS["x86_64"], **PLATFORMS["whpx"])
    capabilities = Capabilities(
        usable=True,
        reasons=(),
        arch="x86_64",
        accelerator="whpx",
        data={"facts": json.loads(json.dumps(asdict(facts))), "environment": {"SYSTEMROOT": "C:\\Windows"}},
    )
    wanted = replace(request_for(channel="127.0.0.1:49152", mark="hello-1"), capabilities=capabilities)
    plan = QemuDriver().plan(wanted)
    assert plan.data == {"console": r"\\.\pipe\kenaz-hello-1-console"}
    assert "pipe,id=console,path=kenaz-hello-1-console" in plan.argv
    assert plan.environment["SYSTEMROOT"] == "C:\\Windows"
    assert not plan.descriptors


def test_facts_survive_json():
    facts = FACTS["x86_64"]
    data = {"binary": facts.binary, "version": "7.2", "machines": ["microvm", "q35"]}
    assert Facts.from_json({**data, "accelerators": ["kvm", "tcg"], "sandbox": True}) == facts
    with pytest.raises(LookupError):
        Facts.from_json({"binary": "/q"})


def test_what_a_system_does_not_have_is_refused():
    disk = request_for("aarch64", kernel="", initrd="", cmdline="")
    with pytest.raises(DriverError, match="boots a disk by UEFI only") as caught:
        build(disk, FACTS["aarch64"])
    assert "qemu-efi-aarch64" in caught.value.hint
    for channel in ("/run/k/channel", "127.0.0.1:0", "127.0.0.1:1,server=on", "0.0.0.0:7881"):
        wanted = request_for(accel="whpx", channel=channel)
        with pytest.raises(DriverError, match="channel is no port of"):
            build(wanted, facts_for(wanted))
    wanted = request_for(accel="whpx", channel="127.0.0.1:7881", display="vnc")
    with pytest.raises(DriverError, match="display vnc: not served on Windows"):
        build(wanted, facts_for(wanted))
    wanted = request_for(accel="hvf", channel="/" + "x" * 103)
    with pytest.raises(DriverError, match="104 bytes and must have 1 to 103"):
        build(wanted, facts_for(wanted))


@pytest.mark.parametrize(
    ("platform", "place"),
    [
        ("darwin", "/opt/qemu/share/qemu/edk2-aarch64-code.fd"),
        ("win32", "/opt/qemu/bin/share/edk2-aarch64-code.fd"),
        ("linux", "/usr/share/qemu-efi-aarch64/QEMU_EFI.fd"),
    ],
)
def test_firmware_is_looked_for_where_each_system_has_it(platform, place):
    assert firmware_places("/opt/qemu/bin/qemu-system-aarch64", platform)[0] == place
