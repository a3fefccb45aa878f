"""Stands in for vfkit 0.6.4 where there is no Mac: its command line, its REST interface, its vsock device and
its traps, as its sources have them. Behind it is no machine: the guest's agent runs as a process.

`parse` is the grammar of pkg/cmdline and pkg/config, held to the real parser by test_vfkit_parser.py.

    vfkit.py [--trap=NAME] ARGV...

Traps: `deaf` (the guest hears no power button), `no-channel` (a warning, and the machine runs on), `mute`
(REST does not answer, and SIGTERM does nothing), `refuses` (500 for every change), `broken` (the machine
cannot be started), `stuck` (it never gets to run), `panic` (code 2 soon after the start).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

VERSION = "vfkit version: v0.6.4"
AGENT = Path(__file__).parents[3] / "engine/kenaz_engine/guest/agent.py"
SUN_PATH = 103

FLAGS = {"--cpus", "--memory", "--kernel", "--initrd", "--kernel-cmdline", "--bootloader", "--restful-uri"}
OPTIONS = {
    "virtio-blk": {"path", "readonly", "deviceId"},
    "virtio-vsock": {"port", "socketURL", "listen", "connect"},
    "virtio-serial": {"logFilePath", "stdio", "pty"},
    "virtio-net": {"nat", "mac"},
    "virtio-rng": set(),
}


def first_bytes(path: str) -> bytes:
    """What vfkit looks at before it takes a disk."""
    with Path(path).open("rb") as file:
        return file.read(4)


def parse(argv: Sequence[str], look: Callable[[str], bytes] = first_bytes) -> dict[str, Any]:
    """What vfkit makes of the words behind its name, as far as our driver says them. Raises ValueError, and
    OSError for a disk that cannot be read."""
    flags: dict[str, str] = {}
    devices = []
    words = iter(argv)
    for word in words:
        value = next(words, None)
        if value is None:
            raise ValueError(f"flag needs an argument: {word}")
        if word == "--device":
            devices.append(_device(value, look))
        elif word in FLAGS:
            flags[word] = value
        else:
            raise ValueError(f"unknown flag: {word}")
    linux = [name for name in ("--kernel", "--initrd", "--kernel-cmdline") if name in flags]
    if linux and (len(linux) < 3 or "--bootloader" in flags):
        raise ValueError(f"{linux} go together, and without a bootloader")
    uri = urlsplit(flags.get("--restful-uri", "none://"))
    if uri.scheme != "unix" or uri.netloc or not uri.path or len(unquote(uri.path).encode()) > SUN_PATH:
        raise ValueError(f"invalid unix uri: {uri.geturl()}")
    for name in ("--cpus", "--memory"):
        if not flags[name].isdigit():
            raise ValueError(f"{name} {flags[name]}")
    machine: dict[str, Any] = {
        "vcpus": int(flags["--cpus"]),
        "memoryBytes": int(flags["--memory"]) << 20,
        "devices": devices,
    }
    if linux:
        kernel, initrd, cmdline = (flags[name] for name in ("--kernel", "--initrd", "--kernel-cmdline"))
        if not (kernel and initrd and cmdline):
            raise ValueError("a kernel without all that belongs to it")
        machine["bootloader"] = {"kernel": kernel, "initrd": initrd, "cmdline": cmdline}
    else:
        machine["bootloader"] = _bootloader(flags.get("--bootloader", ""))
    machine["rest"] = unquote(uri.path)
    return machine


def _split_quoted(text: str) -> list[str]:
    """parseString of pkg/cmdline: commas between quotes separate nothing, and the quotes around a part go."""
    if text.count('"') % 2:
        raise ValueError('mismatched "')
    parts, quoted = [""], False
    for char in text:
        quoted ^= char == '"'
        if char == "," and not quoted:
            parts.append("")
        else:
            parts[-1] += char
    return [part[1:-1] if len(part) >= 2 and part[0] == part[-1] == '"' else part for part in parts]


def _bootloader(text: str) -> dict[str, Any]:
    kind, *options = _split_quoted(text)
    values = dict(option.partition("=")[::2] for option in options if option)
    if kind != "efi" or values.keys() - {"variable-store", "create"} or values.get("create"):
        raise ValueError(f"bootloader {text}")
    if not values.get("variable-store"):
        raise ValueError("missing EFI store path")
    return {"efi": values["variable-store"], "create": "create" in values}


def _device(text: str, look: Callable[[str], bytes]) -> dict[str, Any]:
    kind, *parts = text.split(",")
    if kind not in OPTIONS:
        raise ValueError(f"unknown device type: {kind}")
    options = dict(part.partition("=")[::2] for part in parts if part)
    if unknown := options.keys() - OPTIONS[kind]:
        raise ValueError(f"unknown option for {kind} devices: {unknown}")
    for name in ("readonly", "stdio", "nat"):
        if options.get(name):
            raise ValueError(f"unexpected value for {name}")
    device: dict[str, Any] = {"kind": kind, **options}
    match kind:
        case "virtio-blk":
            header = look(options.get("path", ""))
            if not header or header == b"QFI\xfb":
                raise ValueError(f"{options['path']} is empty, or qcow2")
        case "virtio-vsock":
            if not options.get("port", "").isdigit() or not options.get("socketURL"):
                raise ValueError("virtio-vsock needs both a port and a socket URL")
            device["port"] = int(options["port"])
        case "virtio-serial":
            if len(options) != 1:
                raise ValueError("one of 'logFilePath', 'stdio' or 'pty' must be set")
    return device


def log(level: str, text: str) -> None:
    """A line as logrus writes it where stderr is no terminal."""
    print(f'time="2026-11-24T12:00:00Z" level={level} msg={json.dumps(text)}', file=sys.stderr, flush=True)


class Machine:
    """What runs, or would. Its states are those of Virtualization.framework."""

    def __init__(self, trap: str, told: dict[str, Any]) -> None:
        import trio

        self.trap = trap
        self.told = told
        self.state = "Starting"
        self.stopped = trio.Event()
        self.guest: subprocess.Popen[bytes] | None = None
        [self.vsock] = [device for device in told["devices"] if device["kind"] == "virtio-vsock"]

    def change(self, wanted: str) -> str:
        """Why not; empty where the change has begun."""
        if wanted not in {"Stop", "HardStop", "Pause", "Resume"}:
            return f"invalid new VMState: {wanted}"
        if self.trap == "refuses" or self.state != "Running" or wanted in {"Pause", "Resume"}:
            return "Error Domain=VZErrorDomain Code=4 Description=Invalid virtual machine state."
        if self.guest is not None and (wanted == "HardStop" or self.trap != "deaf"):
            self.guest.send_signal(signal.SIGKILL if wanted == "HardStop" else signal.SIGTERM)
        return ""

    async def run(self, scratch: str) -> None:
        """The guest from its start to its end."""
        import trio

        await trio.sleep(0.1)
        if self.trap == "stuck":
            await trio.sleep_forever()
        environment = self.config()
        socket = f"{scratch}/vsock"
        environment["KENAZ_CHANNEL"] = f"unix:{socket}"
        Path(scratch, "kenaz.env").write_text(
            "".join(f"{name}={json.dumps(value)}\n" for name, value in environment.items())
        )
        Path(scratch, "root").mkdir()
        command = [sys.executable, "-I", str(AGENT), "--env", f"{scratch}/kenaz.env", "--root"]
        self.guest = subprocess.Popen([*command, f"{scratch}/root"], stdin=subprocess.DEVNULL, stderr=1)
        self.state = "Running"
        log("info", "virtual machine is running")
        async with trio.open_nursery() as nursery:
            if self.trap == "no-channel":
                log("warning", f"error exposing vsock port {self.vsock['port']}: it cannot be had")
            else:
                await nursery.start(self.expose, socket)
            while self.guest.poll() is None:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        self.state = "Stopped"
        log("info", "VM is stopped")
        self.stopped.set()

    def config(self) -> dict[str, str]:
        """What is on the disk KENAZMETA, which the guest would mount."""
        import io
        import shlex

        import pycdlib

        [path] = [disk["path"] for disk in self.told["devices"] if disk.get("deviceId") == "KENAZMETA"]
        iso, content = pycdlib.PyCdlib(), io.BytesIO()
        iso.open(path)
        iso.get_file_from_iso_fp(content, rr_path="/kenaz.env")
        iso.close()
        lines = content.getvalue().decode().splitlines()
        pairs = (line.partition("=") for line in lines if line)
        return {name: "".join(shlex.split(value)) for name, _, value in pairs}

    async def expose(self, path: str, *, task_status: Any) -> None:
        """The proxy of pkg/vf: whoever dials CID 2 is connected to socketURL."""
        import trio

        listening = trio.socket.socket(trio.socket.AF_UNIX)
        await listening.bind(path)
        listening.listen(8)
        task_status.started()

        async def pump(source: trio.SocketStream, target: trio.SocketStream) -> None:
            try:
                async for data in source:
                    await target.send_all(data)
                await target.send_eof()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                await trio.aclose_forcefully(target)

        async def serve(guest: trio.SocketStream) -> None:
            async with guest:
                try:
                    host = await trio.open_unix_socket(self.vsock["socketURL"])
                except OSError:
                    return
                async with host, trio.open_nursery() as nursery:
                    nursery.start_soon(pump, guest, host)
                    nursery.start_soon(pump, host, guest)

        async with trio.open_nursery() as nursery:
            while True:
                accepted, _ = await listening.accept()
                nursery.start_soon(serve, trio.SocketStream(accepted))

    async def answer(self, stream: Any) -> None:
        """One request of the REST interface."""
        import trio

        async with stream:
            request = b""
            while b"\r\n\r\n" not in request:
                request += await stream.receive_some()
            head, _, body = request.partition(b"\r\n\r\n")
            lengths = [
                int(line[15:]) for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:"
            ]
            while lengths and len(body) < lengths[0]:
                body += await stream.receive_some()
            if self.trap == "mute":
                await trio.sleep_forever()
            method, path, _ = head.split(b"\r\n")[0].split()
            status, said = self.reply(method.decode(), path.decode(), body)
            content = json.dumps(said).encode() if said else b""
            await stream.send_all(
                f"HTTP/1.1 {status} X\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode()
                + content
            )

    def reply(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        match method, path:
            case "GET", "/vm/state":
                can = self.state == "Running"
                return 200, {"state": f"VirtualMachineState{self.state}", "canStop": can, "canHardStop": can}
            case "GET", "/vm/inspect":
                return 200, self.told
            case "POST", "/vm/state":
                try:
                    wanted = json.loads(body)["state"]
                except (ValueError, LookupError, TypeError) as error:
                    return 400, {"error": str(error)}
                if error := self.change(wanted):
                    return 500, {"error": error}
                return 202, {}
        return 404, {}

    async def on_signal(self) -> None:
        """RequestStop, five seconds, a forced stop; the main loop ends when it sees the machine stopped."""
        import trio

        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                if self.trap == "mute":
                    continue
                self.change("Stop")
                with trio.move_on_after(5):
                    await self.stopped.wait()
                    return
                self.change("HardStop")


async def main(trap: str, told: dict[str, Any]) -> int:
    import trio

    machine = Machine(trap, told)
    listening = trio.socket.socket(trio.socket.AF_UNIX)
    try:
        await listening.bind(told["rest"])
    except OSError as error:
        log("fatal", f"listen unix {told['rest']}: bind: {error.strerror.lower()}")
        return 1
    listening.listen(8)
    code = 0
    with tempfile.TemporaryDirectory(prefix="vfkit-") as scratch:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, machine.answer, [trio.SocketListener(listening)])
            nursery.start_soon(machine.on_signal)
            if trap == "broken":
                await trio.sleep(0.1)
                log("error", "Error Domain=VZErrorDomain Code=1 Description=Internal Virtualization error.")
                code = 1
            elif trap == "panic":
                nursery.start_soon(machine.run, scratch)
                await trio.sleep(1.0)
                print("fatal error: unexpected signal during runtime execution", file=sys.stderr, flush=True)
                os._exit(2)
            else:
                await machine.run(scratch)
            nursery.cancel_scope.cancel()
    Path(told["rest"]).unlink(missing_ok=True)
    return code


if __name__ == "__main__":
    words = sys.argv[1:]
    chosen = words.pop(0).partition("=")[2] if words and words[0].startswith("--trap=") else ""
    if words == ["--version"]:
        print(VERSION)
        sys.exit(0)
    try:
        understood = parse(words)
        if any(device.get("stdio") is not None for device in understood["devices"]):
            termios.tcgetattr(0)
    except (ValueError, OSError, LookupError, termios.error) as problem:
        print(f"Error: {problem}", file=sys.stderr)
        sys.exit(1)
    import trio

    sys.exit(trio.run(main, chosen, understood))
