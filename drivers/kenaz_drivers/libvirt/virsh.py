"""What virsh is told, and what it says; see docs/decisions/0017-libvirt.md.

Facts: virsh(1) and the source of virsh 9.0 (tools/virsh-domain-event.c). Under `LC_ALL=C` its words do not
change with the user's language.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from kenaz_drivers._common.process import Captured, capture
from kenaz_drivers.contract import DriverError, Exit, JsonObject

# What virsh and libvirt's clients read of the environment: where sockets, keys and configuration are.
_VARIABLES = (
    "HOME",
    "KRB5CCNAME",
    "PATH",
    "SSH_AUTH_SOCK",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "XDG_RUNTIME_DIR",
)

FIXED = {"LC_ALL": "C", "LIBVIRT_AUTOSTART": "0"}
"""What virsh is given besides: its words, and that it starts no daemon, which would carry our mark."""

CALL_DEADLINE = 20.0
"""Seconds for an answer: a call takes 0.04, or 9 where the daemon has just started and looks at its QEMU."""

DESTROY_DEADLINE = 12.0
"""Seconds for the end of a domain: libvirt itself kills a QEMU that does not go after 10. A machine's release
has 15."""

_EVENT = re.compile(r"event '(lifecycle|reboot)' for domain '[^']*'(?:: (\S+)(?: (.*))?)?$")

_MONITOR = re.compile(r"event (\S+) at \S+ for domain '[^']*': (.*)$")

# What libvirt says, and what its user can do; the first that is found counts. HOST is that of the URI.
_GROUP = "join the group libvirt, or driverOptions.libvirt.uri: qemu:///session"
_HERE = (
    ("sock': Permission denied", _GROUP),
    ("Failed to connect socket", "start libvirt's daemon: systemctl start virtqemud, or libvirtd"),
    ("authentication unavailable", _GROUP),
    ("authentication failed", _GROUP),
)
_OWN = (
    (
        "Failed to connect socket",
        "start libvirt's daemon, or driverOptions.libvirt.uri: qemu:///session, and libvirt starts it",
    ),
)
_UP = "see that HOST is up and can be reached from here, or mend driverOptions.libvirt.uri"
_THERE = (
    ("HAS CHANGED", "if HOST has a new key, and you know why: ssh-keygen -R HOST, then ssh to it once"),
    ("peer's certificate", "give HOST a certificate of that name, by the CA that this host knows"),
    ("CA certificate", "put the certificate of HOST's CA where libvirt looks for it"),
    ("SASL", "give what HOST's libvirt asks for in auth.conf: https://libvirt.org/auth.html"),
    ("sock': Permission denied", "log in to HOST as root, or have that user join the group libvirt there"),
    ("Failed to connect socket", "start libvirt's daemon on HOST: systemctl start virtqemud, or libvirtd"),
    ("authentication unavailable", "log in to HOST as root, or have that user join the group libvirt there"),
    ("authentication failed", "give what HOST's libvirt asks for: https://libvirt.org/auth.html"),
    ("nc: not found", "install netcat-openbsd on HOST"),
    ("nc: command not found", "install netcat-openbsd on HOST"),
    ("Connection timed out", _UP),
    ("No route to host", _UP),
)
_ANYWHERE = (
    ("Could not access KVM", "driverOptions.libvirt.accel: tcg"),
    ('Failed to get "', "another machine uses this disk; end that one first"),
    ("cannot set up guest memory", "give the machine less memory"),
    ("Cannot allocate memory", "give the machine less memory"),
    ("without qemu-img", "install qemu-utils on that host"),
    ("No space left on device", "free some space"),
    ("Permission denied (", "give ssh a key for that host, by an agent or without a passphrase"),
    ("Permission denied", "let the user that libvirt runs QEMU as read that file"),
    ("Host key verification failed", "add the host to your known_hosts: ssh to it once"),
    ("Could not resolve hostname", "driverOptions.libvirt.uri: a host that ssh finds by its name"),
    ("Unable to resolve address", "driverOptions.libvirt.uri: a host that is found by its name"),
    ("Connection refused", "see that the host listens there, or mend driverOptions.libvirt.uri"),
)


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """One event of a domain's life, in virsh's words: `Stopped` and `Shutdown`; or `Reboot`."""

    event: str
    detail: str


def parse_event(line: str) -> Lifecycle | None:
    """What a line of `virsh event` tells of the domain's life; None for other lines."""
    found = _EVENT.search(line)
    if found is None:
        return None
    return Lifecycle("Reboot", "") if found[1] == "reboot" else Lifecycle(found[2] or "", found[3] or "")


