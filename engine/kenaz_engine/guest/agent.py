"""The guest agent: dials the host, proves who it is, and plays a small scripted workbench.

Runs on the standard library alone, as one file, in two places: in the demo image under its init
(`--machine`), and as an ordinary child process where there is no hypervisor: `python -I agent.py --env FILE
[--root DIR]`, also on Windows, where it runs no commands. Under emulation each import costs the boot dearly:
only light modules stand at the top.

What it is to do comes from the environment file (see docs/reference/image.md). Exit status: 0 after bye or on
SIGTERM (on Windows: at the end of standard input), 2 for a bad environment file, 10 power off, 11 reboot;
anything else is a crash.
"""

from __future__ import annotations

import json
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping
    from typing import Any

    Message = dict[str, Any]
    Script = Generator[Message, Message, None]
    """Yields a request without its id; is sent the message that ended it. Says bye by `raise Bye`."""

# What Windows lacks is used in the functions that are not called there; so its types are not checked.
assert not TYPE_CHECKING or sys.platform != "win32"
WINDOWS = os.name == "nt"

VERSION = "0.1.0"
PROTOCOL = 1
CAPABILITIES = ["tools", "prompts", *([] if WINDOWS else ["exec"]), "resume"]
MAX_FRAME = 16 << 20
"""Bytes of the largest frame taken from the host."""

MARK = b"\xff" * 4
"""Tells the host on a virtio-serial port, which outlives agents, that another one writes from here on."""

CHUNK = 16384
"""Bytes of a command's output that are handed over at once."""

TERM_GRACE = 1.0
"""Seconds that a command has between SIGTERM and SIGKILL."""

VIRTIO_SERIAL_PORT = "dev.kenaz.channel"
BUILD, DISKS, DEVICES = "/run/kenaz/workbench", "/sys/block", "/dev"
"""Where the init mounts the workbench's build, and where disks are looked for."""

DEFAULT_PORT = 7881
HOST_CID = 2
FIRST_BACKOFF, LAST_BACKOFF, REFUSED_BACKOFF = 0.05, 1.0, 5.0
"""Seconds between two attempts to dial."""

POWER_OFF, REBOOT = 10, 11

TERMINAL = {"tool.result", "tool.error", "prompt.result", "prompt.error"}


class Closed(Exception):
    """The connection is gone, or cannot be used any more."""


class Bye(Exception):
    """The guest is done. The text is the reason."""


# The environment file -------------------------------------------------------------------------------------


def parse_environment(text: str) -> dict[str, str]:
    """Reads what systemd calls an EnvironmentFile: NAME=value lines, quotes, backslashes, comments.

    As systemd does: in single quotes everything stands for itself; in double quotes a backslash protects
    only the characters ", \\, $ and `, and joins lines; elsewhere it protects any character. What is no
    assignment is skipped.
    """
    variables: dict[str, str] = {}
    at = 0
    while at < len(text):
        end = _end_of_line(text, at)
        line = text[at:end]
        name, equals, _ = line.partition("=")
        if not equals or line.lstrip()[:1] in ("", "#", ";"):
            at = end + 1
            continue
        value, at = _value(text, at + len(name) + 1)
        if _is_name(name.strip()):
            variables[name.strip()] = value
    return variables


