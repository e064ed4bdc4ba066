"""No cancellation is lost in a library's waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from molink_common.cancellation import heeding_cancellation


async def outcome_of(waiting: Callable[[asyncio.Event], Awaitable[None]]) -> asyncio.Task[str]:
    """A task that has been cancelled in the very turn of the loop in which what it waits for has come."""
    event = asyncio.Event()

    async def work() -> str:
        with heeding_cancellation():
            await waiting(event)
        return "worked on"

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    event.set()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=5)
    return task


async def forgets(event: asyncio.Event) -> None:
    """As `asyncio.wait_for` of Python 3.11 does in that turn."""
    try:
        await event.wait()
        await asyncio.sleep(1)
    except asyncio.CancelledError:
        return


async def breaks(event: asyncio.Event) -> None:
    try:
        await event.wait()
        await asyncio.sleep(1)
    except asyncio.CancelledError:
        raise OSError("closed") from None


async def waits(event: asyncio.Event) -> None:
    await event.wait()
    await asyncio.sleep(1)


async def asks_in_time(event: asyncio.Event) -> None:
    await event.wait()
    await asyncio.wait_for(asyncio.sleep(1), 5)


@pytest.mark.parametrize("waiting", [forgets, breaks, waits, asks_in_time])
async def test_whoever_was_cancelled_ends(waiting: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    assert (await outcome_of(waiting)).cancelled()


async def test_results_and_errors_pass_where_nobody_was_cancelled() -> None:
    with heeding_cancellation():
        await asyncio.sleep(0)
    with pytest.raises(OSError, match="gone"), heeding_cancellation():
        raise OSError("gone")


async def test_a_time_limit_inside_is_no_cancellation() -> None:
    with pytest.raises(TimeoutError), heeding_cancellation():
        async with asyncio.timeout(0.01):
            await asyncio.sleep(5)


async def test_who_cleans_up_after_a_cancellation_may_still_ask() -> None:
    asked: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(5)
        finally:
            with heeding_cancellation():
                await asyncio.sleep(0)
            asked.append("released")

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=5)
    assert asked == ["released"]
    assert task.cancelled()
