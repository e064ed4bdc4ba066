"""Order, patience and ends of a request's tokens."""

from __future__ import annotations

import asyncio

import pytest

from molink_common.messages import FinishReason, TokenEvent
from molink_gateway.api_errors import ApiError
from molink_gateway.mailbox import Mailbox, Patience

A, B = "a" * 16, "b" * 16


def event(index: int, *, sequence: str = A, finish: FinishReason | None = None) -> TokenEvent:
    return TokenEvent(sequence=sequence, index=index, token=index, finish=finish)


def mailbox(*sequences: str, queue_s: float = 5, stall_s: float = 5, gap_s: float = 5) -> Mailbox:
    patience = Patience(queue_timeout_s=queue_s, stall_timeout_s=stall_s, gap_timeout_s=gap_s)
    return Mailbox(sequences or (A,), patience)


async def test_tokens_come_in_order_and_once() -> None:
    box = mailbox()
    for index in (1, 0, 0, 1, 3, 2, 2):
        box.put(event(index))
    assert [(choice, one.index) for choice, one in await box.take(1)] == [(0, 0), (0, 1), (0, 2), (0, 3)]


async def test_a_gap_is_not_shown_and_ends_in_an_error() -> None:
    box = mailbox(gap_s=0.02)
    box.put(event(0))
    box.put(event(2))
    assert [one.index for _, one in await box.take(1)] == [0]
    with pytest.raises(ApiError, match="lost") as caught:
        await box.take(1)
    assert caught.value.status == 503


async def test_choices_are_told_apart() -> None:
    box = mailbox(A, B)
    box.put(event(0, sequence=B))
    box.put(event(0, sequence=A))
    assert [choice for choice, _ in await box.take(1)] == [1, 0]


async def test_waiting_for_the_first_token_is_more_patient() -> None:
    box = mailbox(queue_s=0.06, stall_s=0.01)
    assert await box.take(0.02) == []
    with pytest.raises(ApiError, match="first token"):
        await box.take(1)
    box = mailbox(queue_s=5, stall_s=0.01)
    box.put(event(0))
    await box.take(1)
    with pytest.raises(ApiError, match="further token"):
        await box.take(1)


async def test_tokens_come_before_the_error() -> None:
    box = mailbox()
    box.put(event(0))
    box.close(ApiError(503, "over"))
    assert len(await box.take(1)) == 1
    with pytest.raises(ApiError, match="over"):
        await box.take(1)


async def test_what_has_ended_cannot_fail() -> None:
    box = mailbox(A, B)
    box.put(event(0, sequence=A, finish=FinishReason.STOP))
    box.fail(A, ApiError(503, "too late"))
    assert box.has_ended(A)
    assert not box.has_ended(B)
    await box.take(1)
    assert await box.take(0.01) == []
    box.fail(B, ApiError(503, "in time"))
    with pytest.raises(ApiError, match="in time"):
        await box.take(1)


async def test_what_was_cancelled_is_not_listened_to() -> None:
    box = mailbox()
    box.end(A)
    box.put(event(0))
    assert await box.take(0.01) == []


async def test_holes_and_silences_are_doubted_less_and_less_often() -> None:
    doubted: list[str] = []
    patience = Patience(queue_timeout_s=9, stall_timeout_s=9, gap_timeout_s=9, doubt_hole_s=0.02, doubt_silence_s=0.03)
    box = Mailbox((A, B), patience, doubted.append)
    while not doubted:
        assert await box.take(0.05) == []
    assert set(doubted) == {A, B}
    box.put(event(0, sequence=B, finish=FinishReason.STOP))
    assert len(await box.take(1)) == 1
    doubted.clear()
    began_s = asyncio.get_running_loop().time()
    box.put(event(1))
    while len(doubted) < 3:
        assert await box.take(0.05) == []
    assert doubted == [A, A, A]
    assert asyncio.get_running_loop().time() - began_s >= 0.02 + 0.04 + 0.08 - 0.01


async def test_what_the_scheduler_has_fills_the_hole_and_no_more() -> None:
    box = mailbox()
    for index in (0, 3):
        box.put(event(index))
    assert len(await box.take(1)) == 1
    box.fill(A, (0, 1, 2, 3, 4), FinishReason.LENGTH)
    items = await box.take(1)
    assert [(one.index, one.finish) for _, one in items] == [(1, None), (2, None), (3, None), (4, FinishReason.LENGTH)]
    assert box.has_ended(A)
    assert box.num_in_order(A) == 5


async def test_who_may_come_back() -> None:
    box = mailbox()
    assert not box.runs_on
    box.outlives_client = True
    assert box.runs_on
    box.interrupt(ApiError(503, "stopping"))
    assert box.runs_on
    with pytest.raises(ApiError, match="stopping"):
        await box.take(1)
    box = mailbox(queue_s=0.01)
    box.outlives_client = True
    with pytest.raises(ApiError, match="first token"):
        await box.take(1)
    assert not box.runs_on
    box.interrupt(ApiError(503, "stopping"))
    assert not box.runs_on
