"""Values for the tests of the head's decisions."""

from __future__ import annotations

from typing import Any

from molink_common.identity import sequence_id
from molink_common.messages import FinishReason, StartSequence, StepTokens, TokenEvent
from molink_common.sampling import SamplingOptions
from molink_common.wire import Logits
from molink_stage_worker.batch_plan import BatchLimits, BatchPlan, StepPlan
from molink_stage_worker.batching import Batcher

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def batcher(*, micro_batches: int = 1, separate: bool = False, chunk_tokens: int = 10**6, **limits: Any) -> Batcher:
    plan = BatchPlan(
        micro_batches=micro_batches, chunk_tokens=chunk_tokens, chunks_under_way=2, separate_prefill=separate
    )
    return Batcher(BatchLimits(**{"num_blocks": 100, "block_size": 4, "step_tokens": 16, **limits}), plan)


def start(number: int, prompt: int, new: int = 50, trace: str | None = None) -> StartSequence:
    return StartSequence(
        pipeline=1,
        epoch=1,
        sequence=sequence_id(number),
        prompt=tuple(range(100, 100 + prompt)),
        options=SamplingOptions(max_tokens=new),
        trace=trace,
    )


def result(plan: StepPlan, indices: dict[int, int], finish: FinishReason | None = None) -> StepTokens:
    """A token 7 for each entry that wants one; `indices` counts them by sequence."""
    events = []
    for entry in plan.entries:
        if entry.logits is Logits.LAST:
            index = indices.get(entry.sequence, 0)
            indices[entry.sequence] = index + 1
            events.append(TokenEvent(sequence=sequence_id(entry.sequence), index=index, token=7, finish=finish))
    return StepTokens(pipeline=1, epoch=1, step=plan.step, events=tuple(events))


def plan_of(head: Batcher) -> StepPlan:
    plan = head.next_step()
    assert plan is not None
    head.check_invariants()
    return plan


def shape(plan: StepPlan) -> list[tuple[int, int, int, Logits]]:
    return [(entry.sequence, entry.start, entry.count, entry.logits) for entry in plan.entries]
