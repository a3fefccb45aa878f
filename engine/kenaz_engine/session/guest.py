"""What the guest is given: its disks, its boot parameters, and the request that the driver plans from."""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from kenaz_drivers.contract import VIRTIO_SERIAL_PORT, Content, Disk, LaunchRequest, Placing
from kenaz_drivers.host import LOOPBACK
from kenaz_engine.channel.transports.hybrid import guest_path
from kenaz_engine.channel.transports.local import SCHEME, SERIAL_BY_PORT
from kenaz_engine.images.builds import Build
from kenaz_engine.images.catalog import default_cache
from kenaz_engine.images.manifest import Image
from kenaz_engine.images.vhdx import base_path
from kenaz_engine.session.lifecycles import executes
from kenaz_engine.session.prepared import Prepared

ENVIRONMENT_FILE = "kenaz.env"
"""The file on the config disk; systemd's EnvironmentFile syntax."""

MADE_THERE = "volume"
"""The format of a root disk that the driver makes on another host."""

_CONNECTOR = re.compile(r"[a-z][a-z0-9-]{0,63}")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the things of one session are: `directory` is its own, `sockets` is short enough for sockets.

    `mark` is what its children are found by (`LaunchRequest.mark`).
    """

    directory: Path
    sockets: Path
    mark: str

    @property
    def channel(self) -> Path:
        """The socket on which the launcher listens for the guest."""
        return self.sockets / "channel.sock"

    @property
    def vsock(self) -> Path:
        """Where a vsock device that is a daemon has its socket for the host; see transports/hybrid.py."""
        return self.sockets / "vsock"

    def listening(self, transport: str, port: int) -> str:
        """The path of the socket on which the launcher listens for the guest; empty for AF_VSOCK. Where the
        hypervisor connects to a port instead, one stands for it that is not taken yet."""
        match transport:
            case "vsock" | "tcp" | "hyperv":
                return ""
            case "virtio-serial" if SERIAL_BY_PORT:
                return f"{LOOPBACK}:{port}"
            case "vhost-user-vsock":
                return guest_path(self.vsock, port)
            case _:
                return str(self.channel)

    @property
    def control(self) -> Path:
        """The socket on which other terminals ask."""
        return self.sockets / "control.sock"

    @property
    def screen(self) -> Path:
        """The directory of the socket on which the guest's screen is shown."""
        return self.sockets / "screen"

    def disk(self, role: str, disk_format: str) -> Path:
        """The ephemeral disk, or the config disk, in one of the driver's formats."""
        return self.directory / (role if disk_format == "directory" else f"{role}.{disk_format}")


def disk_formats(prepared: Prepared, image: Image | None) -> tuple[str, str]:
    """The formats of the root disk and of the config disk: the first that the driver takes and the image's
    disk can become without being converted, which a qcow2 one cannot be to raw."""
    offered = prepared.capabilities.disk_formats
    convert = image is not None and image.root_format == "qcow2"
    root = next((name for name in offered if not (convert and name == "raw")), offered[0])
    return root, {"directory": "directory", "vhdx": "iso"}.get(root, "raw")


def guest_address(prepared: Prepared, layout: Layout, port: int) -> str:
    """Where the guest finds the channel: `KENAZ_CHANNEL`. A guest that is dialled listens on
    HARNESS_VM_PORT."""
    match prepared.transport:
        case "tcp":
            return f"listen:{prepared.resolved.channel.port}"
        case "virtio-serial":
            return f"virtio-serial:{VIRTIO_SERIAL_PORT}"
        case "vsock" | "vhost-user-vsock" | "vfkit" | "hyperv":
            return f"vsock:2:{port}"
        case _:
            return f"{SCHEME}:{layout.channel}"


def guest_variables(
    prepared: Prepared, layout: Layout, token: str, build: Build | None = None, *, port: int | None = None
) -> dict[str, str]:
    """The boot parameters, by the names that images read (docs/reference/image.md). `build` is what the
    catalogs have under the name of the workbench's build; `port` is the one that is listened on, where that
    is not the spec's. `token` is not empty: today's guests would then let anybody in."""
    assert token
    resolved = prepared.resolved
    port = port or resolved.channel.port
    variables = {
        "HARNESS_VM_TOKEN": token,
        # For the served half of such a guest, which nobody here talks to: without one it is open too.
        **({"HARNESS_SERVE_TOKEN": secrets.token_urlsafe(32)} if resolved.channel.dial == "host" else {}),
        "HARNESS_VM_PORT": str(port),
        "SIGIL_WORKBENCH_ID": resolved.id,
        "KENAZ_SESSION_ID": resolved.id,
        "KENAZ_CHANNEL": guest_address(prepared, layout, port),
        "KENAZ_WORKBENCH_BUILD": resolved.workbench.build,
        **{f"KENAZ_ENVGRANT_{name}": value for name, value in resolved.workbench.env.items()},
    }
    if build is not None and build.digest:
        variables["KENAZ_WORKBENCH_DIGEST"] = build.digest
    if not executes(prepared.lifecycle):
        variables["KENAZ_WORKBENCH_ARGS"] = json.dumps(list(resolved.workbench.args))
    connectors = connector_ids(resolved.tools.allow)
    return variables | ({"KENAZ_MCP_ALLOWLIST": ",".join(connectors)} if connectors else {})