def _end_of_line(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end


def _is_name(name: str) -> bool:
    return name.isascii() and name.isidentifier()


def _value(text: str, at: int) -> tuple[str, int]:
    """The value that starts at `at`, and where the next line starts."""
    parts: list[str] = []
    kept = 0  # how many of the parts trailing white space must leave
    quote = ""
    begins = True  # a quote opens only where a value begins, or right behind another quoted piece
    while at < len(text):
        char = text[at]
        at += 1
        if char == "\\" and quote != "'":
            following = text[at : at + 1]
            at += 1
            if following != "\n":
                protected = not quote or following in ('"', "\\", "$", "`")
                parts += [following] if protected else ["\\", following]
                kept = len(parts)
                begins = False
        elif quote:
            if char == quote:
                quote = ""
                begins = True
            else:
                parts.append(char)
            kept = len(parts)
        elif char == "\n":
            break
        elif begins and char in "\"'":
            quote = char
        elif char not in " \t\r":
            parts.append(char)
            kept = len(parts)
            begins = False
        elif not begins:
            parts.append(char)
    return "".join(parts[:kept]), at


class Settings:
    """What the environment file says, in the agent's terms."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.session = variables.get("KENAZ_SESSION_ID") or variables.get("SIGIL_WORKBENCH_ID", "")
        self.token = variables.get("HARNESS_VM_TOKEN", "")
        self.port = int(variables.get("HARNESS_VM_PORT") or DEFAULT_PORT)
        self.build = variables.get("KENAZ_WORKBENCH_BUILD", "")
        self.build_digest = variables.get("KENAZ_WORKBENCH_DIGEST", "")
        self.words: list[str] = json.loads(variables.get("KENAZ_WORKBENCH_ARGS") or "[]") or ["demo"]
        channel = variables.get("KENAZ_CHANNEL", "")
        self.channels = (
            [channel] if channel else [f"vsock:{HOST_CID}:{self.port}", f"virtio-serial:{VIRTIO_SERIAL_PORT}"]
        )
        prefix = "KENAZ_ENVGRANT_"
        self.environment = {
            name.removeprefix(prefix): value for name, value in variables.items() if name.startswith(prefix)
        }


# The wire -------------------------------------------------------------------------------------------------


def encode(message: Message) -> bytes:
    """The message as a frame: four bytes of length, big-endian, then JSON."""
    body = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode()
    return len(body).to_bytes(4, "big") + body


class Memory:
    """What the agent keeps of a conversation, so that it can go on over another connection: what the host has
    not acknowledged, and how much of the host it has taken."""

    def __init__(self, welcome: Message) -> None:
        self.conversation: int = welcome["conversation"]
        self.window: int = welcome["window"]
        self.received = 0
        self.size = 0  # bytes of what is kept
        self._kept: list[bytes] = []
        self._acknowledged = 0
        self._untold = 0

    def keep(self, frame: bytes) -> None:
        """Keeps a message that is about to be sent."""
        self._kept.append(frame)
        self.size += len(frame)

    def acknowledge(self, number: int) -> None:
        """The host has taken the first so many messages."""
        gone = self._kept[: number - self._acknowledged]
        del self._kept[: len(gone)]
        self._acknowledged += len(gone)
        self.size -= sum(map(len, gone))

    def unheard(self, number: int) -> bytes:
        """What follows the first so many messages."""
        self.acknowledge(number)
        return b"".join(self._kept)

    def took(self, size: int) -> bool:
        """A message of that size was taken. True when the host wants to hear of it."""
        self.received += 1
        self._untold += size
        if self._untold < self.window // 4:
            return False
        self._untold = 0
        return True


class Wire:
    """Messages over a file descriptor that it owns. Blocks. `outlives_agents` says of a stream that agents
    before this one may have used it, and left it in the middle of a message. Where there is a `memory`,
    messages are numbered."""

    def __init__(self, fd: int, *, outlives_agents: bool = False) -> None:
        self.outlives_agents = outlives_agents
        self.memory: Memory | None = None
        self._fd = fd
        if WINDOWS:  # where a socket is no descriptor
            import socket

            self._socket = socket.socket(fileno=fd)
        self._buffer = bytearray()
        self._early: list[Message] = []

    def send(self, message: Message) -> None:
        """Writes the whole message, when the host's window has room for it. Raises Closed."""
        frame = encode(message)
        if self.memory is not None:
            while self.memory.size >= self.memory.window:
                came = self._take()
                if came is None:
                    self._read()
                else:
                    self._early.append(came)
            self.memory.keep(frame)
        self._write(frame)

    def cut(self, message: Message) -> None:
        """Breaks off in the middle of the message. Always raises Closed."""
        frame = encode(message)
        if self.memory is not None:
            self.memory.keep(frame)
        self._write(frame[: len(frame) // 2])
        raise Closed("asked for")

    def resume(self, memory: Memory, received: int | None) -> None:
        """Numbers from here on; says again what follows the first so many messages. Raises Closed."""
        self.memory = memory
        if received is not None:
            self._write(memory.unheard(received))

    def _write(self, whole: bytes) -> None:
        data = memoryview(whole)
        try:
            while data:
                data = data[self._put(data) :]
        except OSError as error:
            raise Closed(error.strerror) from error

    def begin(self) -> None:
        """On a stream that an agent before this one may have used: drops what was for that one. Raises
        Closed."""
        self._write(MARK)

    def skip_to_mark(self) -> None:
        """Drops what stands before the host's mark, and the mark. Raises Closed."""
        while MARK not in self._buffer:
            del self._buffer[: -len(MARK) + 1]
            self._read()
        del self._buffer[: self._buffer.index(MARK)]
        while not self._buffer.lstrip(MARK):
            self._read()
        self._buffer = self._buffer.lstrip(MARK)

    def receive(self, seconds: float | None = None) -> Message | None:
        """The next message; None when none came within `seconds`. Raises Closed."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            message = self._early.pop(0) if self._early else self._take()
            if message is not None:
                return message
            if deadline is not None and not self._wait_readable(deadline - time.monotonic()):
                return None
            self._read()

    def _read(self) -> None:
        try:
            data = self._get(65536)
        except OSError as error:
            raise Closed(error.strerror) from error
        if not data:
            raise Closed("end of stream")
        self._buffer += data

    def fileno(self) -> int:
        """The descriptor, to wait for."""
        return self._fd

    def close(self) -> None:
        """Closes the descriptor."""
        if WINDOWS:
            self._socket.close()
        else:
            os.close(self._fd)

    def _put(self, data: memoryview) -> int:
        return self._socket.send(data) if WINDOWS else os.write(self._fd, data)

    def _get(self, size: int) -> bytes:
        return self._socket.recv(size) if WINDOWS else os.read(self._fd, size)

    def _take(self) -> Message | None:
        """The next message that has come, but for acks."""
        while True:
            message = self._parse()
            if message is None or self.memory is None:
                return message
            if message["kind"] != "ack":
                return message
            self.memory.acknowledge(message["received"])

    def _parse(self) -> Message | None:
        if len(self._buffer) < 4:
            return None
        length = int.from_bytes(self._buffer[:4], "big")
        if length > MAX_FRAME:
            raise Closed(f"frame of {length} bytes")
        if len(self._buffer) < 4 + length:
            return None
        body = bytes(self._buffer[4 : 4 + length])
        del self._buffer[: 4 + length]
        try:
            message = json.loads(body)
        except ValueError as error:
            raise Closed("frame is not JSON") from error
        if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
            raise Closed("frame is no message")
        memory = self.memory
        if memory is not None and message["kind"] != "ack" and memory.took(length):
            self._write(encode({"kind": "ack", "received": memory.received}))
        return message

    def _wait_readable(self, seconds: float) -> bool:
        import select

        if WINDOWS:
            return bool(select.select([self._socket], [], [], max(0.0, seconds))[0])
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(max(0.0, seconds) * 1000))


def open_channel(channel: str) -> int:
    """A descriptor connected to the host. Raises OSError when it cannot be reached now."""
    kind, _, rest = channel.partition(":")
    if kind == "virtio-serial":
        return _open_port(rest)
    import socket

    address: Any
    if kind == "loopback":
        return _open_loopback(rest)
    if kind == "unix" and not WINDOWS:
        family, address = socket.AF_UNIX, rest
    elif kind == "vsock" and sys.platform == "linux":
        cid, _, port = rest.partition(":")
        family, address = socket.AF_VSOCK, (int(cid), int(port))
    else:
        raise ValueError(f"unknown kind of channel: {kind}")
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.connect(address)
        return connection.detach()


def _open_loopback(path: str) -> int:
    """Dials the port of 127.0.0.1 that the file names, and lets each side prove that it can read it."""
    import socket

    with open(path, encoding="ascii") as file:
        said = json.load(file)
    with socket.create_connection(("127.0.0.1", said["port"]), timeout=5) as connection:
        connection.sendall(said["ask"].encode() + b"\n")
        wanted, answer = said["answer"].encode() + b"\n", b""
        while len(answer) < len(wanted) and (data := connection.recv(len(wanted) - len(answer))):
            answer += data
        if answer != wanted:
            raise ConnectionAbortedError(103, "who listens there is not the launcher")
        connection.settimeout(None)
        return connection.detach()


def _open_port(name: str) -> int:
    """Opens the virtio-serial port of that name. There is no udev, so the name is looked up in sysfs."""
    ports = "/sys/class/virtio-ports"
    for port in sorted(os.listdir(ports)):
        with open(f"{ports}/{port}/name") as file:
            if file.read().strip() != name:
                continue
        fd = os.open(f"/dev/{port}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(fd, True)
        return fd
    raise FileNotFoundError(2, f"no virtio-serial port {name}")


# The workbench: what the guest can be told to do ------------------------------------------------------------


def _demo(agent: Agent, argument: str) -> Script:
    """Greets, uses a tool that is allowed and one that is not, and says what came of it."""
    kernel = "Windows" if WINDOWS else f"{os.uname().sysname} {os.uname().release}"
    yield prompt(f"hello from SigilOS demo, kernel {kernel}, boot {boottime():.1f} s")
    outcomes = []
    for tool in ("fs.read", "fs.delete"):
        outcome = yield {"kind": "tool.invoke", "tool": tool, "arguments": {"path": "/etc/os-release"}}
        said = "answered" if outcome["kind"] == "tool.result" else f"refused ({outcome.get('code')})"
        outcomes.append(f"{tool} {said}")
    yield prompt("; ".join(outcomes))


def _write(agent: Agent, path: str) -> Script:
    """Writes a file on the root disk."""
    with open(agent.path(path), "w") as file:
        file.write("written by the guest\n")
        file.flush()
        os.fsync(file.fileno())
    yield prompt(f"wrote {path}")


def _read(agent: Agent, path: str) -> Script:
    """Says whether a file exists on the root disk."""
    yield prompt(f"{path} {'exists' if os.path.exists(agent.path(path)) else 'does not exist'}")


def _environment(agent: Agent, name: str) -> Script:
    """Says whether a variable was granted to the workbench; never its value."""
    yield prompt(f"{name} is {'set' if name in agent.settings.environment else 'not set'}")


def _disk(agent: Agent, argument: str) -> Script:
    """Says how large the root file system is."""
    if WINDOWS:
        import shutil

        size = shutil.disk_usage(agent.path("/")).total
    else:
        fs = os.statvfs(agent.path("/"))
        size = fs.f_blocks * fs.f_frsize
    yield prompt(f"root file system has {size} bytes")


def _workbench(agent: Agent, argument: str) -> Script:
    """Says what build was attached: size, digest, whether it is the promised one, and its files."""
    disk = _find_disk("KENAZWB") if agent.owns_machine else ""
    if not disk:
        yield prompt(f"no build is attached for {agent.settings.build or 'no name'}")
        return
    import hashlib

    digest, size, access = hashlib.sha256(), 0, "writable"
    with open(f"{DEVICES}/{disk}", "rb+", buffering=0) as file:
        while data := file.read(1 << 20):
            digest.update(data)
            size += len(data)
        try:
            file.seek(0)
            file.write(b"changed")
        except OSError:
            access = "read-only"
    found = f"sha256:{digest.hexdigest()}"
    promised = "as promised" if found == agent.settings.build_digest else "NOT as promised"
    names = sorted(
        os.path.relpath(os.path.join(directory, name), BUILD)
        for directory, _, files in os.walk(BUILD)
        for name in files
    )
    holds = ", ".join(names) or "nothing"
    yield prompt(f"build {agent.settings.build}: {size} bytes, {found}, {promised}, {access}, holds {holds}")


def _find_disk(serial: str) -> str:
    """The virtio disk of that serial number, as /dev has it; empty when there is none."""
    for disk in sorted(os.listdir(DISKS)):
        try:
            with open(f"{DISKS}/{disk}/serial") as file:
                if file.read().strip() == serial:
                    return disk
        except OSError:
            continue
    return ""


def _idle(agent: Agent, argument: str) -> Script:
    yield from ()


def _bye(agent: Agent, argument: str) -> Script:
    yield from ()
    raise Bye("done")


def _hangup(agent: Agent, argument: str) -> Script:
    """Drops the connection and dials again, as one who remembers nothing."""
    yield {"kind": "hangup"}


def _cut(agent: Agent, argument: str) -> Script:
    """Drops the connection in the middle of a prompt, and dials again to go on."""
    yield {**prompt("said in two pieces"), "cut": True}


def _once(agent: Agent, word: str) -> Script:
    """Plays a word, unless an agent has done so before on this disk."""
    try:
        os.close(os.open(agent.path(f"/once-{word}"), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return
    yield from agent.play([word])


def _exit(agent: Agent, status: str) -> Script:
    yield from ()
    sys.exit(int(status))


def _panic(agent: Agent, argument: str) -> Script:
    """Crashes the guest's kernel. Never that of the host that this may run on as a process."""
    yield from ()
    if agent.owns_machine:
        with open("/proc/sysrq-trigger", "w") as trigger:
            trigger.write("c")
    say("Kernel panic - not syncing: asked for (this guest is a process)")
    os.abort()


def _emergency(agent: Agent, argument: str) -> Script:
    yield from ()
    say("kenaz: emergency: asked for")


def _flood(agent: Agent, argument: str) -> Script:
    """Floods the console from a child, while the agent itself stays well-behaved."""
    yield from ()
    parent = os.getpid()
    if os.fork() == 0:
        while os.getppid() == parent:
            os.write(2, b"flood " * 20 + b"\n")
        os._exit(0)


def _hang(agent: Agent, argument: str) -> Script:
    """Turns the guest deaf to drain, SIGTERM and the power button."""
    yield from ()
    agent.deaf = True
    _on_sigterm(ignore=True)
    if agent.owns_machine:
        with open("/run/kenaz/ignore-button", "w"):
            pass


def _mute(agent: Agent, argument: str) -> Script:
    yield from ()
    while True:
        time.sleep(3600)


def _power_off(agent: Agent, argument: str) -> Script:
    yield from ()
    sys.exit(POWER_OFF)


def _reboot(agent: Agent, argument: str) -> Script:
    yield from ()
    sys.exit(REBOOT)


BEHAVIOURS: dict[str, Callable[[Agent, str], Script]] = {
    "bye": _bye,
    "cut": _cut,
    "demo": _demo,
    "disk": _disk,
    "emergency": _emergency,
    "env": _environment,
    "exit": _exit,
    "flood": _flood,
    "hang": _hang,
    "hangup": _hangup,
    "idle": _idle,
    "mute": _mute,
    "once": _once,
    "panic": _panic,
    "poweroff": _power_off,
    "read": _read,
    "reboot": _reboot,
    "workbench": _workbench,
    "write": _write,
}
"""By word of KENAZ_WORKBENCH_ARGS; `word:argument` hands an argument over. They run in order after welcome.
`early:word` runs before the agent dials, and `mute` always does."""


def prompt(text: str) -> Message:
    """A request that hands `text` to the harness."""
    return {"kind": "prompt", "text": text}


def say(text: str) -> None:
    """One line for the console, in one write, so that lines of others do not mix with it."""
    os.write(2, f"{text}\n".encode())


def boottime() -> float:
    """Seconds since the kernel started, sleep included."""
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    else:  # noqa: RET505  # so that each system's types are checked
        return time.monotonic()  # macOS and Windows, where the agent runs as a process


# A command of the host's ----------------------------------------------------------------------------------


class Command:
    """A command that runs in a process group of its own, under a minder that ends it with the agent.

    agent ── fork ──▶ minder (leads the group) ── spawn ──▶ command

    The minder holds one end of a pipe whose other end only the agent has: when that closes, for whatever
    reason, it kills the group.
    """

    def __init__(self, agent: Agent, wire: Wire, request: Message, chunk: int) -> None:
        import codecs

        self._id = request["id"]
        self._chunk = chunk
        self._cancelled = False
        self._kill_at: float | None = None
        variables = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": os.environ.get("HOME", agent.path("/")),
            "LANG": "C.UTF-8",
            **agent.settings.environment,
        }
        if mark := os.environ.get("KENAZ_MARK"):  # where there is no machine, children are found by it
            variables["KENAZ_MARK"] = mark
        lifeline, self._lifeline = os.pipe()
        self._report, report = os.pipe()
        self._streams = {}
        ends = []
        for name in ("stdout", "stderr"):
            ours, theirs = os.pipe()
            self._streams[ours] = name, codecs.getincrementaldecoder("utf-8")("replace")
            ends.append(theirs)
        self._minder = os.fork()
        if self._minder == 0:
            for fd in (self._lifeline, self._report, *self._streams, wire.fileno()):
                os.close(fd)
            _mind(request["argv"], variables, ends, lifeline, report)
        os.setpgid(self._minder, self._minder)
        for fd in (lifeline, report, *ends):
            os.close(fd)

    def cancel(self) -> None:
        """Asks the command to end, and sees to it that it does within TERM_GRACE."""
        if not self._cancelled:
            self._cancelled = True
            self._kill_at = time.monotonic() + TERM_GRACE
            self._signal(15)

    def kill(self) -> None:
        """Ends all that is left of it."""
        self._signal(9)
        os.waitpid(self._minder, 0)
        for fd in (self._lifeline, self._report, *self._streams):
            os.close(fd)

    def step(self, wire: Wire, seconds: float | None) -> Message | None:
        """Waits for output, a message or the end, and hands on the output. Returns the message that ends
        it, if it has ended."""
        import select

        poll = select.poll()
        for fd in (wire.fileno(), self._report, *self._streams):
            poll.register(fd, select.POLLIN)
        waits = [seconds, None if self._kill_at is None else self._kill_at - time.monotonic()]
        shortest = min((max(0.0, wait) for wait in waits if wait is not None), default=None)
        ready = {fd for fd, _ in poll.poll(None if shortest is None else shortest * 1000)}
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._kill_at = None
            self._signal(9)
        for fd in [fd for fd in self._streams if fd in ready]:
            self._hand_on(wire, fd)
        return self._end(wire) if self._report in ready else None

    def _hand_on(self, wire: Wire, fd: int) -> bool:
        """One piece of output; False at its end, or when there is none now."""
        name, decoder = self._streams[fd]
        try:
            data = os.read(fd, self._chunk)
        except BlockingIOError:
            return False
        text = decoder.decode(data, not data)
        if text:
            wire.send({"kind": "exec.output", "id": self._id, "stream": name, "text": text})
        if not data:
            os.close(fd)
            del self._streams[fd]
        return bool(data)

    def _end(self, wire: Wire) -> Message:
        # What the command itself wrote is there by now; nobody waits for what it left running.
        for fd in list(self._streams):
            os.set_blocking(fd, False)
            while self._hand_on(wire, fd):
                pass
        word, _, number = os.read(self._report, 64).decode().partition(" ")
        self.kill()
        ended: Message = {"kind": "exec.error", "id": self._id, "code": "cancelled", "message": "was ended"}
        if word == "failed" and not self._cancelled:
            return {**ended, "code": "not_started", "message": os.strerror(int(number))}
        if self._cancelled:
            return ended
        return {"kind": "exec.result", "id": self._id, "code": int(number or 137)}

    def _signal(self, number: int) -> None:
        os.killpg(self._minder, number)  # its zombie keeps the number from others


def _mind(argv: list[str], variables: Mapping[str, str], ends: list[int], lifeline: int, report: int) -> None:
    """The minder, from fork to exit: reports `ended CODE`, or `failed ERRNO`."""
    import select
    import signal

    try:
        os.setpgid(0, 0)  # as its parent does: whoever comes first
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the group is told to end, its minder stays
        null = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
        outputs = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(ends, 1)]
        usual = [signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ]
        try:
            child = os.posix_spawnp(argv[0], argv, variables, file_actions=[null, *outputs], setsigdef=usual)
        except OSError as error:
            os.write(report, b"failed %d" % (error.errno or 0))
            return
        for fd in ends:
            os.close(fd)
        poll = select.poll()
        poll.register(lifeline, 0)
        wait = 50
        if hasattr(os, "pidfd_open"):
            poll.register(os.pidfd_open(child), select.POLLIN)
            wait = -1
        status = None
        while status is None:
            if any(fd == lifeline for fd, _ in poll.poll(wait)):
                os.killpg(0, signal.SIGKILL)
            pid, found = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(found) if pid else None
        os.write(report, b"ended %d" % (status if status >= 0 else 128 - status))
    finally:
        os._exit(0)


# The agent ------------------------------------------------------------------------------------------------


class Agent:
    """Plays the script over one connection after the other.

    `owns_machine` says that the machine is the agent's own, to grow and to crash; `clock` holds the moments
    of the boot in seconds of CLOCK_BOOTTIME, for the hello message.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        root: str = "/",
        owns_machine: bool = False,
        clock: Mapping[str, float] | None = None,
    ) -> None:
        self.settings = settings
        self.owns_machine = owns_machine
        self.deaf = False
        self._root = root
        self._clock = clock or {}
        early = [word for word in settings.words if word.startswith("early:") or word == "mute"]
        self._early = self.play([word.removeprefix("early:") for word in early])
        self._script = self.play([word for word in settings.words if word not in early])
        self._started = False
        # No agent of this machine uses an id of another: the host may still have that request open.
        self._requests = int(self._clock.get("agent", 0) * 1000)
        self._command: Command | None = None
        self._pending: Message | None = None
        self._memory: Memory | None = None
        self._draining = False

    def path(self, path: str) -> str:
        """`path` of the guest as this process sees it."""
        return os.path.join(self._root, path.lstrip("/"))

    def run(self) -> None:
        """Dials for ever; returns when bye has been said."""
        for _ in self._early:
            raise ValueError("an early: word needs no channel")
        pause = FIRST_BACKOFF
        while True:
            channel, fd = self._dial()
            if fd is None:
                pause = min(2 * pause, LAST_BACKOFF)
            else:
                wire = Wire(fd, outlives_agents=channel.startswith("virtio-serial:"))
                try:
                    pause = self.converse(wire)
                except Closed as error:
                    say(f"kenaz-guest: connection closed: {error}")
                    pause = FIRST_BACKOFF
                except Bye as bye:
                    self._say_bye(wire, str(bye))
                    return
                finally:
                    self._end_command()
                    wire.close()
            time.sleep(pause)

    def _end_command(self) -> None:
        if self._command is not None:
            self._command.kill()
            self._command = None

    def _say_bye(self, wire: Wire, reason: str) -> None:
        try:
            wire.send({"kind": "bye", "reason": reason})
        except Closed as error:
            say(f"kenaz-guest: bye is not heard: {error}")

    def converse(self, wire: Wire) -> float:
        """One connection, from hello on. Returns seconds to wait after a refusal; raises Closed or Bye."""
        if wire.outlives_agents:
            wire.begin()
        wire.send(self._hello())
        if self.owns_machine:
            grow_root()
        if wire.outlives_agents:
            wire.skip_to_mark()
        while True:
            message = wire.receive()
            assert message is not None
            match message["kind"]:
                case "welcome":
                    break
                case "refused":
                    say(f"kenaz-guest: refused: {message.get('code')}: {message.get('message')}")
                    return REFUSED_BACKOFF
                case "ping":
                    wire.send({"kind": "pong", "nonce": message.get("nonce")})
        resumed = self._remember(wire, message.get("resume"))
        if "exec" not in message.get("capabilities", ()) and not resumed:  # else the host says what to do
            self._go_on(wire)
        # In JSON a byte may take six.
        frame = message.get("limits", {}).get("frame", MAX_FRAME)
        chunk = min(CHUNK, (frame - 256) // 6)
        deadline: float | None = None
        while True:
            if self._draining and self._pending is None and self._command is None:
                raise Bye("drained")
            message = self._next(wire, deadline)
            if message is None:
                if deadline is not None and time.monotonic() >= deadline:
                    raise Bye("drained")
                continue
            kind = message["kind"]
            if kind == "ping":
                wire.send({"kind": "pong", "nonce": message.get("nonce")})
            elif kind == "drain" and not self.deaf:
                self._draining = True
                # Half of the time for what is under way, the other half for the way out.
                deadline = time.monotonic() + float(message.get("deadline", 0)) / 2
                if self._command is not None:
                    self._command.cancel()
                if self._pending is not None and self._pending["kind"] == "tool.invoke":
                    wire.send({"kind": "tool.cancel", "id": self._pending["id"]})
            elif kind in TERMINAL and self._pending is not None and message.get("id") == self._pending["id"]:
                self._advance(wire, message)
            elif kind == "exec" and self._command is None:
                self._command = Command(self, wire, message, chunk)
            elif kind == "exec.cancel" and self._command is not None:
                self._command.cancel()
            elif kind == "error":
                raise Closed(f"{message.get('code')}: {message.get('message')}")

    def _remember(self, wire: Wire, resume: Message | None) -> bool:
        """Whether the conversation goes on where the connection before was lost."""
        memory = self._memory
        if resume is None:
            self._memory = None
            return False
        if memory is not None and memory.conversation == resume["conversation"]:
            wire.resume(memory, resume["received"])
            return True
        self._memory = Memory(resume)
        wire.resume(self._memory, None)
        return False

    def _go_on(self, wire: Wire) -> None:
        """Begins the script, or tells it that its request is lost with the connection before."""
        if not self._started:
            self._started = True
            self._advance(wire, None)
        elif self._pending is not None:
            self._advance(wire, {"kind": "lost", "code": "connection_lost"})

    def _next(self, wire: Wire, deadline: float | None) -> Message | None:
        """The next message; None at the deadline and when the command has ended. Raises Closed."""
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            message = wire.receive(left if self._command is None else 0)
            if message is not None or self._command is None or (left is not None and left <= 0):
                return message
            outcome = self._command.step(wire, left)
            if outcome is not None:
                self._command = None
                wire.send(outcome)
                return None

    def _hello(self) -> Message:
        hello: Message = {
            "kind": "hello",
            "protocol": PROTOCOL,
            "session": self.settings.session,
            "token": self.settings.token,
            "agent": f"kenaz-guest/{VERSION}",
            "build": self.settings.build,
            "capabilities": CAPABILITIES,
        }
        if self._memory is not None:
            hello["resume"] = {
                "conversation": self._memory.conversation,
                "received": self._memory.received,
            }
        if self._clock:
            hello["clock"] = {**self._clock, "hello": round(boottime(), 3)}
        return hello

    def _dial(self) -> tuple[str, int | None]:
        for channel in self.settings.channels:
            try:
                return channel, open_channel(channel)
            except OSError:
                continue
        return "", None

    def play(self, words: list[str]) -> Script:
        """What the words make of the session, in order."""
        for word in words:
            name, _, argument = word.partition(":")
            if name not in BEHAVIOURS:
                say(f"kenaz-guest: unknown word {name}; known are {', '.join(BEHAVIOURS)}")
                continue
            yield from BEHAVIOURS[name](self, argument)

    def _advance(self, wire: Wire, outcome: Message | None) -> None:
        """Hands the outcome of the last request to the script, and sends the next request."""
        self._pending = None
        if self._draining:
            return
        try:
            request = next(self._script) if outcome is None else self._script.send(outcome)
        except StopIteration:
            return
        self._requests += 1
        letter = request["kind"][0]
        self._pending = {**request, "id": f"{letter}{self._requests}"}
        if request["kind"] == "hangup":
            self._memory = None
            raise Closed("asked for")
        if self._pending.pop("cut", False):
            wire.cut(self._pending)
        wire.send(self._pending)


def grow_root() -> None:
    """Grows the root file system to the size of its disk; one that is as large already stays so."""
    import fcntl

    resize = 0x40086610  # EXT4_IOC_RESIZE_FS: _IOW('f', 16, __u64), in blocks
    device = os.stat("/").st_dev
    fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    try:
        with open(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/size") as file:
            size = int(file.read()) * 512
        fcntl.ioctl(fd, resize, (size // os.statvfs(fd).f_bsize).to_bytes(8, sys.byteorder))
    except OSError as error:
        say(f"kenaz-guest: the root file system does not grow: {error.strerror}")
    finally:
        os.close(fd)


def _on_sigterm(*, ignore: bool) -> None:
    import signal

    signal.signal(signal.SIGTERM, signal.SIG_IGN if ignore else lambda *_: sys.exit(0))


def _on_end_of_input(agent: Agent) -> None:
    """What SIGTERM is elsewhere: on Windows no process can be asked to end by a signal."""
    import threading

    def wait() -> None:
        while os.read(0, 64):
            pass
        if not agent.deaf:
            os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def main(argv: list[str]) -> int:
    """The command line; read by hand, because argparse is slow to import."""
    started = boottime()
    owns_machine = "--machine" in argv
    valued = [word for word in argv if word not in ("--machine", "--clock")]
    options = dict(zip(valued[::2], valued[1::2], strict=False))
    if "--env" not in options or len(valued) % 2 or not options.keys() <= {"--env", "--root"}:
        say("usage: agent.py --env FILE [--root DIR] [--machine | --clock]")
        return 2
    try:
        with open(options["--env"], encoding="utf-8") as file:
            settings = Settings(parse_environment(file.read()))
    except (OSError, ValueError) as error:
        say(f"kenaz-guest: {options['--env']}: {error}")
        return 2
    clock = {}
    if owns_machine or "--clock" in argv:
        told = {"init": "KENAZ_CLOCK_INIT", "login": "KENAZ_CLOCK_LOGIN"}
        clock = {name: float(os.environ[key]) for name, key in told.items() if key in os.environ}
        clock["agent"] = round(started, 3)
    agent = Agent(settings, root=options.get("--root", "/"), owns_machine=owns_machine, clock=clock)
    if WINDOWS:
        _on_end_of_input(agent)
    elif not owns_machine:
        _on_sigterm(ignore=False)
    agent.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
