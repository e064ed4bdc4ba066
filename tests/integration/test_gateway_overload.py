"""Overload at the gateway: what the client reads, and how little a flood costs."""

from __future__ import annotations

import asyncio

import httpx

from molink_common.messages import RefusalCode, Refused, SubmitSequence
from tests.integration.test_gateway_pool import FakePool

CHAT = "/v1/chat/completions"
BODY = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}


class Overloaded:
    """Refuses everything, and counts how often it is asked."""

    def __init__(self, holds_s: float | None) -> None:
        self.asked = 0
        self.holds_s = holds_s

    def __call__(self, submit: SubmitSequence) -> Refused:
        self.asked += 1
        return Refused(
            sequence=submit.sequence,
            code=RefusalCode.OVERLOADED,
            message="the first token would come in about 30 s",
            retry_after_s=3.2,
            holds_s=self.holds_s,
        )


async def test_a_refusal_that_holds_is_repeated_without_asking(http: httpx.AsyncClient, pool: FakePool) -> None:
    pool.refusal = overloaded = Overloaded(holds_s=600.0)
    answers = [await http.post(CHAT, json=BODY)]
    answers += await asyncio.gather(*(http.post(CHAT, json=BODY) for _ in range(20)))
    answers.append(await http.post(CHAT, content=b"not even JSON"))
    assert {answer.status_code for answer in answers} == {429}
    assert {answer.headers["retry-after"] for answer in answers} == {"4"}
    assert {answer.json()["error"]["code"] for answer in answers} == {"overloaded"}
    assert {answer.json()["error"]["type"] for answer in answers} == {"rate_limit_error"}
    assert overloaded.asked == 1


async def test_a_refusal_that_does_not_hold_is_asked_for_each_time(http: httpx.AsyncClient, pool: FakePool) -> None:
    pool.refusal = overloaded = Overloaded(holds_s=None)
    for _ in range(3):
        assert (await http.post(CHAT, json=BODY)).status_code == 429
    assert overloaded.asked == 3
    pool.refusal = lambda _: None
    assert (await http.post(CHAT, json=BODY)).status_code == 200
