"""Order, patience and ends of a request's tokens."""

from __future__ import annotations

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
