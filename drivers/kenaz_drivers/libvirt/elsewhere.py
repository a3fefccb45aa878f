"""What is done where the URI leads to another host: by libvirt itself, into a storage pool of that host.

See docs/decisions/0024-libvirt-elsewhere.md.
"""

from __future__ import annotations

import html
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import trio

from kenaz_drivers._common.output import LogTail
from kenaz_drivers._common.process import Captured, capture, open_pipe, spawn
from kenaz_drivers.contract import Content, DriverError
from kenaz_drivers.libvirt.domain import PREFIX, Facts, Volume
from kenaz_drivers.libvirt.lines import Lines
from kenaz_drivers.libvirt.virsh import call, environment, failed, failure

Told = Callable[[Content, int, int, bool], None]
"""As `Placing.place` has it."""

STREAMS = (sys.executable, "-I", "-S", str(Path(__file__).parent / "streams" / "__main__.py"))
"""The program that carries what virsh does not; see `streams.program`."""

LOAD_DEADLINE = 20.0
"""Seconds for that program to find libvirt's library. It takes 0.1, where the disk is not cold."""

DISCARD_DEADLINE = 8.0
"""Seconds for volumes to go. A machine's release has 15, of which its domain takes up to 1 as a rule."""

_AGAIN = 0.2
"""Seconds after which a volume in use is tried again: an upload that broke off is not over at once."""

_POOLS = ("dir", "fs", "netfs")
"""The types of pools whose volumes are files, as a kernel must be."""


async def is_here(virsh: str, uri: str, host: str) -> bool:
    """Whether the libvirt behind that URI, on a host of that name, is on this host and sees its files.

    A UNIX socket of a host of our name is here; across a network another name is another host. Else a name
    proves nothing: many hosts are called `localhost`, and libvirt calls ours as /etc/hosts does. So libvirt
    is asked what it makes of a file that was made just now, and of one that never was. Who cannot tell them
    apart is elsewhere. Raises DriverError when that cannot be found out.
    """
    same = _short(host) == _short(platform.node())
    across = bool(urlsplit(uri).hostname)
    if same != across:
        return same
    try:
        with tempfile.NamedTemporaryFile(prefix=PREFIX) as file:
            told = [await _told(virsh, uri, path) for path in (file.name, f"{file.name}-not")]
    except OSError as error:
        raise DriverError(f"whether {uri} leads to this host cannot be found out: {error}") from error
    return told[0] != told[1]


def _short(host: str) -> str:
    return host.split(".", maxsplit=1)[0].casefold()


async def _told(virsh: str, uri: str, path: str) -> str:
    """What libvirt says of a file as an emulator, without the file's name."""
    words = ("domcapabilities", "--virttype", "qemu", "--emulatorbin", path)
    done = await call(virsh, uri, *words)
    if done.code is None:
        raise failed(f"whether {uri} leads to this host cannot be found out", done, uri)
    return done.text.replace(path, "")


async def find_pool(virsh: str, uri: str, host: str, name: str) -> tuple[str, str]:
    """The directory of that pool on that host, and how much room it has, in words. Raises DriverError."""
    done = await call(virsh, uri, f"pool-info {name}; pool-dumpxml {name}")
    what = f"the disks cannot be put on {host}"
    if done.code is None:
        raise failed(what, done, uri)
    if done.code:
        raise DriverError(
            str(failure(what, done.text, uri)),
            hint=f"virsh -c '{uri}' 'pool-define-as {name} dir --target DIRECTORY; pool-build {name}; "
            f"pool-start {name}', or driverOptions.libvirt.pool: NAME of another",
        )
    state = re.search(r"^State: +(\S+)", done.text, re.MULTILINE)
    if state is None or state[1] != "running":
        raise DriverError(
            f"the storage pool {name} on {host} is not active", hint=f"virsh -c '{uri}' pool-start {name}"
        )
    kind = re.search(r"<pool type='([^']*)'", done.text)
    target = re.search(r"<path>(/[^<]*)</path>", done.text)
    if kind is None or kind[1] not in _POOLS or target is None:
        raise DriverError(
            f"the storage pool {name} on {host} is of the type {kind[1] if kind else 'unknown'}, "
            f"and a kernel must be a file",
            hint=f"a pool of type {', '.join(_POOLS)}",
        )
    room = re.search(r"^Available: +(.*\S)", done.text, re.MULTILINE)
    return html.unescape(target[1]), f"{room[1] if room else 'unknown room'} free"


