"""What drivers share: bounded logs, consoles, and background tasks."""

import pytest
import trio
import trio.testing

from kenaz_drivers._common.background import open_background
from kenaz_drivers._common.output import Console, LogTail, describe_end


def test_a_tail_keeps_the_last_lines_whatever_the_chunks():
    tail = LogTail(lines=3)
    for chunk in (b"one\ntw", b"o\n\nthree\nfo", b"ur"):
        tail.feed(chunk)
    assert tail.lines() == ("two", "three", "four")
    assert tail.lines() == ("two", "three", "four")
    tail.feed(b"!\n")
    assert tail.lines() == ("two", "three", "four!")


def test_a_tail_is_bounded_and_printable():
    tail = LogTail(lines=2, width=10)
    tail.feed(b"x" * 100_000 + b"the end\r\n" + b"\x1b[31mred\xff\n")
    assert tail.lines() == ("xxxthe end", "[31mred\N{REPLACEMENT CHARACTER}")
    tail.feed(b"y" * 100_000)
    assert tail.lines() == ("[31mred\N{REPLACEMENT CHARACTER}", "y" * 10)
    tail.feed(b"\n" * 1000)
    assert len(tail._rest) == 0


def test_an_end_is_told_by_signal_or_code_and_last_words():
    assert describe_end("QEMU", -9) == "SIGKILL killed QEMU"
    assert describe_end("QEMU", -62, ["last"]) == "signal 62 killed QEMU"  # of real time: it has no name
    assert describe_end("QEMU", 1) == "QEMU ended with code 1"
    assert describe_end("QEMU", 1, ["first", "last"]) == "QEMU ended with code 1: last"


async def test_a_console_ends_without_an_error():
    ours, theirs = trio.testing.memory_stream_one_way_pair()
    await ours.send_all(b"hello")
    console = Console(theirs)
    assert await console.__anext__() == b"hello"
    await ours.aclose()
    assert [data async for data in console] == []
    await theirs.aclose()
    assert [data async for data in console] == []


async def test_background_tasks_outlive_a_cancellation_until_the_body_is_left():
    seen = []

    async def task():
        try:
            await trio.sleep_forever()
        finally:
            seen.append("ended")

    with trio.CancelScope() as scope:
        async with open_background() as background:
            background.start_soon(task)
            background.start_soon(trio.lowlevel.checkpoint)
            scope.cancel()
            with trio.CancelScope(shield=True):
                await trio.testing.wait_all_tasks_blocked()
            assert seen == []
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert seen == ["ended"]


async def test_an_error_of_the_body_comes_out_as_it_is():
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught:
        async with open_background() as background:
            background.start_soon(trio.sleep_forever)
            raise error
    assert caught.value is error


async def test_an_error_of_the_body_is_not_lost_to_a_cancellation():
    with trio.CancelScope() as scope, pytest.raises(KeyError):
        async with open_background() as background:
            background.start_soon(trio.sleep_forever)
            scope.cancel()
            raise KeyError


async def test_an_error_of_a_task_is_not_swallowed():
    async def broken():
        raise LookupError("a bug")

    with pytest.RaisesGroup(LookupError) if hasattr(pytest, "RaisesGroup") else pytest.raises(ExceptionGroup):
        async with open_background() as background:
            background.start_soon(broken)
            await trio.sleep_forever()
