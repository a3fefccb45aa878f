"""What a guest is given, and what of it the driver is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kenaz_drivers.contract import Disk
from kenaz_engine.images.builds import Build
from kenaz_engine.images.manifest import Image, Part
from kenaz_engine.session.guest import (
    Layout,
    connector_ids,
    disk_formats,
    guest_address,
    guest_variables,
    launch_request,
)

LAYOUT = Layout(Path("/state/s1"), Path("/run/s1"), "s1-0123")


@pytest.mark.parametrize(
    ("transport", "address", "listening"),
    [
        ("virtio-serial", "virtio-serial:dev.kenaz.channel", "/run/s1/channel.sock"),
        ("vsock", "vsock:2:7882", ""),
        ("vhost-user-vsock", "vsock:2:7882", "/run/s1/vsock_7881"),
        ("unix", "unix:/run/s1/channel.sock", "/run/s1/channel.sock"),
        ("tcp", "listen:7881", ""),
    ],
)
async def test_where_the_guest_finds_the_channel(
    whole: Any, transport: str, address: str, listening: str
) -> None:
    prepared = replace(await whole.prepare(), transport=transport)
    assert guest_address(prepared, LAYOUT, 7882) == address
    assert launch_request(prepared, LAYOUT, None).channel == listening


async def test_a_guest_is_told_of_the_port_that_was_taken(whole: Any) -> None:
    prepared = replace(await whole.prepare(), transport="vsock")
    variables = guest_variables(prepared, LAYOUT, "t", port=3_000_000_000)
    assert (variables["HARNESS_VM_PORT"], variables["KENAZ_CHANNEL"]) == (
        "3000000000",
        "vsock:2:3000000000",
    )


async def test_a_guest_that_is_dialled_has_no_door_without_a_token(whole: Any) -> None:
    prepared = await whole.prepare()
    channel = replace(prepared.resolved.channel, dial="host")
    dialled = replace(prepared, resolved=replace(prepared.resolved, channel=channel))
    one, other = (guest_variables(dialled, LAYOUT, "token", port=7881) for _ in range(2))
    assert one["HARNESS_VM_TOKEN"] == "token"
    assert len(one["HARNESS_SERVE_TOKEN"]) == 43
    assert one["HARNESS_SERVE_TOKEN"] != other["HARNESS_SERVE_TOKEN"]
    with pytest.raises(AssertionError):
        guest_variables(dialled, LAYOUT, "", port=7881)


async def test_the_boot_parameters(whole: Any) -> None:
    prepared = await whole.prepare(
        "spec.workbench={build: '7', env: {LANG: C}, args: [demo]}", "spec.tools.allow=[fs.*, '*']"
    )
    assert guest_variables(prepared, LAYOUT, "token") == {
        "HARNESS_VM_TOKEN": "token",
        "HARNESS_VM_PORT": "7881",
        "SIGIL_WORKBENCH_ID": "s1",
        "KENAZ_SESSION_ID": "s1",
        "KENAZ_CHANNEL": "unix:/run/s1/channel.sock",
        "KENAZ_WORKBENCH_BUILD": "7",
        "KENAZ_ENVGRANT_LANG": "C",
        "KENAZ_WORKBENCH_ARGS": json.dumps(["demo"]),
        "KENAZ_MCP_ALLOWLIST": "fs",
    }
    build = Build("7", Path("/b"), "sha256:00")
    assert guest_variables(prepared, LAYOUT, "t", build)["KENAZ_WORKBENCH_DIGEST"] == "sha256:00"
    # Of one that came packed and is not here, the digest is not known.
    assert "KENAZ_WORKBENCH_DIGEST" not in guest_variables(prepared, LAYOUT, "t", replace(build, digest=""))
    runs = await whole.prepare("spec.lifecycle=ephemeral-exec", "spec.workbench.args=[ls]")
    assert not {"KENAZ_WORKBENCH_ARGS", "KENAZ_MCP_ALLOWLIST"} & guest_variables(runs, LAYOUT, "t").keys()


def test_a_pattern_that_names_no_connector_adds_none() -> None:
    assert connector_ids(["web.search", "fs.*", "fs.read", "*", "a*.b", "UPPER.x", ""]) == ["fs", "web"]


async def test_a_machine_boots_its_image_and_a_process_is_the_agent(whole: Any) -> None:
    process = await whole.prepare()
    assert disk_formats(process, None) == ("directory", "directory")
    request = launch_request(process, LAYOUT, None)
    assert request.agent
    assert (request.kernel, request.initrd, request.cmdline) == ("", "", "")
    assert [disk.path for disk in request.disks] == ["/state/s1/root", "/state/s1/config"]
    machine = await whole.prepare(can={"disk_formats": ("qcow2", "raw")})
    image: Any = SimpleNamespace(kernel=Path("/k"), initrd=Path("/i"), cmdline="quiet", root_format="raw")
    request = launch_request(machine, LAYOUT, image, cid=42)
    assert (request.kernel, request.initrd, request.cmdline, request.cid) == ("/k", "/i", "quiet", 42)
    assert request.agent == ()
    assert [disk.path for disk in request.disks] == ["/state/s1/root.qcow2", "/state/s1/config.raw"]
    request = launch_request(machine, LAYOUT, image, Build("7", Path("/b"), "sha256:00"))
    assert request.disks[-1] == Disk("workbench", "/b", "raw", readonly=True)
    assert LAYOUT.control == Path("/run/s1/control.sock")


async def test_on_another_host_files_have_the_paths_that_they_have_there(whole: Any) -> None:
    machine = await whole.prepare(can={"disk_formats": ("volume",), "elsewhere": "other"})
    driver: Any = SimpleNamespace(name="x", placed=lambda _, digest: f"/there/{digest}", place=print)
    machine = replace(machine, driver=driver)
    parts = {name: Part(Path(f"/{name}"), 1, f"{name}-digest") for name in ("kernel", "root")}
    image = Image("i", "1", "x86_64", "", parts, "qcow2", "", "", (), None)
    request = launch_request(machine, LAYOUT, image, Build("7", Path("/b"), "sha256:00"))
    assert (request.kernel, request.initrd) == ("/there/kernel-digest", "")
    size = machine.resolved.machine.disk
    assert request.disks == (
        Disk("root", "", "volume", base="/there/root-digest", base_format="qcow2", size=size),
        Disk("config", "/state/s1/config.raw", "raw", readonly=True),
        Disk("workbench", "/there/00", "raw", readonly=True),
    )


async def test_a_disk_that_cannot_become_raw_takes_the_next_format(whole: Any) -> None:
    packed: Any = SimpleNamespace(root_format="qcow2")
    plain: Any = SimpleNamespace(root_format="raw")
    both = await whole.prepare(can={"disk_formats": ("raw", "qcow2")})
    assert disk_formats(both, packed) == ("qcow2", "raw")
    assert disk_formats(both, plain) == ("raw", "raw")
    only = await whole.prepare(can={"disk_formats": ("raw",)})
    assert disk_formats(only, packed) == ("raw", "raw")
