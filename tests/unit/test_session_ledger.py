"""The ledger: nothing is made unwritten, nothing made is forgotten, nothing released stops the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import trio
import trio.testing

from kenaz_engine.session.ledger import ACQUIRE_BOUND, AcquireTimeout, Left, Made, ReleaseError
from kenaz_engine.session.recorder import RecordLost

Build = Callable[..., Any]
Clock = trio.testing.MockClock


def kinds(session: Any) -> list[tuple[str, str]]:
    return [(r["kind"], r.get("resource", "")) for r in session.journal.records]


async def test_an_acquisition_is_intent_act_acquired(session: Build, autojump_clock: Clock) -> None:
    one = session()
    assert await one.make("disk") == "disk"
    await one.make("vm", uses=("disk", "unknown"))
    assert kinds(one) == [("intent", "disk"), ("acquired", "disk"), ("intent", "vm"), ("acquired", "vm")]
    disk, _, vm, handle = one.journal.records
    assert (disk["id"], disk["type"], disk["intent"], disk["uses"]) == (1, "thing", {"name": "disk"}, [])
    assert (vm["id"], vm["uses"], handle["handle"]) == (2, [1], {"name": "vm"})
    assert one.ledger.last == 2
    held = one.ledger.held("disk")
    assert held is not None
    assert held.handle == {"name": "disk"}
    assert one.ledger.held("unknown") is None


async def test_the_intent_is_written_before_the_act(session: Build, autojump_clock: Clock) -> None:
    one = session()

    async def make() -> tuple[Made, int]:
        assert kinds(one) == [("intent", "disk")]
        return Made({}, trio.lowlevel.checkpoint), 7

    assert await one.ledger.acquire("disk", "thing", {"name": "disk"}, make) == 7


async def test_what_cannot_be_written_down_is_not_made(session: Build, autojump_clock: Clock) -> None:
    one = session()
    one.journal.broken = OSError(28, "No space left on device")
    made = []

    async def make() -> tuple[Made, None]:
        made.append(1)
        return Made({}, trio.lowlevel.checkpoint), None

    with pytest.raises(RecordLost, match="No space left"):
        await one.ledger.acquire("disk", "thing", {"name": "disk"}, make)
    assert made == []
    assert one.ledger.entries == []


async def test_an_acquisition_that_fails_is_released_from_its_intent(
    session: Build, autojump_clock: Clock
) -> None:
    one = session()
    with pytest.raises(OSError, match="no room"):
        await one.make("disk", fails=OSError("no room"))
    assert one.released == ["intent of disk"]
    assert kinds(one) == [("intent", "disk"), ("released", "disk")]
    assert one.ledger.entries == []


async def test_an_acquisition_that_fails_and_cannot_be_released_stays(
    session: Build, autojump_clock: Clock
) -> None:
    async def broken(intent: Mapping[str, Any]) -> None:
        raise OSError("busy")

    one = session(by_intent=broken)
    with pytest.raises(OSError, match="no room"):
        await one.make("disk", fails=OSError("no room"))
    assert one.ledger.left() == [Left(1, "disk", "thing", "busy")]
    assert one.journal.records[-1]["about"] == "release"


async def test_a_cancel_is_heard_after_the_acquisition_not_within(
    session: Build, autojump_clock: Clock
) -> None:
    """From intent to acquired nothing interrupts: a thing that exists is always known."""
    one = session()
    with trio.move_on_after(1) as scope:
        await one.make("disk", takes=3)
    assert scope.cancelled_caught
    assert trio.current_time() == 3
    assert kinds(one) == [("intent", "disk"), ("acquired", "disk")]
    held = one.ledger.held("disk")
    assert held is not None
    assert held.release is not None


async def test_a_cancel_from_before_stops_the_acquisition_unbegun(
    session: Build, autojump_clock: Clock
) -> None:
    one = session()
    with trio.CancelScope() as scope:
        scope.cancel()
        await one.make("disk")
    assert kinds(one) == []


async def test_making_is_bounded(session: Build, autojump_clock: Clock) -> None:
    one = session()
    with pytest.raises(AcquireTimeout, match=f"making the disk took longer than {ACQUIRE_BOUND:g} s"):
        await one.make("disk", takes=1000)
    assert trio.current_time() == ACQUIRE_BOUND
    assert one.released == ["intent of disk"]


async def test_a_cut_ends_an_acquisition(session: Build, autojump_clock: Clock) -> None:
    """The time of the one who acquires is over. What is released without waiting still is."""
    one = session()

    async def make() -> None:
        with pytest.raises(AcquireTimeout, match="making the vm was cut short"):
            await one.make("vm", takes=20)

    await one.make("disk")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make)
        await trio.sleep(2)
        one.ledger.cut()
    assert trio.current_time() == 2
    assert one.released == ["intent of vm"]
    assert [left.resource for left in one.ledger.left()] == ["disk"]


async def test_a_cut_ends_the_release_of_a_failed_acquisition(session: Build, autojump_clock: Clock) -> None:
    async def slow(intent: Mapping[str, Any]) -> None:
        await trio.sleep(4)

    one = session(by_intent=slow)

    async def make() -> None:
        with pytest.raises(AcquireTimeout, match="cut short"):
            await one.make("disk", fails=OSError("no room"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(make)
        await trio.sleep(1)
        one.ledger.cut()
    assert trio.current_time() == 1
    assert one.ledger.left() == [Left(1, "disk", "thing", "was cut short")]


class TestRelease:
    """Giving back."""

    async def test_release_runs_in_reverse_order(self, session: Build, autojump_clock: Clock) -> None:
        one = session()
        for name in ("image", "disk", "vm"):
            await one.make(name)
        assert await one.ledger.release_all(100) == []
        assert one.released == ["vm", "disk", "image"]
        assert [r["id"] for r in one.journal.of("released")] == [3, 2, 1]
        assert await one.ledger.release_all(100) == []

    async def test_one_failure_stops_no_other(self, session: Build, autojump_clock: Clock) -> None:
        one = session()
        await one.make("image")
        await one.make("disk", release_fails=OSError("busy"))
        await one.make("vm", release_fails=ValueError())
        assert await one.ledger.release_all(100) == [
            Left(3, "vm", "thing", "ValueError"),
            Left(2, "disk", "thing", "busy"),
        ]
        assert one.released == ["image"]

    async def test_what_a_leftover_uses_is_kept(self, session: Build, autojump_clock: Clock) -> None:
        """Do not free the disk of a machine that still runs."""
        one = session()
        await one.make("image")
        await one.make("disk", uses=("image",))
        await one.make("other")
        await one.make("vm", uses=("disk",), release_fails=OSError("will not die"))
        left = await one.ledger.release_all(100)
        assert [(x.resource, x.error) for x in left] == [
            ("vm", "will not die"),
            ("disk", "is still used by the vm"),
            ("image", "is still used by the disk"),
        ]
        assert one.released == ["other"]

    async def test_a_hung_release_does_not_starve_the_rest(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        """Each entry has at most an equal share of the time left, capped by its own bound."""
        one = session()
        await one.make("image", release_takes=1)
        await one.make("disk", release_takes=1000, bound=100)
        await one.make("vm", release_takes=1000, bound=2)
        left = await one.ledger.release_all(trio.current_time() + 10)
        assert [(x.resource, x.error) for x in left] == [
            ("vm", "took longer than 2 s"),
            ("disk", "took longer than 4 s"),
        ]
        assert trio.current_time() == 2 + 4 + 1
        assert one.released == ["image"]

    async def test_without_time_left_only_what_does_not_wait_is_released(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        one = session()
        await one.make("disk")
        assert [x.resource for x in await one.ledger.release_all(trio.current_time() - 1)] == ["disk"]

    async def test_what_was_left_can_be_released_later(self, session: Build, autojump_clock: Clock) -> None:
        one = session()
        await one.make("disk", release_takes=3, bound=4)
        assert [x.error for x in await one.ledger.release_all(trio.current_time() + 1)] == [
            "took longer than 1 s"
        ]
        assert await one.ledger.release_all(trio.current_time() + 10) == []
        assert one.ledger.left() == []

    async def test_release_of_one_resource_takes_the_newest(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        one = session()
        await one.make("channel")
        await one.make("channel")
        await one.ledger.release("channel")
        assert [e.id for e in one.ledger.entries] == [1]
        await one.ledger.release("unknown")

    async def test_release_of_one_resource_tells_its_failure(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        one = session()
        await one.make("channel", release_fails=OSError("stuck"))
        with pytest.raises(ReleaseError, match="the channel could not be released: stuck"):
            await one.ledger.release("channel")

    async def test_release_since_gives_back_what_is_newer(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        one = session()
        await one.make("image")
        mark = one.ledger.last
        await one.make("disk")
        await one.make("vm")
        assert await one.ledger.release_since(mark) == []
        assert one.released == ["vm", "disk"]

    async def test_release_is_shielded(self, session: Build, autojump_clock: Clock) -> None:
        one = session()
        await one.make("image", release_takes=1)
        await one.make("disk", release_takes=1)
        with trio.move_on_after(0.5) as scope:
            await one.ledger.release_all(100)
        assert scope.cancelled_caught
        assert one.released == ["disk", "image"]

    async def test_a_cut_ends_a_release_and_keeps_the_rest(
        self, session: Build, autojump_clock: Clock
    ) -> None:
        one = session()
        await one.make("image", release_takes=1)
        await one.make("disk", release_takes=3)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.ledger.release_all, 100)
            await trio.sleep(2)
            one.ledger.cut()
        assert trio.current_time() == 2
        assert [(x.resource, x.error) for x in one.ledger.left()] == [
            ("disk", "was cut short"),
            ("image", "was not released"),
        ]
        one.ledger.cut()

    async def test_two_releases_at_once_are_one(self, session: Build, autojump_clock: Clock) -> None:
        one = session()
        await one.make("disk", release_takes=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.ledger.release_all, 100)
            nursery.start_soon(one.ledger.release, "disk")
        assert len(one.journal.of("released")) == 1

    async def test_an_unknown_kind_is_left(self, session: Build, autojump_clock: Clock) -> None:
        one = session()

        async def make() -> tuple[Made, None]:
            raise OSError("no")

        with pytest.raises(OSError, match="no"):
            await one.ledger.acquire("disk", "mystery", {}, make)
        assert [x.error for x in one.ledger.left()] == ["is a mystery, which this version cannot give back"]
