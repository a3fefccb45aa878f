"""The inbox: what is taken when, and in which order."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import trio
import trio.testing

from kenaz_engine.lifecycle.machine import Event
from kenaz_engine.session.inbox import SIMULTANEOUS, Inbox


def drain(inbox: Inbox) -> list[str]:
    kinds = []
    while (event := inbox.take_nowait()) is not None:
        kinds.append(event.type)
    return kinds


async def test_events_are_taken_in_the_order_in_which_they_were_put() -> None:
    inbox = Inbox()
    for kind in ("done", "abort", "zork"):
        inbox.put(Event(kind))
    assert drain(inbox) == ["done", "abort", "zork"]


async def test_events_after_the_limit_wait(autojump_clock: trio.testing.MockClock) -> None:
    """One stamped at the limit is before it: that is what makes an event precede a timer of its moment."""
    inbox = Inbox()
    start = trio.current_time()
    await trio.sleep(1)
    inbox.put(Event("at"))
    await trio.sleep(1)
    inbox.put(Event("after"))
    at = inbox.take_nowait(until=start + 1)
    assert at is not None
    assert at.type == "at"
    assert inbox.take_nowait(until=start + 1) is None
    assert inbox.holds("after")
    assert not inbox.holds("at")


async def test_waiting_ends_with_the_next_event_or_at_the_limit(
    autojump_clock: trio.testing.MockClock,
) -> None:
    inbox = Inbox()
    start = trio.current_time()

    async def put() -> None:
        await trio.sleep(2)
        inbox.put(Event("done"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(put)
        await inbox.wait()
        assert trio.current_time() == start + 2
    await inbox.wait(until=start + 5)
    assert trio.current_time() == start + 5


@pytest.mark.parametrize("reverse", [False, True])
async def test_simultaneous_events_have_a_fixed_order_on_virtual_time(
    autojump_clock: trio.testing.MockClock, reverse: bool
) -> None:
    inbox = Inbox(settle=True)
    kinds = [*SIMULTANEOUS, "a.first", "b.second"]
    for kind in reversed(kinds) if reverse else kinds:
        inbox.put(Event(kind))
    await trio.sleep(1)
    inbox.put(Event("abort"))
    assert drain(inbox) == [*kinds, "abort"]


async def test_simultaneous_events_of_one_kind_have_a_fixed_order_on_virtual_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    events = [Event("end", {"by": "signal"}), Event("end", {"by": "control"}), Event("end", id=3)]
    orders: set[tuple[Any, ...]] = set()
    for permutation in itertools.permutations(events):
        inbox = Inbox(settle=True)
        for event in permutation:
            inbox.put(event)
        orders.add(tuple((e.id, e.data.get("by")) for _ in events if (e := inbox.take_nowait())))
    assert orders == {((None, "control"), (None, "signal"), (3, None))}


async def test_settling_lets_all_others_run_first_on_virtual_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    inbox = Inbox(settle=True)

    async def put_late() -> None:
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        inbox.put(Event("late"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(put_late)
        await inbox.settle()
        assert inbox.holds("late")
    await Inbox().settle()


async def test_simultaneous_events_can_be_taken_the_other_way_round(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Only where stamps are equal; `ties` counts how often they were."""
    inbox = Inbox(settle=True, opposite=True)
    for kind in ("done", "abort", "vm.exited"):
        inbox.put(Event(kind))
    await trio.sleep(1)
    inbox.put(Event("end"))
    assert [stamped.event.type for stamped in inbox.waiting] == ["done", "abort", "vm.exited", "end"]
    assert drain(inbox) == ["done", "vm.exited", "abort", "end"]
    assert inbox.ties == 2
    assert inbox.waiting == ()