async def require_library() -> None:
    """Raises DriverError where streams cannot be carried."""
    done = await capture(STREAMS, deadline=LOAD_DEADLINE)
    if done.code is None:
        raise DriverError(f"libvirt's library cannot be loaded within {LOAD_DEADLINE:g} s")
    if done.code:
        raise DriverError(
            f"the channel of a machine elsewhere needs libvirt's library: {done.text.strip()}",
            hint="apt install libvirt0" if sys.platform == "linux" else "libvirt.so.0 is on Linux only",
        )


# --- what stays there ---------------------------------------------------------------------------------------


STALLED = 120.0
"""Seconds without a word of an upload, after which it is given up. A word comes with every 64 KiB that went,
but in the end a slow line may hold a megabyte. libvirt itself waits for ever for a host that is gone."""


async def place(facts: Facts, contents: Sequence[Content], told: Told) -> None:
    """Brings these files into the pool, but for what is there already. Raises DriverError."""
    words = [word for content in contents for word in (content.path, f"{PREFIX}{content.digest}")]
    log = LogTail()
    with open_pipe() as (output, theirs):
        child = spawn(
            [*STREAMS, facts.uri, "upload", facts.pool, *words],
            stdout=theirs,
            stderr=theirs,
            env=environment(),
        )
    async with output:
        try:
            with trio.move_on_after(STALLED) as patience:
                async for line in Lines(output):
                    patience.deadline = trio.current_time() + STALLED
                    if found := re.fullmatch(r"(\d+) (\d+|waiting) (\d+)", line):
                        waiting = found[2] == "waiting"
                        done = 0 if waiting else int(found[2])
                        told(contents[int(found[1])], done, int(found[3]), waiting)
                    else:
                        log.feed(f"{line}\n".encode())
                code = await child.wait()
        finally:
            await child.end()
    if patience.cancelled_caught:
        raise DriverError(
            f"nothing more of the image went to {facts.elsewhere} within {STALLED:g} s",
            hint=f"see that the host answers: virsh -c '{facts.uri}' version",
            transient=True,
        )
    if code:
        raise failure(
            f"the image cannot be put into the storage pool {facts.pool} on {facts.elsewhere}",
            "\n".join(log.lines()),
            facts.uri,
        )


# --- what is a machine's own --------------------------------------------------------------------------------


def creation(pool: str, volume: Volume, size: int) -> str:
    """The command that makes a volume of `size` bytes. No word of it needs a quote."""
    made = f"vol-create-as {pool} {volume.name} {size}"
    if volume.source:
        return f"{made} --format raw"
    base = volume.base.rpartition("/")[2]
    return f"{made} --format qcow2 --backing-vol {base} --backing-vol-format {volume.base_format}"


async def make_volumes(virsh: str, uri: str, pool: str, volumes: Sequence[Volume]) -> None:
    """Makes them. Raises DriverError; some may have been made by then."""
    try:
        sizes = {volume: Path(volume.source).stat().st_size for volume in volumes if volume.source}
    except OSError as exc:
        raise DriverError(f"{exc.filename}: {exc.strerror}") from exc
    made = "; ".join(creation(pool, volume, sizes.get(volume, volume.size)) for volume in volumes)
    filled = [("vol-upload", "--pool", pool, volume.name, volume.source) for volume in sizes]
    for words in ((made,), *filled):
        done = await call(virsh, uri, *words)
        if done.code != 0 or "error: " in done.text:
            raise failed(f"no disk can be made in the storage pool {pool}", done, uri)


async def discard_volumes(virsh: str, uri: str, pool: str, names: Sequence[str]) -> None:
    """Deletes those that are there. Raises DriverError when some may still be there."""
    words = "; ".join([*(f"vol-delete --pool {pool} {name}" for name in names), f"vol-list --pool {pool}"])
    more: Mapping[str, str] = {"LIBVIRT_AUTOSTART": "1"}
    done, left = Captured(None, ""), list(names)
    with trio.move_on_after(DISCARD_DEADLINE):
        while left:
            done = await call(virsh, uri, words, more=more)
            left = [name for name in names if done.code or _listed(name, done.text)]
            if left and not re.search("still (?:in use|being allocated)", done.text):
                break
            if left:
                await trio.sleep(_AGAIN)
    if left:
        what = f"the disks {', '.join(left)} in the storage pool {pool} cannot be deleted"
        raise failed(what, done, uri, DISCARD_DEADLINE)


def _listed(name: str, text: str) -> bool:
    return re.search(rf"^ *{re.escape(name)} +/", text, re.MULTILINE) is not None
