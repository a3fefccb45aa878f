"""What drivers and the engine both need of the host: processes that are told apart, started, read and ended.

The modules behind it are in `kenaz_drivers._common`, which our drivers import themselves. This is the door
for all others; see docs/decisions/0021-public-host.md.
"""

from kenaz_drivers._common.background import Background, open_background
from kenaz_drivers._common.identity import boot_id, identify, is_alive
from kenaz_drivers._common.loopback import (
    LOOPBACK,
    PATIENCE,
    dial_local,
    dial_loopback,
    read_line,
    read_secrets,
)
from kenaz_drivers._common.output import Console, LogTail, describe_end
from kenaz_drivers._common.ports import port_owner
from kenaz_drivers._common.process import Captured, ChildProcess, capture, open_pipe, spawn
from kenaz_drivers._common.qemu_img import find_qemu_img
from kenaz_drivers._common.terminate import terminate

__all__ = [
    "LOOPBACK",
    "PATIENCE",
    "Background",
    "Captured",
    "ChildProcess",
    "Console",
    "LogTail",
    "boot_id",
    "capture",
    "describe_end",
    "dial_local",
    "dial_loopback",
    "find_qemu_img",
    "identify",
    "is_alive",
    "open_background",
    "open_pipe",
    "port_owner",
    "read_line",
    "read_secrets",
    "spawn",
    "terminate",
]
