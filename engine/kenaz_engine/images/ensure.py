"""Sees to it that an image is here and in use, by the catalog's policy: what a session does first."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from kenaz_engine.images.catalog import Located, locate
from kenaz_engine.images.errors import ImageError, ImageMissing, Untrusted
from kenaz_engine.images.locks import Held, hold
from kenaz_engine.images.manifest import Image
from kenaz_engine.images.policy import Step
from kenaz_engine.images.store import Store, paths_of
from kenaz_engine.images.transfer import Patience, Watch

_TRIES = 3


@dataclass(frozen=True, slots=True)
class Ensured:
    """An image that is here and in use until `held` is closed. `notes` say on what it falls back."""

    image: Image
    held: Held
    notes: tuple[str, ...] = ()


async def ensure(
    text: str,
    arch: str,
    cache: Path,
    *,
    watch: Watch,
    base: str = ".",
    offline: bool = False,
    ask: bool = False,
    patience: Patience = Patience(),  # noqa: B008  # a frozen value
) -> Ensured:
    """Sees to it that the image is here, by the catalog's policy, and takes it into use.

    `ask`: the publisher is asked whatever the policy says. Without a network, what is here is used, and a
    note says how old it is. Raises ImageMissing, Untrusted, and ImageError, which may be transient.
    """
    for _ in range(_TRIES):
        located = locate(text, arch, cache, now=time.time(), base=base, offline=offline, ask=ask)
        try:
            return await _ensured(located, cache, watch, offline, patience)
        except FileNotFoundError:
            continue  # somebody has pruned it between the look and the lock
    raise ImageError(f"image {text} goes as fast as it comes: others prune it", transient=True)


async def _ensured(located: Located, cache: Path, watch: Watch, offline: bool, patience: Patience) -> Ensured:
    notes: list[str] = []
    match located.step:
        case Step.MISSING | Step.UNREACHABLE:
            assert located.missing is not None
            if located.step is Step.UNREACHABLE:
                raise ImageMissing(f"offline, and {located.missing}", located.missing.hint)
            raise located.missing
        case Step.FETCH | Step.ASK:
            assert located.source is not None
            try:
                from kenaz_engine.images.fetch import Fetcher  # what is here needs none of it

                async with Fetcher(Store.at(cache), patience, watch) as fetcher:
                    image, held = await fetcher.image(
                        located.name, located.arch, located.source, current=located.version, how=located.how
                    )
            except Untrusted:
                raise
            except ImageError as error:
                if located.step is Step.FETCH:
                    raise
                notes.append(f"{error}: using what is here, last known to be current {_ago(located.age)} ago")
            else:
                _check_asked_for(located, image, held)
                return Ensured(image, held)
        case Step.STALE:
            notes.append(
                f"offline: image {located.text} was last known to be current {_ago(located.age)} ago"
            )
        case Step.USE if offline and located.version is not None and located.source is not None:
            notes.append(
                f"offline: image {located.text} is from {_ago(time.time() - located.version.fetched)} ago"
            )
    assert located.image is not None
    return Ensured(located.image, await hold(paths_of(located.image)), tuple(notes))


def _check_asked_for(located: Located, image: Image, held: Held) -> None:
    tag, digest = located.tag, located.digest
    if (tag and image.tag != tag) or (digest and image.digest != f"sha256:{digest}"):
        held.close()
        raise ImageMissing(f"image {located.name} is published with tag {image.tag} as {image.digest}")


def _ago(seconds: float) -> str:
    """A time span in its largest unit."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds / size)} {unit}"
    return f"{int(seconds)} seconds"
