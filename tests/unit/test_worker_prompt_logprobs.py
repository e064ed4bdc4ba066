"""Log probabilities of prompts: what the head asks for, and what the tail makes of it."""

from __future__ import annotations

import pytest
import torch

from molink_common.identity import sequence_id
from molink_common.messages import StartSequence, StepTokens, encode
from molink_common.sampling import MAX_TOP_LOGPROBS, SamplingOptions
from molink_common.wire import Logits
from molink_stage_worker.batch_plan import BatchLimits, BatchPlan, StepPlan
from molink_stage_worker.batching import Batcher
from molink_stage_worker.chunk_choice import MOST_LOGIT_ROWS
from molink_stage_worker.prompt_logprobs import told_by

NAME = sequence_id(1)
SIZE = 60
PROMPT = tuple(range(3, 53))


def head(*, step_tokens: int = 16) -> Batcher:
    plan = BatchPlan(micro_batches=4, chunk_tokens=10**6, chunks_under_way=2, separate_prefill=False)
    return Batcher(BatchLimits(num_blocks=1000, block_size=4, step_tokens=step_tokens), plan)


def start(number: int, prompt: int, *, generated: int = 0, told: int | None = 0) -> StartSequence:
    return StartSequence(
        pipeline=1,
        epoch=1,
        sequence=sequence_id(number),
        prompt=tuple(range(prompt)),
        generated=(7,) * generated,
        options=SamplingOptions(max_tokens=50, prompt_logprobs=told),
    )


def plan_of(batcher: Batcher) -> StepPlan:
    plan = batcher.next_step()
    assert plan is not None
    batcher.check_invariants()
    return plan


def shape(plan: StepPlan) -> list[tuple[int, int, int, Logits]]:
    return [(entry.sequence, entry.start, entry.count, entry.logits) for entry in plan.entries]


def test_every_chunk_of_the_prompt_asks_for_all_rows() -> None:
    batcher = head()
    batcher.add(start(1, prompt=40))
    plans = [plan_of(batcher) for _ in range(3)]
    assert [shape(plan) for plan in plans] == [
        [(1, 0, 16, Logits.ALL)],
        [(1, 16, 16, Logits.ALL)],
        [(1, 32, 8, Logits.ALL)],
    ]
    # chunks in the middle give no token, and none is missed
    for plan in plans[:2]:
        batcher.on_tokens(StepTokens(pipeline=1, epoch=1, step=plan.step))
    assert batcher.report().recomputed == 0
    batcher.on_tokens(StepTokens(pipeline=1, epoch=1, step=plans[2].step))
    assert batcher.report().recomputed == 1
    assert shape(plan_of(batcher)) == [(1, 0, 16, Logits.ALL)]


def test_the_last_token_of_a_prompt_tells_nothing_of_the_prompt() -> None:
    batcher = head()
    batcher.add(start(1, prompt=17))
    batcher.add(start(2, prompt=1))
    assert shape(plan_of(batcher)) == [(1, 0, 16, Logits.ALL)]
    assert {one[0]: one for one in shape(plan_of(batcher))} == {
        1: (1, 16, 1, Logits.LAST),
        2: (2, 0, 1, Logits.LAST),
    }


def test_tokens_generated_before_a_recovery_are_no_prompt() -> None:
    batcher = head()
    batcher.add(start(1, prompt=8, generated=20))
    assert [shape(plan_of(batcher)) for _ in range(2)] == [[(1, 0, 16, Logits.ALL)], [(1, 16, 12, Logits.LAST)]]


def test_a_step_has_so_many_rows_at_most() -> None:
    batcher = head(step_tokens=1000)
    batcher.add(start(1, prompt=100))
    batcher.add(start(2, prompt=100))
    batcher.add(start(3, prompt=300, told=None))
    asked = 0
    for entry in plan_of(batcher).entries:
        assert (entry.logits is Logits.ALL) == (entry.sequence != 3)
        asked += entry.count * (entry.logits is Logits.ALL)
        if entry.sequence == 3:
            assert entry.count == 300
    assert asked == MOST_LOGIT_ROWS


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 49])
def test_a_chunk_tells_what_the_whole_prompt_tells(cut: int) -> None:
    logits_RV = torch.randn(len(PROMPT), SIZE, generator=torch.Generator().manual_seed(3)) * 4
    wanted_RV = torch.log_softmax(logits_RV, dim=-1)
    first = told_by(logits_RV[:cut], sequence=NAME, prompt=PROMPT, start=0, likeliest=3)
    second = told_by(logits_RV[cut:], sequence=NAME, prompt=PROMPT, start=cut, likeliest=3)
    assert first is not None
    assert second is not None
    assert (first.start, second.start) == (1, cut + 1)
    logprobs = [*first.logprobs, *second.logprobs]
    assert logprobs == [float(wanted_RV[place - 1, PROMPT[place]]) for place in range(1, len(PROMPT))]
    best = wanted_RV.topk(3)
    for place, (rank, likeliest) in enumerate(
        zip([*first.ranks, *second.ranks], [*first.likeliest, *second.likeliest], strict=True)
    ):
        assert [one.token for one in likeliest] == best.indices[place].tolist()
        assert [one.logprob for one in likeliest] == best.values[place].tolist()
        assert rank == 1 + int((wanted_RV[place] > wanted_RV[place, PROMPT[place + 1]]).sum())


def test_a_token_that_cannot_be_is_told_as_the_least_number() -> None:
    logits_RV = torch.zeros(1, SIZE)
    logits_RV[0, 8] = -torch.inf
    told = told_by(logits_RV, sequence=NAME, prompt=(5, 8), start=0, likeliest=0)
    assert told is not None
    assert told.logprobs[0] == pytest.approx(-3.4e38)
    assert told.likeliest == ((),)


def test_what_a_step_tells_at_most_fits_into_a_message() -> None:
    logits_RV = torch.randn(MOST_LOGIT_ROWS, 60_000, generator=torch.Generator().manual_seed(3))
    prompt = range(59_000, 59_000 + MOST_LOGIT_ROWS + 1)
    part = told_by(logits_RV, sequence=NAME, prompt=prompt, start=0, likeliest=MAX_TOP_LOGPROBS)
    assert part is not None
    step = StepTokens(pipeline=1, epoch=1, step=1, prompt_logprobs=(part,))
    assert len(encode(step)) < 2**20 // 4  # NATS takes a MiB where nobody says more


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_tell_nothing(value: float) -> None:
    logits_RV = torch.zeros(20, SIZE)
    logits_RV[18, 30] = value
    assert told_by(logits_RV, sequence=NAME, prompt=PROMPT, start=0, likeliest=1) is None
    # rows behind the prompt speak of the answer
    assert told_by(logits_RV, sequence=NAME, prompt=PROMPT[:18], start=0, likeliest=1) is not None
