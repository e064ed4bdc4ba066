"""When the head may plan a step before the present pass has ended."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from molink_common.messages import Dtype, LinkCodec
from molink_common.wire import Entry, Extra, Logits, StepFrame
from molink_stage_worker.codec_choice import CodecChoice
from molink_stage_worker.compute import StageCompute
from molink_stage_worker.engine.interface import StageSpec, StepOutput
from molink_stage_worker.stage_step import StageStep
from tests.batcher_builders import Batcher, batcher, plan_of, result, start
from tests.integration.counting_engine import BLOCK, HIDDEN, LAYERS, CountingEngine


def decoding(count: int, *, micro_batches: int) -> Batcher:
    """So many sequences, each with its first token."""
    head = batcher(micro_batches=micro_batches, separate=True, chunk_tokens=16)
    for number in range(1, count + 1):
        head.add(start(number, prompt=2))
    head.on_tokens(result(plan_of(head), {}))
    return head


def test_a_step_is_full_when_a_micro_batchs_share_is_ready() -> None:
    head = decoding(8, micro_batches=2)
    assert head.has_full_step
    first = plan_of(head)
    assert len(first.entries) == 4
    assert head.has_full_step, "the other four"
    plan_of(head)
    assert not head.has_full_step, "both places are taken"
    head.on_tokens(result(first, dict.fromkeys(range(1, 9), 1)))
    assert head.has_full_step


def test_few_that_are_ready_wait_for_the_others() -> None:
    head = decoding(8, micro_batches=2)
    first = plan_of(head)
    plan_of(head)
    head.plan = replace(head.plan, micro_batches=1)
    head.on_tokens(result(first, dict.fromkeys(range(1, 9), 1)))
    assert not head.has_full_step, "four of eight, and the others are on their way"
    head.plan = replace(head.plan, micro_batches=2)
    assert head.has_full_step


def test_prompts_alone_make_full_chunks() -> None:
    head = batcher(micro_batches=2, separate=True, chunk_tokens=8)
    assert not head.has_full_step
    head.add(start(1, prompt=20))
    plan_of(head)
    assert head.has_full_step, "12 tokens are left"
    plan_of(head)
    assert not head.has_full_step


def test_nothing_is_full_while_the_head_asks_who_listens() -> None:
    head = decoding(4, micro_batches=2)
    head.on_new_epoch(None)
    assert not head.has_full_step


class _Watched(CountingEngine):
    """Looks at how long its pass is said to go on."""

    def __init__(self, spec: StageSpec) -> None:
        super().__init__(spec)
        self.left_s: list[float | None] = []
        self.compute: StageCompute | None = None

    def run(self, *args: Any, **kwargs: Any) -> StepOutput:
        time.sleep(0.002)
        if self.compute is not None:
            self.left_s.append(self.compute.pass_left_s(time.monotonic()))
        time.sleep(0.008)
        return super().run(*args, **kwargs)


def test_the_end_of_a_pass_is_foreseen_from_those_before_it() -> None:
    engine = _Watched(
        StageSpec(
            checkpoint=Path("/nowhere"), first_layer=0, last_layer=1, num_layers=LAYERS, dtype=Dtype.FLOAT32,
            device="cpu", num_blocks=16, block_size=BLOCK,
        )
    )  # fmt: skip
    compute = engine.compute = StageCompute(engine, None, codecs=CodecChoice(LinkCodec.RAW))
    compute.take_place(0, None)
    for position in range(40):
        entry = Entry(
            sequence=1, start=position, count=1, opens=not position, logits=Logits.LAST,
            new_blocks=() if position else tuple(range(16)),
        )  # fmt: skip
        frame = StepFrame(
            pipeline=1, epoch=1, step=position + 1, entries=(entry,), extra=Extra().encode(), hidden_size=HIDDEN,
            dtype=Dtype.FLOAT32, hidden=memoryview(b""),
        )  # fmt: skip
        compute.run([StageStep(frame=frame, extra=Extra(), token_ids=(5,), ready_ns=0)])
    assert engine.left_s[0] is None, "nothing is known of passes"
    assert compute.pass_left_s(time.monotonic()) is None, "there is no pass"
    foreseen = sorted(left_s for left_s in engine.left_s[-20:] if left_s is not None)
    assert 0.004 < foreseen[10] < 0.05, "a fifth of some 10 ms has gone"
