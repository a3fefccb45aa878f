"""`image verify`, `image prune` and `image rm`: images that stay, and those that go."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import trio

from kenaz_engine.cli.failures import FAILED, SUCCESS, USAGE, CommandError
from kenaz_engine.cli.image import MIB, image_users
from kenaz_engine.cli.output import plain, print_json
from kenaz_engine.images.catalog import (
    ImageError,
    ImageMissing,
    default_cache,
    find_image,
    verify_image,
)
from kenaz_engine.images.policy import prune as prunable
from kenaz_engine.images.policy import total_size
from kenaz_engine.images.reference import InFile, Named, parse_reference
from kenaz_engine.images.store import Store
from kenaz_engine.spec.units import parse_size


def verify(arguments: argparse.Namespace) -> int:
    """Reads images again."""
    if arguments.all == bool(arguments.image):
        raise CommandError("name an image, or --all", "kenaz-launcher image ls", USAGE)
    cache = default_cache()
    store = Store.at(cache)
    if arguments.all:
        refs = list(store.refs())
        results = [_ref_result(store, name, arch) for name, arch in refs]
    elif isinstance(reference := parse_reference(arguments.image), InFile):
        image = find_image(arguments.image, arguments.arch, cache)
        verify_image(image)
        results = [{"image": arguments.image, "digest": image.digest, "ok": True, "damaged": []}]
    else:
        name = reference.name
        tag, digest = (reference.tag, reference.digest) if isinstance(reference, Named) else ("", "")
        version = store.read_ref(name, arguments.arch).find(tag, digest)
        if version is None:
            find_image(arguments.image, arguments.arch, cache)  # says why
            raise ImageMissing(f"image {arguments.image} is not in the store")
        results = [{"image": arguments.image, "versions": [(name, arguments.arch, version)]}]
    checked = [done for result in results for done in _checked(store, result)]
    if arguments.json:
        print_json({"ok": all(item["ok"] for item in checked), "images": checked})
    else:
        for item in checked:
            if item["ok"]:
                print(f"{plain(item['image'])} {item['digest']}: ok")
            for damage in item["damaged"]:
                print(f"kenaz-launcher: {plain(item['image'])}: {plain(damage)}", file=sys.stderr)
    return SUCCESS if all(item["ok"] for item in checked) else FAILED


def _ref_result(store: Store, name: str, arch: str) -> dict[str, Any]:
    from kenaz_engine.images.tidy import set_aside_ref

    place = set_aside_ref(store, name, arch)
    if place is not None:
        damage = f"what the name stands for cannot be read: set aside as {place}; get the image again"
        return {"image": name, "arch": arch, "digest": None, "ok": False, "damaged": [damage]}
    versions = store.read_ref(name, arch).versions
    return {"image": name, "versions": [(name, arch, version) for version in versions]}


def _checked(store: Store, result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Reads it all again, sets aside what is damaged, and notes what is right."""
    from kenaz_engine.images.tidy import damaged

    if "versions" not in result:
        yield result
        return
    for name, arch, version in result["versions"]:
        found = []
        for digest, why in damaged(store, version):
            where = f"; set aside as {store.set_aside(digest)}" if store.blob(digest).exists() else ""
            found.append(f"{digest[:12]} {why}{where}")
        if not found:
            trio.run(_note_verified, store, name, arch, version.digest)
        elif version.how != "fetched":
            found.append("get the image again, the way you got it")
        else:
            found.append("the next run, or `kenaz-launcher image pull`, fetches what is missing")
        yield {
            "image": f"{name}:{version.tag}",
            "arch": arch,
            "digest": f"sha256:{version.digest}",
            "ok": not found,
            "damaged": found,
        }


async def _note_verified(store: Store, name: str, arch: str, digest: str) -> None:
    try:
        await store.touch_version(name, arch, digest, verified=time.time())
    except ImageError:
        return  # a store that one may only read is as good to verify


def prune(arguments: argparse.Namespace) -> int:
    """Removes what policy lets go, and what is left over."""
    from kenaz_engine.images.tidy import is_used, litter, remove_image, sweep

    try:
        most = None if arguments.max_bytes is None else parse_size(arguments.max_bytes)
    except ValueError as error:
        raise CommandError(f"--max-bytes: {error}", code=USAGE) from None
    store = Store.at(default_cache())
    images = store.kept(lambda version: is_used(store, version))
    going = prunable(images, keep=arguments.keep, most=most)
    swept, freed = [], 0
    gone = [image for image in going if arguments.dry_run or trio.run(remove_image, store, image)]
    staying = [image for image in images if image not in gone]
    freed += total_size(images) - total_size(staying)
    for item in litter(store, images, time.time()):
        if arguments.dry_run or sweep(store, item):
            swept.append(item)
            freed += item.size
    word = "would go" if arguments.dry_run else "removed"
    if arguments.json:
        print_json(
            {
                "dryRun": arguments.dry_run,
                "images": [{"name": i.name, "arch": i.arch, "digest": f"sha256:{i.digest}"} for i in gone],
                "files": [{"path": str(i.path), "what": i.what, "size": i.size} for i in swept],
                "bytes": freed,
                "left": total_size(staying),
            }
        )
        return SUCCESS
    for image in gone:
        print(f"{word}: {plain(image.name)} {image.arch} sha256:{image.digest[:12]}")
    for item in swept:
        print(f"{word}: {plain(item.path.name)} ({item.what}), {item.size / MIB:.1f} MiB")
    print(f"{freed / MIB:.1f} MiB {'would be' if arguments.dry_run else 'are'} free, {_left(staying)}")
    return SUCCESS


def _left(staying: Sequence[Any]) -> str:
    return f"{len(staying)} images with {total_size(staying) / MIB:.1f} MiB stay"


def remove(arguments: argparse.Namespace) -> int:
    """Removes one image, or all of a name."""
    from kenaz_engine.images.tidy import is_used, remove_image

    store = Store.at(default_cache())
    reference = parse_reference(arguments.image)
    if not isinstance(reference, Named):
        raise CommandError(f"{arguments.image} is not a name in the store", "kenaz-launcher image ls", USAGE)
    ref = store.read_ref(reference.name, arguments.arch)
    wanted = {
        version.digest
        for version in ref.versions
        if reference.tag in ("", version.tag) and reference.digest in ("", version.digest)
    }
    going = [
        image
        for image in store.kept(lambda version: is_used(store, version))
        if (image.name, image.arch) == (ref.name, ref.arch) and image.digest in wanted
    ]
    if not going:
        raise ImageMissing(f"there is no image {arguments.image} for {arguments.arch} in the store")
    users = image_users()
    for image in going:
        if image.used or not trio.run(remove_image, store, image):
            who = ", ".join(users.get(image.digest, [])) or "another launcher"
            raise ImageError(f"image {arguments.image} is used by {who}", "end that first")
        print(f"removed: {plain(image.name)} {image.arch} sha256:{image.digest[:12]}")
    return SUCCESS
