"""Decisions about a download: what is asked for, what an answer means, which mirror is next. Pure.

Whoever waits long is somebody else: within a session the lifecycle's `retry`, which is in the journal, and on
the command line `image pull`. Here a mirror that fails is left for the next one, a transfer that broke off is
taken up where it stopped, and a server that says when to come again is obeyed if that is soon.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum
from urllib.parse import urlsplit, urlunsplit

SOON = 30.0
"""Seconds that a server may ask us to wait, for us to do so."""
WAITS = 3
"""How often a server is obeyed that asks us to wait."""

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.ASCII)
_NUMBER = re.compile(r"\d{1,18}", re.ASCII)
# Those of which RFC 9110 and 6585 say, or practice shows, that a later request may be answered.
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})


@dataclass(frozen=True, slots=True)
class Have:
    """What an earlier attempt left: so many bytes, of what `url` had then, by its validators."""

    size: int = 0
    url: str = ""
    etag: str = ""
    modified: str = ""

    @property
    def validator(self) -> str:
        """What can stand in If-Range: a strong ETag, else the time of the last change; else nothing."""
        if self.etag.startswith('"'):
            return self.etag
        return self.modified


def request_headers(have: Have, url: str) -> dict[str, str]:
    """What a request for `url` says: bytes as they are, and only those that are not here yet.

    If-Range guards against a file that has changed since. Another mirror's file cannot be guarded so; the
    digest of the whole, in the end, can.
    """
    headers = {"Accept-Encoding": "identity"}
    if have.size:
        headers["Range"] = f"bytes={have.size}-"
        if have.url == url and have.validator:
            headers["If-Range"] = have.validator
    return headers


class Take(Enum):
    """What is done with the body of an answer."""

    WHOLE = "it is all of it: begin anew"
    REST = "it is the rest: append"
    NOTHING = "what we have does not fit any more: throw it away and ask for all"
    FAILED = "it is an error"


@dataclass(frozen=True, slots=True)
class Answer:
    """What an answer means. With FAILED: why, whether later may be better, and in how many seconds."""

    take: Take
    why: str = ""
    transient: bool = False
    after: float | None = None


def judge(
    status: int, headers: Mapping[str, str], have: Have, size: int, *, ranged: bool, now: float
) -> Answer:
    """What the head of an answer means for a file of `size` bytes. `headers` have lower-case names; `ranged`
    says whether a range was asked for; `now` is the time in seconds."""
    if headers.get("content-encoding", "identity") not in ("", "identity"):
        return Answer(Take.FAILED, f"the server packs it as {headers['content-encoding']}, unasked")
    if status == 200:
        length = headers.get("content-length", "")
        if _NUMBER.fullmatch(length) and int(length) != size:
            return Answer(Take.FAILED, f"has {length} bytes, and {size} are promised")
        return Answer(Take.WHOLE)
    if status == 206 and ranged:
        found = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
        fits = found is not None and int(found[1]) == have.size and found[3] in ("*", str(size))
        return Answer(Take.REST if fits else Take.NOTHING)
    if status == 416 and ranged:
        return Answer(Take.NOTHING)
    after = retry_after(headers.get("retry-after", ""), now) if status in (429, 503) else None
    return Answer(Take.FAILED, f"status {status}", status in _TRANSIENT, after)


def retry_after(text: str, now: float) -> float | None:
    """Seconds in the header Retry-After, which has a number or a date; None for neither."""
    from email.utils import parsedate_to_datetime

    text = text.strip()
    if _NUMBER.fullmatch(text):
        return float(text)
    try:
        date: datetime = parsedate_to_datetime(text)
        return max(0.0, date.timestamp() - now)
    except (TypeError, ValueError, OverflowError):
        return None


@dataclass(frozen=True, slots=True)
class Patience:
    """What a server is given: seconds to be reached in, and `window` seconds for each `least` bytes; one that
    is slower is taken for stalled."""

    connect: float = 15.0
    window: float = 30.0
    least: int = 32 << 10


class Kind(Enum):
    """How an attempt at a mirror ended."""

    BROKEN = "it failed in a way that may pass"
    REFUSED = "it failed for good"
    CHANGED = "what we had does not fit what the mirror has"
    DAMAGED = "all came, and it is not what was promised"


@dataclass(frozen=True, slots=True)
class Ended:
    """An attempt that did not bring the file. `reached` is the most bytes that were here at a time; `resumed`
    says that an earlier attempt had brought a part of them."""

    kind: Kind
    why: str
    reached: int = 0
    resumed: bool = False
    after: float | None = None


@dataclass(frozen=True, slots=True)
class Course:
    """The way through the mirrors. The first of `urls` is asked next, after `wait` seconds; where none is
    left, it has failed, and `failures` say why."""

    urls: tuple[str, ...]
    wait: float = 0.0
    anew: bool = False
    failures: tuple[str, ...] = ()
    transient: bool = False
    untrusted: bool = False
    _reached: int = 0
    _waits: int = 0
    _renewed: frozenset[str] = field(default=frozenset())

    def on(self, ended: Ended) -> Course:
        """The way on after an attempt at the first mirror has ended so. It is of bounded length: a mirror is
        asked again only for more bytes than there ever were, for a wait that it asked for, or once from the
        beginning."""
        here, *others = self.urls
        reached = max(self._reached, ended.reached)
        at = replace(self, wait=0.0, anew=False, _reached=reached)
        stale = ended.kind is Kind.CHANGED or (ended.kind is Kind.DAMAGED and ended.resumed)
        if stale and here not in self._renewed:
            return replace(at, anew=True, _renewed=self._renewed | {here})
        if ended.kind is Kind.BROKEN:
            if reached > self._reached:
                return at
            soon = ended.after is not None and ended.after <= SOON
            if soon and not others and self._waits < WAITS:
                assert ended.after is not None
                return replace(at, wait=ended.after, _waits=self._waits + 1)
        return replace(
            at,
            urls=tuple(others),
            anew=ended.kind in (Kind.DAMAGED, Kind.CHANGED),
            failures=(*self.failures, f"{shown(here)}: {ended.why}"),
            transient=self.transient or ended.kind is Kind.BROKEN,
            untrusted=self.untrusted or ended.kind is Kind.DAMAGED,
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a file is: bytes, bytes a second (0: not known yet), seconds that are left (None: not known).
    `waiting`: another launcher fetches it."""

    file: str
    done: int
    total: int
    rate: float = 0.0
    remaining: float | None = None
    waiting: bool = False


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that a person should see: which mirror failed, and why."""

    text: str


Watch = Callable[[Progress | Notice], object]
"""Is told how a fetch goes."""


@dataclass(slots=True)
class Meter:
    """The rate of a transfer, over the last few seconds."""

    file: str
    total: int
    waiting: bool = False
    _marks: list[tuple[float, int]] = field(default_factory=list)

    def at(self, now: float, done: int) -> Progress:
        """How far it is when `done` bytes are here at `now` (seconds, of any clock)."""
        marks = self._marks
        if marks and done < marks[-1][1]:
            marks.clear()
        if not marks or now - marks[-1][0] >= _STEP:
            marks.append((now, done))
        while len(marks) > 2 and now - marks[0][0] > _SPAN:
            del marks[0]
        then, before = marks[0]
        rate = (done - before) / (now - then) if now > then else 0.0
        remaining = (self.total - done) / rate if rate > 0 else None
        return Progress(self.file, done, self.total, rate, remaining, self.waiting)


_STEP = 0.2
_SPAN = 5.0


def shown(url: str) -> str:
    """A URL for people and journals: without a password, and without a query, which may be one."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def backoff(attempt: int) -> float:
    """Seconds to wait after the attempt of that number (from 1) has failed: 1, 2, 4 ... 30."""
    return float(min(30, 2 ** (attempt - 1)))
