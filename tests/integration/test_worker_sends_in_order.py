"""Whether the socket has room at the moment or not: what a stage sends arrives whole and in the order of sending."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import pytest

from molink_common import messages, subjects
from molink_common.bus import Incoming, NatsBus, Payload
from molink_common.messages import AssignStage, Dtype, LinkCodec, PipelinePolicy, Scheduling, StepTokens, TokenEvent
from molink_common.wire import Traffic
from molink_stage_worker.codec_choice import CodecChoice
from molink_stage_worker.stage_link import StageLink
from molink_stage_worker.stage_step import StageResult
from molink_stage_worker.token_outbox import TokenOutbox

STEPS = 300
PIPELINE = 7


def place(index: int, scheduling: Scheduling = Scheduling.ADAPTIVE) -> AssignStage:
    return AssignStage(
        pipeline=PIPELINE, epoch=1, fingerprint="f" * 16, index=index, num_stages=2, first_layer=index,
        last_layer=index + 1, dtype=Dtype.FLOAT32, num_blocks=8, block_size=16,
        policy=PipelinePolicy(scheduling=scheduling),
    )  # fmt: skip


@pytest.fixture
def seldom_at_once(bus: NatsBus, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The socket has room every other time, by chance. Gives the answers."""
    chance = random.Random(5)
    answers: list[bool] = []
    send = bus.publish_at_once

    def publish_at_once(subject: str, data: Payload) -> bool:
        answers.append(chance.random() < 0.5 and send(subject, data))
        return answers[-1]

    monkeypatch.setattr(bus, "publish_at_once", publish_at_once)
    return answers


class Seen:
    """What arrives on a subject."""

    def __init__(self) -> None:
        self.all: list[bytes] = []
        self._is_all = asyncio.Event()

    async def note(self, incoming: Incoming) -> None:
        self.all.append(incoming.data)
        if len(self.all) == STEPS:
            self._is_all.set()

    async def until_all(self) -> None:
        await asyncio.wait_for(self._is_all.wait(), 5)


def tokens_of(step: int) -> StageResult:
    event = TokenEvent(sequence="0" * 16, index=step, token=1)
    tokens = StepTokens(pipeline=PIPELINE, epoch=1, step=step, events=(event,))
    return StageResult(payload=messages.encode(tokens), step=step, tokens=tokens)


async def test_tokens(bus: NatsBus, seldom_at_once: list[bool]) -> None:
    seen = Seen()
    subscription = await bus.subscribe(subjects.tokens(PIPELINE), seen.note)
    outbox = TokenOutbox(bus, place(1))
    sending = asyncio.create_task(outbox.run())
    chance = random.Random(6)
    for step in range(1, STEPS + 1):
        outbox.put(tokens_of(step))
        if chance.random() < 0.5:
            await asyncio.sleep(0)
    await seen.until_all()
    sending.cancel()
    await subscription.close()
    assert {True, False} <= set(seldom_at_once)
    assert [messages.decode(data, StepTokens).step for data in seen.all] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("scheduling", list(Scheduling))
async def test_frames(bus: NatsBus, seldom_at_once: list[bool], scheduling: Scheduling) -> None:
    seen = Seen()
    subscription = await bus.subscribe(subjects.stage(PIPELINE, 1), seen.note)
    lost: list[int] = []
    own = place(0, scheduling)
    link = StageLink(bus=bus, bulk_bus=bus, place=own, codecs=CodecChoice(LinkCodec.RAW), on_lost=lost.append)
    sending = asyncio.create_task(link.run())
    chance = random.Random(7)
    for step in range(1, STEPS + 1):
        link.offer(step, Traffic.DECODE, step.to_bytes(4, "big") * 50)
        if chance.random() < 0.5:
            await asyncio.sleep(0)
    await seen.until_all()
    sending.cancel()
    with suppress(asyncio.CancelledError):
        await sending
    await subscription.close()
    assert {True, False} <= set(seldom_at_once)
    assert not lost
    assert [int.from_bytes(data[:4], "big") for data in seen.all] == list(range(1, STEPS + 1))
    assert all(len(data) == 200 for data in seen.all)
