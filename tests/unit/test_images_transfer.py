"""Decisions about a download, one by one."""

from __future__ import annotations

from typing import Any

import pytest

from kenaz_engine.images.transfer import (
    SOON,
    WAITS,
    Answer,
    Course,
    Ended,
    Have,
    Kind,
    Meter,
    Take,
    backoff,
    judge,
    request_headers,
    retry_after,
    shown,
)

NOW = 1_800_000_000.0


def test_a_request_asks_for_what_is_missing() -> None:
    url = "https://a/x"
    assert request_headers(Have(), url) == {"Accept-Encoding": "identity"}
    strong = request_headers(Have(5, url, '"e"', "Tue"), url)
    assert (strong["Range"], strong["If-Range"]) == ("bytes=5-", '"e"')
    assert request_headers(Have(5, url, 'W/"e"', "Tue"), url)["If-Range"] == "Tue"
    assert "If-Range" not in request_headers(Have(5, "https://b/x", '"e"', "Tue"), url)
    assert "If-Range" not in request_headers(Have(5, url, 'W/"e"', ""), url)


@pytest.mark.parametrize(
    ("status", "headers", "ranged", "answer"),
    [
        (200, {}, True, Answer(Take.WHOLE)),
        (200, {"content-length": "10"}, False, Answer(Take.WHOLE)),
        (200, {"content-length": "9"}, False, Answer(Take.FAILED, "has 9 bytes, and 10 are promised")),
        (206, {"content-range": "bytes 5-9/10"}, True, Answer(Take.REST)),
        (206, {"content-range": "bytes 5-9/*"}, True, Answer(Take.REST)),
        (206, {"content-range": "bytes 4-9/10"}, True, Answer(Take.NOTHING)),
        (206, {"content-range": "bytes 5-9/11"}, True, Answer(Take.NOTHING)),
        (206, {"content-type": "multipart/byteranges"}, True, Answer(Take.NOTHING)),
        (206, {"content-range": "bytes 5-9/10"}, False, Answer(Take.FAILED, "status 206")),
        (416, {}, True, Answer(Take.NOTHING)),
        (416, {}, False, Answer(Take.FAILED, "status 416")),
        (404, {}, True, Answer(Take.FAILED, "status 404")),
        (301, {}, True, Answer(Take.FAILED, "status 301")),
        (500, {}, True, Answer(Take.FAILED, "status 500", True)),
        (501, {}, True, Answer(Take.FAILED, "status 501")),
        (429, {"retry-after": "7"}, True, Answer(Take.FAILED, "status 429", True, 7.0)),
        (503, {"retry-after": "soon"}, True, Answer(Take.FAILED, "status 503", True, None)),
        (500, {"retry-after": "7"}, True, Answer(Take.FAILED, "status 500", True, None)),
        (200, {"content-encoding": "br"}, True, Answer(Take.FAILED, "the server packs it as br, unasked")),
    ],
)
def test_what_an_answer_means(status: int, headers: dict[str, str], ranged: bool, answer: Answer) -> None:
    assert judge(status, headers, Have(5), 10, ranged=ranged, now=NOW) == answer


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120.0),
        (" 0 ", 0.0),
        ("Fri, 15 Jan 2027 08:00:30 GMT", 30.0),
        ("Fri, 15 Jan 2027 07:00:00 GMT", 0.0),
        ("-5", None),
        ("", None),
        ("Fri, 99 Jan 2027", None),
    ],
)
def test_when_to_come_again(text: str, seconds: float | None) -> None:
    assert retry_after(text, NOW) == seconds


A, B = "https://a/x", "https://b/x"


def went(*ends: Ended, urls: tuple[str, ...] = (A, B)) -> Course:
    course = Course(urls)
    for end in ends:
        course = course.on(end)
    return course


def broken(reached: int = 0, **more: Any) -> Ended:
    return Ended(Kind.BROKEN, "down", reached, **more)


def test_a_mirror_that_fails_is_left_for_the_next() -> None:
    for kind in Kind:
        course = went(Ended(kind, "bad"))
        if kind is Kind.CHANGED:
            assert (course.urls, course.anew) == ((A, B), True)
        else:
            assert course.urls == (B,)
    assert went(Ended(Kind.REFUSED, "no"), broken()).failures == (f"{A}: no", f"{B}: down")


def test_what_came_is_taken_up_again_where_more_comes() -> None:
    course = went(broken(10), broken(20))
    assert (course.urls, course.anew, course.failures) == ((A, B), False, ())
    assert went(broken(10), broken(10)).urls == (B,)
    # Another mirror may go on from there; it counts only what is more.
    assert went(broken(10), broken(10), broken(10)).urls == ()


def test_what_cannot_be_taken_up_is_begun_anew_once_for_each_mirror() -> None:
    changed = Ended(Kind.CHANGED, "other", 10)
    assert went(changed, changed).urls == (B,)
    damaged = Ended(Kind.DAMAGED, "bad", 10, resumed=True)
    again = went(damaged)
    assert (again.urls, again.anew) == ((A, B), True)
    left = went(damaged, damaged)
    assert (left.urls, left.anew, left.untrusted) == ((B,), True, True)
    assert went(Ended(Kind.DAMAGED, "bad", 10)).urls == (B,)


def test_a_wait_is_obeyed_when_it_is_short_and_nobody_else_is_there() -> None:
    polite = broken(after=SOON)
    assert went(polite).urls == (B,)
    alone = went(polite, urls=(A,))
    assert (alone.urls, alone.wait) == ((A,), SOON)
    assert went(*[polite] * WAITS, urls=(A,)).urls == (A,)
    assert went(*[polite] * (WAITS + 1), urls=(A,)).urls == ()
    assert went(broken(after=SOON + 1), urls=(A,)).urls == ()


def test_only_what_may_pass_makes_the_whole_transient() -> None:
    assert not went(Ended(Kind.REFUSED, "no"), Ended(Kind.DAMAGED, "bad")).transient
    assert went(Ended(Kind.REFUSED, "no"), broken()).transient


def test_the_meter_knows_rate_and_rest() -> None:
    meter = Meter("x", 1000)
    first = meter.at(0.0, 100)
    assert (first.rate, first.remaining) == (0.0, None)
    second = meter.at(2.0, 300)
    assert (second.rate, second.remaining) == (100.0, 7.0)
    for tick in range(3, 20):
        last = meter.at(float(tick), 300 + (tick - 2) * 10)
    assert last.rate < 20  # the fast beginning is forgotten
    again = meter.at(20.0, 0)
    assert again.rate == 0.0  # begun anew


def test_the_caller_waits_longer_and_longer() -> None:
    assert [backoff(attempt) for attempt in (1, 2, 3, 6, 50)] == [1, 2, 4, 30, 30]


def test_a_url_is_shown_without_what_may_be_secret() -> None:
    assert shown("https://user:pw@host:8/p/x?token=s#f") == "https://host:8/p/x"
