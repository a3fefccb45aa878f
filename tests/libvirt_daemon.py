"""Runs a libvirtd of one's own: `python libvirt_daemon.py DIRECTORY session|system|elsewhere`.

Says `ready PID SOCKET PORT` when it listens there and on that port of 127.0.0.1; ends, with every QEMU of it,
when its standard input ends. A `session` daemon serves a user who is not root: where we are, that is a user
namespace in which we are another. A `system` daemon is for root, and sees directories of its own where the
host's daemon has its. One that is `elsewhere` is on a host of another name that has none of our files, as far
as launchers and tests make any: nothing of theirs is there under its path. Its QEMU runs as another user, as
on a host that was installed. What they leave is reaped here: a host's init may take seconds for that.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36

CONFIG = """\
listen_tls = 0
listen_tcp = 1
listen_addr = "127.0.0.1"
tcp_port = "{port}"
auth_tcp = "none"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_level = 3
"""

QEMU_CONFIG = """\
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
cgroup_controllers = []
namespaces = []
security_driver = "none"
stdio_handler = "file"
"""

# What a host has that was installed: QEMU runs as a user of its own, who is given the disks.
THERE = """\
user = "libvirt-qemu"
group = "kvm"
dynamic_ownership = 1
remember_owner = 1
"""

HOSTNAME = "kenaz-elsewhere"

# Where the daemon of a system keeps things.
OWN = {"/run": "run", "/var/lib": "lib", "/var/cache": "cache", "/etc/libvirt": "etc"}

# Looked for when it starts, though its configuration names others.
ACCOUNTS = {
    "/etc/passwd": "libvirt-qemu:x:0:0::/:/bin/false\n",
    "/etc/group": "libvirt-qemu:x:0:\nkvm:x:0:\n",
}


USER = 64055
"""That user, where QEMU is not run as ours; the number that Debian gives it."""

OURS = ("KENAZ_CACHE_DIR", "KENAZ_STATE_DIR", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR")
"""What names directories of ours."""


def hold_port() -> tuple[socket.socket, int]:
    """A port that nobody else is given meanwhile; libvirt may listen there, for it shares addresses, too."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held, held.getsockname()[1]


def command(directory: Path, kind: str, port: int) -> tuple[list[str], dict[str, str], Path]:
    """The daemon's command and environment, and its socket."""
    config = directory / "libvirtd.conf"
    config.write_text(CONFIG.format(port=port))
    daemon = ["libvirtd", "--listen", "--config", str(config)]
    if kind == "elsewhere":
        daemon[-1] = "/etc/libvirt/libvirtd.conf"
    environment = {**os.environ, "HOME": str(directory), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    for name in ("CONFIG_HOME", "CACHE_HOME", "DATA_HOME", "RUNTIME_DIR"):
        environment[f"XDG_{name}"] = str(directory / name.lower())
        (directory / name.lower()).mkdir(mode=0o700)
    if kind == "session":
        another = ["unshare", "--user", "--map-user=1000", "--map-group=1000"] if os.geteuid() == 0 else []
        return another + daemon, environment, directory / "runtime_dir/libvirt/libvirt-sock"
    for place in OWN.values():
        (directory / place).mkdir()
    (directory / "run/libvirt").mkdir()
    (directory / "run/lock").mkdir()
    own_config = QEMU_CONFIG
    accounts = ACCOUNTS
    steps, unshare = "", ["unshare", "--mount"]
    if kind == "elsewhere":
        kept = [line for line in QEMU_CONFIG.splitlines(keepends=True) if line.split()[0] not in THERE]
        own_config = "".join(kept) + THERE
        accounts = {file: more.replace("x:0:", f"x:{USER}:") for file, more in ACCOUNTS.items()}
        config.rename(directory / "etc/libvirtd.conf")
        (directory / "run/sshd").mkdir(mode=0o755)
        unshare += ["--uts"]
        named = [os.environ[name] for name in OURS if name in os.environ]
        hidden = {Path(tempfile.gettempdir()), Path.home(), *map(Path, named)}
        # libvirt looks at QEMU anew for each domain where root may open it, and QEMU's user not.
        (directory / "no-kvm").touch(mode=0o600)
        steps = (
            f"{{ [ ! -e /dev/kvm ] || mount --bind {directory}/no-kvm /dev/kvm; }} && hostname {HOSTNAME} && "
        )
        steps += "".join(f"mount -t tmpfs none '{path}' && " for path in hidden if path.is_dir())
    (directory / "etc/qemu.conf").write_text(own_config)
    for file, more in accounts.items():
        (directory / Path(file).name).write_text(Path(file).read_text() + more)
    own = {**OWN, **{file: Path(file).name for file in ACCOUNTS}}
    binds = "".join(f"mount --bind {directory}/{ours} {theirs} && " for theirs, ours in own.items())
    run = [*unshare, "sh", "-c", f'{binds} {steps} exec "$@"', "sh"]
    return run + daemon, environment, directory / "run/libvirt/libvirt-sock"


def reap(child: int, ended: threading.Event) -> None:
    while True:
        pid, _ = os.wait()
        if pid == child:
            ended.set()
            return


def main(directory: Path, kind: str) -> int:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    held, port = hold_port()
    argv, environment, path = command(directory, kind, port)
    with (directory / "log").open("wb") as log:
        daemon = subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    ended = threading.Event()
    threading.Thread(target=reap, args=(daemon.pid, ended), daemon=True).start()
    deadline = time.monotonic() + 120
    while not (path.exists() and answers(port)):
        if ended.is_set() or time.monotonic() > deadline:
            print((directory / "log").read_text(), file=sys.stderr)
            return 1
        time.sleep(0.05)
    print(f"ready {daemon.pid} {path} {port}", flush=True)
    sys.stdin.read()
    held.close()
    daemon.terminate()
    ended.wait(10)
    for children in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for pid in children.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
    return 0


def answers(port: int) -> bool:
    with socket.socket() as dialling:
        return dialling.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
