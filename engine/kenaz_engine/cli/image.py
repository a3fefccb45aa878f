"""`kenaz-launcher image`: the images on this machine."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

import trio

from kenaz_engine.cli.failures import FAILED, SUCCESS, USAGE, CommandError
from kenaz_engine.cli.output import columns, cut, plain, print_json, table
from kenaz_engine.images.catalog import (
    Image,
    ImageError,
    catalog,
    default_cache,
    find_image,
    load_image,
    verify_image,
)
from kenaz_engine.images.manifest import MANIFEST
from kenaz_engine.session.prepare import native_arch

_HEADINGS = ("NAME", "TAG", "ARCH", "SIZE", "STATUS", "DIGEST")
_MIB = 1 << 20
_REDRAW = 0.1
_BAR = 30


def configure(parser: argparse.ArgumentParser) -> None:
    """A command of its own for each thing to do."""
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, do: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=text, description=f"{text.capitalize()}.", allow_abbrev=False
        )
        command.set_defaults(do=do)
        return command

    ls = add("ls", _ls, "list images")
    ls.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    pull = add("pull", _pull, "fetch an image")
    pull.add_argument("image", metavar="IMAGE", help="URL of an image.json (https, http or file), or a name")
    pull.add_argument(
        "--sha256", metavar="DIGEST", help="SHA-256 of that image.json; only file: goes without"
    )
    verify = add("verify", _verify, "check that an image is what its manifest says")
    verify.add_argument("image", metavar="IMAGE", help="name[:tag], or path of an image.json")
    verify.add_argument(
        "--arch",
        metavar="ARCH",
        default=native_arch(),
        help="architecture of the guest (default: this host's)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Does what was asked for; what is wrong with an image is a failure, not a defect."""
    try:
        arguments.do(arguments)
    except ImageError as error:
        raise CommandError(str(error), error.hint, FAILED) from error
    return SUCCESS


def _ls(arguments: argparse.Namespace) -> None:
    listed = list(list_images(default_cache()))
    if arguments.json:
        print_json(listed)
        return
    rows = [_HEADINGS, *(_row(item) for item in listed)]
    for line in table(rows, width=columns()):
        print(line)
    for item in listed:
        if item["hint"]:
            print(f"{item['name']} for {item['arch']}: {plain(item['hint'])}")


def list_images(cache: Path) -> Iterator[dict[str, Any]]:
    """Every image in the cache, also a damaged one, and those of the catalog that are not there."""
    found = set()
    for manifest in sorted((cache / "images").glob(f"[!.]*/*/{MANIFEST}")):
        name, arch = manifest.parts[-3:-1]
        found.add((name, arch))
        try:
            yield image_data(load_image(manifest))
        except ImageError as error:
            yield _absent(name, arch, "damaged", f"{error}" + (f" ({error.hint})" if error.hint else ""))
    for name, entry in catalog().items():
        for arch, hint in entry.hint.items():
            if (name, arch) not in found:
                yield _absent(name, arch, "missing", hint)


def image_data(image: Image) -> dict[str, Any]:
    """An image as JSON; `size` is in bytes."""
    size = sum(part.size for part in image.parts.values())
    return {
        "name": image.name,
        "tag": image.tag,
        "arch": image.arch,
        "size": size,
        "status": "here",
        "digest": image.digest,
        "hint": None,
    }


def _absent(name: str, arch: str, status: str, hint: str) -> dict[str, Any]:
    nothing = dict.fromkeys(("tag", "size", "digest"))
    return {"name": name, "arch": arch, "status": status, "hint": hint, **nothing}


def _row(item: dict[str, Any]) -> tuple[str, ...]:
    size = "-" if item["size"] is None else f"{item['size'] / _MIB:.1f} MiB"
    digest = "-" if item["digest"] is None else item["digest"].removeprefix("sha256:")[:12]
    cells = (item["name"], item["tag"] or "-", item["arch"], size, item["status"], digest)
    return tuple(plain(cell) for cell in cells)


def _pull(arguments: argparse.Namespace) -> None:
    if "://" not in arguments.image and not arguments.image.startswith("file:"):
        # The catalog names no place to fetch from; it may say how the image is made.
        image = find_image(arguments.image, native_arch(), default_cache())
        print(f"{image.name}:{image.tag} {image.arch} {image.digest} is here already")
        return
    try:
        urlsplit(arguments.image)
    except ValueError as error:
        raise CommandError(f"{arguments.image} is no URL: {error}", code=USAGE) from None
    from kenaz_engine.images.fetch import download_image

    progress = Progress(sys.stderr)

    async def fetch() -> Image:
        return await download_image(
            arguments.image, default_cache(), sha256=arguments.sha256, report=progress.report
        )

    try:
        image = trio.run(fetch)
    finally:
        progress.close()
    print(f"{image.name}:{image.tag} {image.arch} {image.digest}")


def _verify(arguments: argparse.Namespace) -> None:
    image = find_image(arguments.image, arguments.arch, default_cache())
    verify_image(image)
    print(f"{image.name}:{image.tag} {image.arch} {image.digest}: ok")


class Progress:
    """How far a download is: a bar on a terminal, elsewhere a line at each quarter of a file."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._terminal = out.isatty()
        self._drawn = -1.0
        self._quarter = ("", 0)
        self._open = False

    def report(self, name: str, done: int, total: int) -> None:
        """`done` of `total` bytes of the file `name` have come."""
        share = done / total if total else 1.0
        words = f"{plain(name)} {share:4.0%} of {total / _MIB:.1f} MiB"
        if self._terminal:
            now = time.monotonic()
            if done >= total or now - self._drawn >= _REDRAW:
                self._drawn = now
                bar = "#" * int(share * _BAR)
                self._write(f"\r\x1b[K{cut(f'[{bar:<{_BAR}}] {words}', columns())}", line_open=done < total)
        elif self._quarter != (quarter := (name, int(share * 4))):
            self._quarter = quarter
            if quarter[1]:
                self._write(words, line_open=False)

    def close(self) -> None:
        """Ends an unfinished line, so that what is said next has its own."""
        if self._open:
            self._write("", line_open=False)

    def _write(self, text: str, *, line_open: bool) -> None:
        self._open = line_open
        self._out.write(text + ("" if line_open else "\n"))
        self._out.flush()