def connector_ids(patterns: Iterable[str]) -> list[str]:
    """The connectors that the tool patterns name, by their first segment (`fs` of `fs.*`).

    Today's guest refuses the whole list for one id that it cannot read, and blocks all where there is none;
    so a pattern that names no connector adds none.
    """
    first = {pattern.split(".", 1)[0] for pattern in patterns}
    return sorted(name for name in first if _CONNECTOR.fullmatch(name))


def agent_command(layout: Layout, root_format: str, config_format: str) -> tuple[str, ...]:
    """The command that is the guest where there is no machine."""
    agent = resources.files("kenaz_engine.guest") / "agent.py"
    config = layout.disk("config", config_format) / ENVIRONMENT_FILE
    root = layout.disk("root", root_format)
    return (sys.executable, "-I", str(agent), "--env", str(config), "--root", str(root))


def contents_of(image: Image, build: Build | None) -> dict[str, Content]:
    """The files that a machine needs and never changes, by what they are for."""
    contents = {name: Content(str(part.path), part.sha256) for name, part in image.parts.items()}
    if build is not None:
        contents["workbench"] = Content(str(build.path), build.digest.removeprefix("sha256:"))
    return contents


def _moved(request: LaunchRequest, prepared: Prepared, image: Image, build: Build | None) -> LaunchRequest:
    """The same for a driver whose machine is on another host: what never changes has the path that it has
    there, and the root disk is the driver's to make."""
    driver, size = prepared.driver, prepared.resolved.machine.disk
    assert isinstance(driver, Placing)
    there = {
        name: driver.placed(prepared.capabilities, content.digest)
        for name, content in contents_of(image, build).items()
    }

    def moved(disk: Disk) -> Disk:
        if disk.role == "root":
            base = there["root"]
            return Disk("root", "", MADE_THERE, base=base, base_format=image.root_format, size=size)
        return replace(disk, path=there["workbench"]) if disk.role == "workbench" else disk

    return replace(
        request,
        kernel=there.get("kernel", ""),
        initrd=there.get("initrd", ""),
        disks=tuple(map(moved, request.disks)),
    )


def _root_disk(prepared: Prepared, layout: Layout, disk_format: str, image: Image | None) -> Disk:
    """The disk that the guest writes to. The driver makes it itself where it is VHDX."""
    path = str(layout.disk("root", disk_format))
    if disk_format != "vhdx" or image is None:
        return Disk("root", path, disk_format)
    base = base_path(image, default_cache())
    return Disk("root", path, disk_format, base=str(base), size=prepared.resolved.machine.disk)


def launch_request(
    prepared: Prepared,
    layout: Layout,
    image: Image | None,
    build: Build | None = None,
    *,
    cid: int | None = None,
    forward: int = 0,
    channel: str = "",
) -> LaunchRequest:
    """What the driver plans from. `image` is None for drivers that boot none, which get no `build` either.
    `forward` is a port of 127.0.0.1, 0 until there is one; `channel` is where the launcher listens,
    where that is no path that follows from the layout."""
    resolved = prepared.resolved
    root, config = disk_formats(prepared, image)
    workbench = Disk("workbench", str(build.path), "raw", readonly=True) if image and build else None
    request = LaunchRequest(
        session=resolved.id,
        directory=str(layout.directory),
        runtime=str(layout.sockets),
        cpus=resolved.machine.cpus,
        memory=resolved.machine.memory,
        transport=prepared.transport,
        channel=channel or layout.listening(prepared.transport, resolved.channel.port),
        port=resolved.channel.port,
        capabilities=prepared.capabilities,
        kernel=str(image.kernel) if image and image.kernel else "",
        initrd=str(image.initrd) if image and image.initrd else "",
        cmdline=image.cmdline if image else "",
        disks=(
            _root_disk(prepared, layout, root, image),
            Disk("config", str(layout.disk("config", config)), config, readonly=True),
            *((workbench,) if workbench else ()),
        ),
        display=resolved.machine.display,
        network=resolved.network,
        cid=cid,
        forward=forward,
        agent=() if image else agent_command(layout, root, config),
        mark=layout.mark,
        options=resolved.driver_options.get(prepared.driver.name, {}),
    )
    return _moved(request, prepared, image, build) if image and prepared.capabilities.elsewhere else request
