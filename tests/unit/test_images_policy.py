"""Decisions about the store: freshness, what is done for an image, and references."""

from __future__ import annotations

import pytest

from kenaz_engine.images.errors import ImageError
from kenaz_engine.images.policy import (
    ALWAYS,
    DAILY,
    DAY,
    NEVER,
    Kept,
    Refresh,
    Step,
    decide,
    prune,
    unreferenced,
)
from kenaz_engine.images.reference import AtUrl, InFile, Named, parse_reference

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("refresh", "age", "fresh"),
    [
        (NEVER, 1e12, True),
        (ALWAYS, 0.0, False),
        (DAILY, 0.0, True),
        (DAILY, DAY - 1, True),
        (DAILY, DAY, False),
        (DAILY, -5.0, False),  # the clock was set back: nobody knows how old it is
    ],
)
def test_freshness(refresh: Refresh, age: float, fresh: bool) -> None:
    assert refresh.is_fresh(1e9, 1e9 + age) is fresh


def test_expiry() -> None:
    assert (NEVER.expires(5.0), ALWAYS.expires(5.0), DAILY.expires(5.0)) == (None, 5.0, 5.0 + DAY)


USUAL = {
    "here": True,
    "as_pinned": True,
    "source": True,
    "rolling": True,
    "refresh": DAILY,
    "age": 2 * DAY,
    "offline": False,
}


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({}, Step.ASK),
        ({"offline": True}, Step.STALE),
        ({"age": 5.0}, Step.USE),
        ({"age": 5.0, "offline": True}, Step.USE),
        ({"rolling": False}, Step.USE),
        ({"source": False}, Step.USE),
        ({"refresh": NEVER}, Step.USE),
        ({"refresh": ALWAYS, "age": 0.0}, Step.ASK),
        ({"here": False}, Step.FETCH),
        ({"here": False, "offline": True}, Step.UNREACHABLE),
        ({"here": False, "source": False}, Step.MISSING),
        ({"here": False, "source": False, "offline": True}, Step.MISSING),
        ({"as_pinned": False}, Step.FETCH),
        ({"as_pinned": False, "refresh": NEVER}, Step.FETCH),
        ({"as_pinned": False, "offline": True}, Step.UNREACHABLE),
    ],
)
def test_what_is_done_for_an_image(changes: dict[str, object], step: Step) -> None:
    assert decide(**{**USUAL, **changes}) is step  # type: ignore[arg-type]  # as the table has it


def kept(name: str, fetched: float, *, used: bool = False, **blobs: int) -> Kept:
    return Kept(name, "x86_64", f"{name}-{fetched}", fetched, blobs, used)


def test_prune_keeps_the_newest_and_what_is_used() -> None:
    images = [kept("a", 1, used=True, x=1), kept("a", 2, y=1), kept("a", 3, z=1), kept("b", 1, w=1)]
    assert prune(images, keep=1) == [images[1]]
    assert prune(images, keep=2) == []
    assert prune(images, keep=0) == [images[3], images[1], images[2]]


def test_prune_by_size_counts_shared_blobs_once_and_takes_the_oldest() -> None:
    images = [kept("a", 1, shared=100, a=10), kept("b", 2, shared=100, b=10), kept("c", 3, c=50)]
    assert prune(images, keep=1, most=170) == []
    assert prune(images, keep=1, most=169) == [images[0]]
    assert prune(images, keep=1, most=159) == [images[0], images[1]]
    assert prune([kept("a", 1, used=True, a=10)], keep=1, most=0) == []


def test_blobs_without_an_image() -> None:
    assert unreferenced(["b", "a", "c"], [kept("x", 1, a=1)]) == ["b", "c"]


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("demo", Named("demo")),
        ("demo:1.0", Named("demo", "1.0")),
        (f"demo@sha256:{HEX}", Named("demo", "", HEX)),
        (f"@{HEX[:16]}", Named(f"@{HEX[:16]}")),
        ("./disk.raw", InFile("./disk.raw")),
        ("image.json", InFile("image.json")),
        (f"https://h/i.json@sha256:{HEX.upper()}", AtUrl("https://h/i.json", HEX)),
        ("file:///i.json", AtUrl("file:///i.json", "")),
    ],
)
def test_references(text: str, reference: object) -> None:
    assert parse_reference(text) == reference


def test_what_a_url_names() -> None:
    assert AtUrl("https://h/i.json?x=1", HEX).is_manifest
    assert not AtUrl("https://h/disk.json.raw", HEX).is_manifest
    assert AtUrl("https://h/d.raw", HEX).name == f"@{HEX[:16]}"


@pytest.mark.parametrize("text", ["", "A", "a b", "a:", "a@sha256:0", "ssh://h/x", "http://[::1"])
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(ImageError):
        parse_reference(text)
