"""Laws of the image store's decisions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kenaz_engine.images.policy import Kept, prune, total_size
from kenaz_engine.images.transfer import SOON, WAITS, Course, Ended, Kind

BLOBS = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 9), min_size=1, max_size=3)
SIZES = {name: size for size, name in enumerate("abcdef")}


@st.composite
def stores(draw: st.DrawFn) -> list[Kept]:
    names = draw(st.lists(st.sampled_from(["x", "y", "z"]), max_size=8))
    images = []
    for number, name in enumerate(names):
        blobs = {blob: SIZES[blob] for blob in draw(BLOBS)}
        fetched, used = draw(st.integers(0, 5)), draw(st.booleans())
        images.append(Kept(name, "x86_64", str(number), float(fetched), blobs, used))
    return images


@given(stores(), st.integers(0, 4), st.none() | st.integers(0, 40))
def test_prune(images: list[Kept], keep: int, most: int | None) -> None:
    going = prune(images, keep=keep, most=most)
    staying = [image for image in images if image not in going]
    assert not any(image.used for image in going)
    assert [image for image in going if image not in images] == []
    assert len({image.digest for image in going}) == len(going)
    assert [image.fetched for image in going] == sorted(image.fetched for image in going)
    # Nothing newer of the same name goes before something older that nobody uses.
    for gone in going:
        for stays in staying:
            if not stays.used and stays.name == gone.name:
                assert stays.fetched >= gone.fetched
    if most is None:
        for name in {image.name for image in images}:
            named = [image for image in images if image.name == name]
            stayed = [image for image in named if image not in going]
            assert len(stayed) >= min(keep, len(named))
    elif total_size(staying) > most:
        assert all(image.used for image in staying)
    # What is decided is settled: once that is gone, nothing more goes.
    assert prune(staying, keep=keep, most=most) == []


ENDS = st.builds(
    Ended,
    st.sampled_from(Kind),
    st.just("why"),
    st.integers(0, 5),
    st.booleans(),
    st.none() | st.floats(0, 2 * SOON),
)


@given(st.integers(1, 4), st.lists(ENDS, min_size=60, max_size=60))
def test_the_way_through_the_mirrors_ends(mirrors: int, ends: list[Ended]) -> None:
    course = Course(tuple(f"https://m{number}/x" for number in range(mirrors)))
    steps = waited = 0
    for end in ends:
        if not course.urls:
            break
        course = course.on(end)
        steps += 1
        waited += course.wait > 0
        assert course.wait <= SOON
    # Each mirror: once, once anew; and again for each of the 5 bytes, and for each wait.
    assert not course.urls
    assert steps <= 2 * mirrors + 5 + WAITS
    assert waited <= WAITS
    assert len(course.failures) == mirrors
