"""Whatever is asked of vfkit's driver, vfkit's grammar reads in its command line what was meant."""

import runpy
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from kenaz_drivers.contract import Capabilities, Disk, DriverError, LaunchRequest
from kenaz_drivers.vfkit.argv import build, on_virtio

STANDIN = Path(__file__).parents[1] / "integration/standins/vfkit.py"
parse = runpy.run_path(str(STANDIN), run_name="standin")["parse"]

HOSTILE = st.text(st.sampled_from("a/ ,\"'=%?#\\-ö\n"), max_size=12) | st.text(max_size=30)
paths = HOSTILE.map(lambda text: "/" + text)
requests = st.builds(
    LaunchRequest,
    session=st.just("s"),
    directory=paths,
    runtime=paths,
    cpus=st.integers(1, 64),
    memory=st.integers(1, 1 << 40),
    transport=st.just("vfkit"),
    channel=paths,
    port=st.integers(1, 65535),
    kernel=st.just("") | paths,
    initrd=st.just("") | paths,
    cmdline=HOSTILE,
    disks=st.lists(
        st.builds(
            Disk,
            st.sampled_from(["root", "config", "workbench"]),
            paths,
            st.just("raw"),
            readonly=st.booleans(),
        ),
        max_size=3,
    ).map(tuple),
    network=st.sampled_from(["none", "nat"]),
    capabilities=st.just(Capabilities(usable=True, reasons=(), arch="aarch64")),
)


def meant(request, command):
    """What the machine of that request is, in the words of the stand-in."""
    nat = [{"kind": "virtio-net", "nat": ""}] if request.network == "nat" else []
    disks = [
        {"kind": "virtio-blk", "path": disk.path}
        | ({"readonly": ""} if disk.readonly else {})
        | {"deviceId": {"root": "root", "config": "KENAZMETA", "workbench": "KENAZWB"}[disk.role]}
        for disk in request.disks
    ]
    vsock = {"kind": "virtio-vsock", "port": request.port, "socketURL": request.channel, "listen": ""}
    return {
        "vcpus": request.cpus,
        "memoryBytes": -(-request.memory // (1 << 20)) << 20,
        "bootloader": {
            "kernel": request.kernel,
            "initrd": request.initrd,
            "cmdline": on_virtio(request.cmdline),
        }
        if request.kernel
        else {"efi": f"{request.directory}/efi-variables", "create": True},
        "devices": [
            {"kind": "virtio-rng"},
            {"kind": "virtio-serial", "stdio": ""},
            *disks,
            vsock,
            *nat,
        ],
        "rest": command.rest,
    }


@given(requests)
def test_vfkit_reads_what_was_meant(request):
    try:
        command = build(request, "vfkit")
    except DriverError:
        return
    assert parse(command.argv[1:], lambda path: b"disk") == meant(request, command)
    assert all("\0" not in word for word in command.argv)


@given(requests)
def test_the_plan_is_pure(request):
    try:
        command = build(request, "vfkit")
    except DriverError:
        return
    assert build(replace(request, mark="another", session="other"), "vfkit") == command
