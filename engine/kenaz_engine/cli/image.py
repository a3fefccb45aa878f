"""`kenaz-launcher image`: the images on this machine, and those that can be had."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kenaz_engine.cli.failures import FAILED, SUCCESS, CommandError
from kenaz_engine.cli.output import ago, columns, plain, print_json, table
from kenaz_engine.images.catalog import (
    ImageError,
    catalog,
    default_cache,
    locate,
)
from kenaz_engine.images.store import Store, Version, moment
from kenaz_engine.session.prepare import native_arch

_HEADINGS = ("NAME", "TAG", "ARCH", "SIZE", "STATUS", "AGE", "VERIFIED", "USED BY", "DIGEST")
MIB = 1 << 20


def configure(parser: argparse.ArgumentParser) -> None:
    """A command of its own for each thing to do."""
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, do: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=text, description=f"{text.capitalize()}.", allow_abbrev=False
        )
        command.set_defaults(do=do)
        return command

    def arch(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--arch",
            metavar="ARCH",
            default=native_arch(),
            help="architecture of the guest (default: this host's)",
        )

    ls = add("ls", _ls, "list images")
    ls.add_argument("--json", action="store_true", help="a list of objects instead of a table")

    inspect = add("inspect", _inspect, "show all that is known of an image")
    inspect.add_argument("image", metavar="IMAGE", help="name[:tag], name@sha256:DIGEST, or a path")
    arch(inspect)
    inspect.add_argument("--json", action="store_true", help="one JSON object instead of text")

    pull = add("pull", _late("image_get", "pull"), "fetch an image, or what is newer of it")
    pull.add_argument(
        "image", metavar="IMAGE", nargs="?", help="a name of the catalog, or a URL (https, http or file)"
    )
    pull.add_argument(
        "--sha256", metavar="DIGEST", help="SHA-256 of the file at the URL; only file: goes without"
    )
    pull.add_argument(
        "--all", action="store_true", help="every image of the catalogs that is published somewhere"
    )
    arch(pull)
    pull.add_argument("--offline", action="store_true", help="fetch nothing; fail unless it is here")
    pull.add_argument("--json", action="store_true", help="one JSON object a line instead of text")

    verify = add(
        "verify", _late("image_tidy", "verify"), "read all of an image again, and set aside what is damaged"
    )
    verify.add_argument("image", metavar="IMAGE", nargs="?", help="name[:tag], or path of an image.json")
    verify.add_argument("--all", action="store_true", help="every image in the store")
    arch(verify)
    verify.add_argument("--json", action="store_true", help="one JSON object instead of text")

    tidy = add(
        "prune",
        _late("image_tidy", "prune"),
        "remove images that are neither used nor new, and what is left over",
    )
    tidy.add_argument(
        "--keep", metavar="N", type=_count, default=1, help="newest images to keep of each name (default: 1)"
    )
    tidy.add_argument(
        "--max-bytes",
        metavar="SIZE",
        help="remove further images, oldest first, until no more is left, like 20GiB",
    )
    tidy.add_argument("--dry-run", action="store_true", help="only say what would go")
    tidy.add_argument("--json", action="store_true", help="one JSON object instead of text")

    remove = add("rm", _late("image_tidy", "remove"), "remove an image")
    remove.add_argument(
        "image", metavar="IMAGE", help="a name (all images of it), name:tag, or name@sha256:DIGEST"
    )
    arch(remove)

    bring = add("import", _late("image_get", "bring"), "take an image from a file into the store")
    bring.add_argument(
        "file", metavar="FILE", help="an image.json with its parts beside it, or a disk (raw or qcow2)"
    )
    bring.add_argument("--name", metavar="NAME", help="what the image is called here (needed for a disk)")
    bring.add_argument("--tag", metavar="TAG", default="latest", help="the tag of a disk (default: latest)")
    bring.add_argument("--sha256", metavar="DIGEST", help="refuse the file unless its SHA-256 is this")
    arch(bring)
    bring.add_argument("--json", action="store_true", help="one JSON object a line instead of text")

    check = add(
        "check", _late("image_check", "check"), "boot an image once, and say what of the guest contract holds"
    )
    check.add_argument("image", metavar="IMAGE", help="name[:tag], name@sha256:DIGEST, or a path")
    arch(check)
    check.add_argument("--memory", metavar="SIZE", default="768MiB", help="of its machine (default: 768MiB)")
    check.add_argument("--disk", metavar="SIZE", default="4GiB", help="of its root disk (default: 4GiB)")
    check.add_argument(
        "--set",
        metavar="PATH=VALUE",
        action="append",
        default=[],
        help="override a value of its session's spec",
    )
    check.add_argument("--json", action="store_true", help="one JSON object instead of text")

    make = add("build", _late("image_build", "make"), "build an image from Debian packages")
    make.add_argument(
        "name", metavar="NAME", nargs="?", default="demo", help="demo or sigilos (default: demo)"
    )
    arch(make)
    make.add_argument("--output", metavar="DIR", help="a directory to put it into, not the store")
    make.add_argument("--force", action="store_true", help="build even if the image is current")


def _late(module: str, name: str) -> Callable[[argparse.Namespace], int]:
    """A function of another module, imported when it is called."""

    def call(arguments: argparse.Namespace) -> int:
        from importlib import import_module

        code = getattr(import_module(f"kenaz_engine.cli.{module}"), name)(arguments)
        assert isinstance(code, int)
        return code

    return call


def run(arguments: argparse.Namespace) -> int:
    """Does what was asked for; what is wrong with an image is a failure, not a defect."""
    try:
        code = arguments.do(arguments)
    except ImageError as error:
        raise CommandError(str(error), error.hint, FAILED) from error
    assert isinstance(code, int)
    return code


# --- looking ------------------------------------------------------------------------------------------------


def _ls(arguments: argparse.Namespace) -> int:
    listed = list(list_images(default_cache()))
    if arguments.json:
        print_json(listed)
        return SUCCESS
    now = time.time()
    for line in table([_HEADINGS, *(_row(item, now) for item in listed)], width=columns()):
        print(line)
    for item in listed:
        if item["hint"]:
            print(f"{plain(item['name'])} for {item['arch']}: {plain(item['hint'])}")
    return SUCCESS


def list_images(cache: Path) -> Iterator[dict[str, Any]]:
    """Every image in the store, also a damaged one, and those of the catalogs that are not there."""
    store, users = Store.at(cache), image_users()
    found = set()
    for name, arch in store.refs():
        found.add((name, arch))
        try:
            versions = store.read_ref(name, arch).versions
        except ImageError as error:
            yield {**_nothing(name, arch), "status": "damaged", "hint": in_words_of(error)}
            continue
        for number, version in enumerate(versions):
            yield _version_data(store, name, arch, version, number == 0, users)
    for name, entry in catalog().items():
        for arch, offer in entry.offers.items():
            if (name, arch) not in found:
                status = "published" if offer.source else "missing"
                hint = offer.hint or f"run `kenaz-launcher image pull {name}`"
                yield {**_nothing(name, arch), "status": status, "hint": hint}


def _nothing(name: str, arch: str) -> dict[str, Any]:
    absent = dict.fromkeys(("tag", "size", "digest", "url", "how", "fetched", "checked", "verified"))
    return {"name": name, "arch": arch, "usedBy": [], **absent}


def _version_data(
    store: Store, name: str, arch: str, version: Version, current: bool, users: dict[str, list[str]]
) -> dict[str, Any]:
    """A version as JSON: `size` in bytes, times in UTC."""
    from kenaz_engine.images.tidy import is_used

    status, hint = "here" if current else "old", None
    try:
        store.load(version)
    except ImageError as error:
        status, hint = "damaged", in_words_of(error)
    used = users.get(version.digest) or (["another launcher"] if is_used(store, version) else [])
    return {
        "name": name,
        "tag": version.tag,
        "arch": arch,
        "size": version.size,
        "status": status,
        "digest": f"sha256:{version.digest}",
        "hint": hint,
        "how": version.how,
        "url": version.url or None,
        **{key: moment(getattr(version, key)) for key in ("fetched", "checked", "verified")},
        "usedBy": used,
    }


def in_words_of(error: ImageError) -> str:
    return f"{error}" + (f" ({error.hint})" if error.hint else "")


def image_users() -> dict[str, list[str]]:
    """The living sessions of this user by the digests of the images that they hold."""
    from kenaz_engine.session.directory import all_sessions

    users: dict[str, list[str]] = {}
    for seen in all_sessions():
        records = seen.recording.records if seen.status == "running" and seen.recording else ()
        held = {
            r["id"]: r["intent"]["digest"]
            for r in records
            if r["kind"] == "intent" and r["resource"] == "image"
        }
        for record in records:
            if record["kind"] == "released":
                held.pop(record["id"], None)
        for digest in held.values():
            users.setdefault(digest.removeprefix("sha256:"), []).append(seen.id)
    return users


def _row(item: dict[str, Any], now: float) -> tuple[str, ...]:
    from datetime import datetime

    def since(key: str) -> str:
        return ago(now - datetime.fromisoformat(item[key]).timestamp()) if item[key] else "-"

    size = "-" if item["size"] is None else f"{item['size'] / MIB:.1f} MiB"
    digest = "-" if item["digest"] is None else item["digest"].removeprefix("sha256:")[:12]
    cells: tuple[str, ...] = (
        item["name"],
        item["tag"] or "-",
        item["arch"],
        size,
        item["status"],
        since("fetched"),
    )
    cells += (since("verified"), ", ".join(item["usedBy"]) or "-", digest)
    return tuple(plain(cell) for cell in cells)


def _inspect(arguments: argparse.Namespace) -> int:
    cache = default_cache()
    located = locate(arguments.image, arguments.arch, cache, now=time.time(), offline=True)
    image = located.image
    if image is None:
        assert located.missing is not None
        raise located.missing
    data: dict[str, Any] = {
        "name": located.name or image.name,
        "tag": image.tag,
        "arch": image.arch,
        "digest": image.digest or None,
    }
    if located.version is not None:
        data = _version_data(Store.at(cache), located.name, image.arch, located.version, True, image_users())
        expires = located.refresh.expires(located.version.checked) if _is_rolling(located.source) else None
        data["expires"] = None if expires is None else moment(expires)
    data |= {
        "manifest": str(image.manifest) if image.manifest else None,
        "rootFormat": image.root_format,
        "cmdline": image.cmdline,
        "console": {
            "device": image.console_device,
            "patterns": [{"event": p.event, "pattern": p.pattern} for p in image.console_patterns],
        },
        "parts": {
            name: {"path": str(part.path), "size": part.size, "sha256": part.sha256 or None}
            for name, part in image.parts.items()
        },
    }
    if arguments.json:
        print_json(data)
    else:
        for key, value in _flat(data):
            print(f"{key:<20} {plain(value)}".rstrip())
    return SUCCESS


def _is_rolling(source: object) -> bool:
    return bool(getattr(source, "rolling", False))


def _flat(data: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _flat(value, f"{path}.{key}".lstrip("."))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from _flat(value, f"{path}[{number}]")
    elif data is not None:
        yield path, str(data)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)
