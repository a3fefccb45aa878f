"""Decisions about what is in the store: is it fresh, is the server asked, what may go. Pure: no clock, no
file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

DAY = 86400.0


@dataclass(frozen=True, slots=True)
class Refresh:
    """When the publisher is asked whether there is something newer: `after` seconds since it was last asked;
    0 is always, None is never."""

    after: float | None

    def is_fresh(self, checked: float, now: float) -> bool:
        """Whether it need not be asked. A `checked` in the future (a clock that was set back) is not
        fresh."""
        if self.after is None:
            return True
        return 0 <= now - checked < self.after

    def expires(self, checked: float) -> float | None:
        """The time from which on it is asked; None for never."""
        return None if self.after is None else checked + self.after


NEVER = Refresh(None)
ALWAYS = Refresh(0.0)
DAILY = Refresh(DAY)


class Step(Enum):
    """What is to be done for an image that is wanted."""

    USE = "use what is here"
    ASK = "ask whether what is here is still current"
    FETCH = "fetch it"
    STALE = "use what is here, although it should be asked for"
    UNREACHABLE = "it is not here, and offline nothing is fetched"
    MISSING = "it is not here, and nobody says where it is"


def decide(
    *, here: bool, as_pinned: bool, source: bool, rolling: bool, refresh: Refresh, age: float, offline: bool
) -> Step:
    """What to do for an image.

    `here`: it is in the store, whole. `as_pinned`: it is what the catalog's digest asks for, or none does.
    `source`: something says where it is published; `rolling`: what is published there may change. `age`:
    seconds since the publisher was last asked.
    """
    if not (here and as_pinned):
        if not source:
            return Step.MISSING
        return Step.UNREACHABLE if offline else Step.FETCH
    if not (source and rolling) or refresh.is_fresh(0.0, age):
        return Step.USE
    return Step.STALE if offline else Step.ASK


@dataclass(frozen=True, slots=True)
class Kept:
    """An image of the store, as `prune` sees it. `fetched` is a time in seconds; `blobs` are sizes by digest;
    `used`: somebody holds it."""

    name: str
    arch: str
    digest: str
    fetched: float
    blobs: Mapping[str, int]
    used: bool


def prune(images: Sequence[Kept], *, keep: int, most: int | None = None) -> list[Kept]:
    """Those that may go, oldest first.

    What is used stays. Of each name and architecture the `keep` newest stay; with `most`, the oldest of the
    others go, too, until all blobs together have at most so many bytes.
    """
    newest_first = sorted(images, key=lambda image: (image.fetched, image.digest), reverse=True)
    seen: dict[tuple[str, str], int] = {}
    going: list[Kept] = []
    staying: list[Kept] = []
    for image in newest_first:
        rank = seen[image.name, image.arch] = seen.get((image.name, image.arch), 0) + 1
        (staying if image.used or rank <= keep else going).append(image)
    while most is not None and total_size(staying) > most:
        oldest = next((image for image in reversed(staying) if not image.used), None)
        if oldest is None:
            break
        staying.remove(oldest)
        going.append(oldest)
    return sorted(going, key=lambda image: (image.fetched, image.digest))


def total_size(images: Iterable[Kept]) -> int:
    """Bytes of all their blobs, each counted once."""
    blobs: dict[str, int] = {}
    for image in images:
        blobs |= image.blobs
    return sum(blobs.values())


def unreferenced(present: Iterable[str], images: Iterable[Kept]) -> list[str]:
    """The blobs that no image consists of."""
    referenced = {blob for image in images for blob in image.blobs}
    return sorted(set(present) - referenced)