def parse_monitor(line: str) -> tuple[str, JsonObject] | None:
    """The event of QEMU's monitor, and its data, that a line of `virsh qemu-monitor-event` tells of."""
    found = _MONITOR.search(line)
    try:
        data = json.loads(found[2]) if found else None
    except ValueError:
        data = None
    return (found[1], data if isinstance(data, dict) else {}) if found else None


def describe_exit(events: Iterable[Lifecycle]) -> Exit:
    """How a domain ended, from the events of its life, the last of which is its end."""
    seen = list(events)
    last = seen[-1] if seen else Lifecycle("", "")
    if any(one.event == "Crashed" for one in seen):
        return Exit(False, "the guest's kernel panicked")
    if any(one.event == "Reboot" for one in seen):
        return Exit(False, "the guest asked for a reboot")
    if Lifecycle("Shutdown", "Finished after guest request") in seen and last.detail == "Shutdown":
        return Exit(True, "the guest powered off")
    words = {
        "Shutdown": "a signal ended QEMU",
        "Destroyed": "the launcher destroyed the domain",
        "Crashed": "QEMU crashed",
        "Failed": "QEMU failed",
    }
    return Exit(False, words.get(last.detail, f"libvirt says: {last.event} {last.detail}".rstrip()))


def errors(text: str) -> tuple[str, ...]:
    """What virsh complained of, without its repetitions of that."""
    lines = [line.removeprefix("error: ").strip() for line in text.splitlines()]
    return tuple(line for line in lines if line and not line.startswith("failed to get domain"))


def failure(what: str, text: str, uri: str) -> DriverError:
    """The error of a call to the virsh of that URI that said this."""
    said = errors(text)
    message = said[-1] if said else "virsh does not say why"
    return DriverError(f"{what}: {message}", hint=_mend(text, uri), log=said[-20:])


def _mend(text: str, uri: str) -> str:
    parts = urlsplit(uri)
    of_place = _THERE if parts.hostname else _OWN if parts.path == "/session" else _HERE
    found = next((mend for words, mend in (*of_place, *_ANYWHERE) if words in text), "")
    return found.replace("HOST", parts.hostname or "")


def failed(what: str, done: Captured, uri: str, deadline: float = CALL_DEADLINE) -> DriverError:
    """The error of a call that came to nothing, or to no end within `deadline` seconds."""
    if done.code is not None:
        return failure(what, done.text, uri)
    hint = f"see that libvirt answers: virsh -c '{uri}' version"
    return DriverError(f"{what}: nothing came within {deadline:g} s", hint=hint, log=errors(done.text)[-20:])


def environment() -> dict[str, str]:
    """All that virsh gets of an environment."""
    return FIXED | {name: os.environ[name] for name in _VARIABLES if name in os.environ}


async def call(
    virsh: str, uri: str, *words: str, deadline: float = CALL_DEADLINE, more: Mapping[str, str] | None = None
) -> Captured:
    """Runs one virsh. Raises DriverError when there is none to run."""
    argv = [virsh, "-c", uri, "--quiet", *words]
    return await capture(argv, deadline=deadline, environment={**environment(), **(more or {})})


async def start_daemon(virsh: str, uri: str) -> None:
    """Has a user's own daemon started again. Raises DriverError.

    The one that `probe` had started ends after 120 s without a connection, and an image may take longer.
    """
    done = await call(virsh, uri, "uri", more={"LIBVIRT_AUTOSTART": "1"})
    if done.code != 0:
        raise failed(f"libvirt at {uri} does not answer", done, uri)


async def destroy(virsh: str, uri: str, uuid: str) -> None:
    """Ends the domain of that UUID, if there is one. Raises DriverError when it may still be there.

    Has a user's own daemon started, if need be: it ends when it is idle, and nobody else knows of a domain.
    """
    more = {"LIBVIRT_AUTOSTART": "1"}
    done = await call(virsh, uri, "destroy", uuid, deadline=DESTROY_DEADLINE, more=more)
    if done.code == 0 or _is_gone(done.text):
        return
    raise failed(f"the domain {uuid} cannot be ended", done, uri, DESTROY_DEADLINE)


def _is_gone(text: str) -> bool:
    gone = ("failed to get domain", "Domain not found", "domain is not running")
    return "failed to connect" not in text and any(words in text for words in gone)
