"""`kenaz-launcher doctor`: what this host can run, and what is missing."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import trio

from kenaz_drivers.contract import Capabilities, DriverError, Reason
from kenaz_drivers.registry import NEVER_CHOSEN, driver_names, load, pick
from kenaz_engine.channel.transports import TransportError
from kenaz_engine.channel.transports.local import check_local
from kenaz_engine.cli.failures import ENVIRONMENT, SUCCESS, USAGE, CommandError
from kenaz_engine.cli.output import Paint, plain, print_json
from kenaz_engine.images.catalog import ImageError, default_cache, find_image
from kenaz_engine.images.store import Store
from kenaz_engine.session.directory import DirectoryError, socket_directory, state_home
from kenaz_engine.session.prepare import native_arch
from kenaz_engine.spec.schema import suggestion

DEMO_IMAGE = "demo"
ROOM = 1 << 30
"""Bytes that should be free for images, and for what sessions write to their disks."""

OPEN_FILES = 256
"""Descriptors that a launcher should be allowed: a session takes some 30, a fetch and its clients as many."""

LONGEST_ID = "x" * 63


def configure(parser: argparse.ArgumentParser) -> None:
    """Which drivers, and the form of the report."""
    parser.add_argument("--driver", metavar="NAME", help="look at this driver only")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(arguments: argparse.Namespace) -> int:
    """Looks at drivers and directories; leaves nothing behind."""
    names = driver_names()
    if arguments.driver is not None:
        if arguments.driver not in names:
            hint = suggestion(arguments.driver, names) or f"installed are {', '.join(names)}"
            raise CommandError(f"there is no driver {arguments.driver!r}", hint, USAGE)
        names = (arguments.driver,)
    arch = native_arch()
    drivers = trio.run(probe_all, names, arch)
    host = list(examine_host(arch))
    real = {name for name in drivers if name not in NEVER_CHOSEN} or set(drivers)
    ok = any(drivers[name].usable for name in real)
    # Of one driver alone nobody asks which one it would be.
    auto = None if arguments.driver else pick(drivers)
    if arguments.json:
        print_json(_data(arch, drivers, host, ok, auto))
    else:
        lines = _lines(arch, drivers, host, ok, auto, Paint(sys.stdout))
        sys.stdout.writelines(f"{line}\n" for line in lines)
    return SUCCESS if ok else ENVIRONMENT


async def probe_all(names: Sequence[str], arch: str) -> dict[str, Capabilities]:
    """What each driver can do here, in that order; a broken driver is one that cannot be used."""
    found = {}
    for name in names:
        try:
            found[name] = await load(name).probe(arch, {})
        except DriverError as error:
            found[name] = Capabilities(False, (Reason(False, str(error), error.hint),), arch)
    return found


def examine_host(arch: str) -> Iterator[tuple[str, Reason]]:
    """What sessions need besides a driver, each with what it is called."""
    yield "state", directory_reason(state_home(), "set KENAZ_STATE_DIR to another directory")
    yield "cache", directory_reason(default_cache(), "set KENAZ_CACHE_DIR to another directory")
    yield "sockets", _socket_reason()
    yield "store", _store_reason()
    yield "image", _image_reason(arch)
    yield "files", _files_reason()


def directory_reason(directory: Path, mend: str) -> Reason:
    """Whether files can be made there, or in what it would be made in, and how much room there is."""
    there = next(path for path in (directory, *directory.parents) if path.exists())
    try:
        # Tried, not asked: permissions alone do not tell of a read-only file system.
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        return Reason(False, f"{directory} cannot be written: {error.strerror or error}", mend)
    words = f"{directory} can be written, {free / (1 << 30):.1f} GiB free"
    return Reason(free >= ROOM, words, f"make room, at least {ROOM >> 30} GiB; or {mend}")


def _socket_reason() -> Reason:
    directory = state_home() / "sessions" / LONGEST_ID
    try:
        check_local()
        sockets = socket_directory(directory)
    except (DirectoryError, TransportError) as error:
        return Reason(False, str(error), error.hint)
    if sockets == directory:
        return Reason(True, "paths of sockets are short enough in the state directory")
    return Reason(
        True, f"paths of sockets can be too long in the state directory; they then go to {sockets.parent}"
    )


def _image_reason(arch: str) -> Reason:
    try:
        image = find_image(DEMO_IMAGE, arch, default_cache())
    except ImageError as error:
        return Reason(False, str(error), error.hint)
    return Reason(True, f"image {image.name}:{image.tag} for {arch} is here")


def _store_reason() -> Reason:
    """Whether all that the store lists is there, in its size; only `image verify` reads it."""
    try:
        store = Store.at(default_cache())
        kept = store.kept(lambda version: False)
    except ImageError as error:
        return Reason(False, f"the image store cannot be used: {error}", error.hint)
    lacking = [image for image in kept if not all(store.has(*blob) for blob in image.blobs.items())]
    held = sum({digest: size for image in kept for digest, size in image.blobs.items()}.values())
    words = f"the image store has {len(kept)} images, {held / (1 << 30):.1f} GiB"
    if lacking:
        words += f"; parts are missing of {', '.join(sorted({image.name for image in lacking}))}"
    return Reason(not lacking, words, "run `kenaz-launcher image verify --all`")


if sys.platform == "win32":

    def _files_reason() -> Reason:
        return Reason(True, "this system sets no limit of open files that a session would meet")

else:

    def _files_reason() -> Reason:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        enough = soft == resource.RLIM_INFINITY or soft >= OPEN_FILES
        allowed = "any number of" if soft == resource.RLIM_INFINITY else str(soft)
        return Reason(
            enough, f"{allowed} open files are allowed", f"raise the limit: ulimit -n {OPEN_FILES}, or more"
        )


def _mark(reason: Reason, paint: Paint) -> str:
    return paint("ok", "green") if reason.ok else paint("no", "red")


def _line(reason: Reason, paint: Paint) -> str:
    mend = f" ({plain(reason.mend)})" if reason.mend and not reason.ok else ""
    return f"{_mark(reason, paint)}  {plain(reason.text)}{mend}"


def _lines(
    arch: str,
    drivers: dict[str, Capabilities],
    host: list[tuple[str, Reason]],
    ok: bool,
    auto: str | None,
    paint: Paint,
) -> Iterator[str]:
    for name, capabilities in drivers.items():
        word = paint("usable", "green") if capabilities.usable else paint("not usable", "red")
        yield f"{paint(f'driver {name}', 'bold')}: {word} for {arch} guests"
        if capabilities.usable:
            yield f"  accelerator {capabilities.accelerator}, transports {', '.join(capabilities.transports)}"
        if not capabilities.isolates:
            yield paint("  isolates nothing", "yellow")
        yield from (f"  {_line(reason, paint)}" for reason in capabilities.reasons)
    if auto:
        yield paint("driver auto", "bold") + f": {auto}, {_why(drivers[auto])}"
    yield paint("host", "bold")
    yield from (f"  {_line(reason, paint)}" for _, reason in host)
    if not ok:
        yield paint("nothing here can run a session", "red")


def _why(chosen: Capabilities) -> str:
    if not chosen.isolates:
        return "the last resort, as nothing else is usable"
    if chosen.accelerator == "tcg":
        return "for none runs guests without emulation"
    return "the first that is usable"


def _data(
    arch: str, drivers: dict[str, Capabilities], host: list[tuple[str, Reason]], ok: bool, auto: str | None
) -> dict[str, Any]:
    return {
        "ok": ok,
        "arch": arch,
        "auto": auto or None,
        "drivers": [
            {
                "name": name,
                "usable": capabilities.usable,
                "accelerator": capabilities.accelerator,
                "transports": list(capabilities.transports),
                "isolates": capabilities.isolates,
                "reasons": [reason_data(reason) for reason in capabilities.reasons],
            }
            for name, capabilities in drivers.items()
        ],
        "host": [{"name": name, **reason_data(reason)} for name, reason in host],
    }


def reason_data(reason: Reason) -> dict[str, Any]:
    """A reason as JSON; `mend` is null where nothing needs to be done, or can be."""
    return {"ok": reason.ok, "text": reason.text, "mend": reason.mend or None}
