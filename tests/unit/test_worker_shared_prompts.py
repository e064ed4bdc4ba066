"""Prompts that begin with what others have left in KV blocks, or are computing: the head's batcher."""

from __future__ import annotations

from molink_common.identity import sequence_id
from molink_common.messages import FinishReason, StartSequence, StepTokens, TokenEvent
from molink_common.sampling import SamplingOptions
from molink_common.wire import Logits
from molink_stage_worker.batch_plan import BatchLimits, BatchPlan, StepPlan
from molink_stage_worker.batching import Batcher

BLOCK = 4
SYSTEM = tuple(range(100, 114))
"""Three full blocks and a half."""


def batcher(*, num_blocks: int = 40, micro_batches: int = 2) -> Batcher:
    plan = BatchPlan(micro_batches=micro_batches, chunk_tokens=100, chunks_under_way=2, separate_prefill=False)
    limits = BatchLimits(num_blocks=num_blocks, block_size=BLOCK, step_tokens=16, prefix_secret=b"secret")
    return Batcher(limits, plan)


def start(number: int, prompt: tuple[int, ...], *, tenant: str = "", tells: bool = False) -> StartSequence:
    options = SamplingOptions(max_tokens=50, prompt_logprobs=1 if tells else None)
    return StartSequence(
        pipeline=1, epoch=1, sequence=sequence_id(number), prompt=prompt, options=options, tenant=tenant
    )


def plan_of(head: Batcher) -> StepPlan:
    plan = head.next_step()
    assert plan is not None
    head.check_invariants()
    return plan


def returns(
    head: Batcher,
    plan: StepPlan,
    *,
    told: dict[int, int] | None = None,
    ends: bool = False,
    refused: tuple[int, ...] = (),
) -> None:
    """The step comes back. `told`: how many tokens sequences had been told before."""
    events = tuple(
        TokenEvent(
            sequence=sequence_id(entry.sequence),
            index=(told or {}).get(entry.sequence, 0),
            token=7,
            finish=FinishReason.STOP if ends else None,
        )
        for entry in plan.entries
        if entry.logits is Logits.LAST and entry.sequence not in refused
    )
    names = tuple(sequence_id(number) for number in refused)
    head.on_tokens(StepTokens(pipeline=1, epoch=1, step=plan.step, events=events, refused=names))
    head.check_invariants()


def begun(plan: StepPlan) -> list[tuple[int, int, int]]:
    """Who opens where, and what the tail is told of it."""
    told = {opening.sequence: opening.cached_tokens for opening in plan.opens}
    return [(one.sequence, one.start, told[sequence_id(one.sequence)]) for one in plan.entries if one.opens]


def after_one(head: Batcher, *, ends: bool = True, tenant: str = "") -> StepPlan:
    """The first step of a sequence with the prompt `SYSTEM`, which has come back."""
    head.add(start(1, SYSTEM, tenant=tenant))
    plan = plan_of(head)
    returns(head, plan, ends=ends)
    return plan


def test_a_prompt_begins_with_what_one_before_it_has_left() -> None:
    head = batcher()
    first = after_one(head)
    assert begun(first) == [(1, 0, 0)]
    assert (head.report().free_blocks, head.report().cached_blocks) == (40, 3)
    head.add(start(2, (*SYSTEM, 1, 2, 3)))
    second = plan_of(head)
    assert begun(second) == [(2, 12, 12)]
    assert second.token_ids == (112, 113, 1, 2, 3)
    assert second.entries[0].new_blocks[:3] == first.entries[0].new_blocks[:3]
    assert len(second.entries[0].new_blocks) == 5
    assert (head.report().prefix_queries_tokens, head.report().prefix_hits_tokens) == (14 + 17, 12)


def test_a_prompt_begins_with_what_one_that_runs_has_on_every_stage() -> None:
    head = batcher()
    head.add(start(1, SYSTEM * 2))
    first, second = plan_of(head), plan_of(head)
    returns(head, first)
    head.add(start(2, SYSTEM * 2))
    returns(head, second)
    third = plan_of(head)
    assert begun(third) == [(2, 24, 24)]  # 28 tokens are there; one must be computed to have logits


def test_what_is_on_its_way_is_not_known_yet() -> None:
    head = batcher()
    head.add(start(1, SYSTEM))
    plan_of(head)
    head.add(start(2, SYSTEM))
    assert begun(plan_of(head)) == [(2, 0, 0)]


def test_one_that_waits_for_its_turn_begins_with_what_became_known_meanwhile() -> None:
    head = batcher(micro_batches=1)
    head.add(start(1, SYSTEM))
    first = plan_of(head)
    head.add(start(2, SYSTEM))
    assert head.next_step() is None
    assert head.report().running == 2  # with blocks of its own
    head.add(start(3, SYSTEM))
    returns(head, first)
    assert begun(plan_of(head)) == [(2, 12, 12), (3, 12, 12)]


def test_tenants_share_nothing() -> None:
    head = batcher()
    after_one(head, tenant="one")
    head.add(start(2, SYSTEM, tenant="other"))
    head.add(start(3, SYSTEM, tenant="one"))
    opened = begun(plan_of(head))
    while len(opened) < 2:  # a tenant's first prompt may go by itself
        opened += begun(plan_of(head))
    assert sorted(opened) == [(2, 0, 0), (3, 12, 12)]


def test_who_asks_for_log_probabilities_of_the_prompt_computes_it() -> None:
    head = batcher()
    after_one(head)
    head.add(start(2, SYSTEM, tells=True))
    second = plan_of(head)
    assert begun(second) == [(2, 0, 0)]
    returns(head, second)
    assert not set(second.entries[0].new_blocks[:4]) & {0, 1, 2}


def test_engines_that_can_only_go_on_share_nothing() -> None:
    head = batcher()
    head.can_rewind = False
    after_one(head)
    assert head.report().cached_blocks == 0
    head.add(start(2, SYSTEM))
    assert begun(plan_of(head)) == [(2, 0, 0)]


def sharing(head: Batcher) -> None:
    """1 and 2 run and have three blocks in common; 2 has told a token too."""
    after_one(head, ends=False)
    head.add(start(2, (*SYSTEM, 1, 2, 3)))
    shared = plan_of(head)
    assert begun(shared) == [(2, 12, 12)]
    returns(head, shared, told={1: 1})
    assert head.report().running == 2


def shape(plan: StepPlan) -> list[tuple[int, int, int]]:
    return [(entry.sequence, entry.start, entry.count) for entry in plan.entries]


def test_where_all_is_computed_anew_nobody_writes_where_another_reads() -> None:
    head = batcher()
    sharing(head)
    head.on_new_epoch(None)
    head.check_invariants()
    assert head.report().waiting == 1, "it has no blocks of its own"
    returns(head, plan_of(head))
    entries = [*plan_of(head).entries, *plan_of(head).entries]
    assert {entry.sequence: entry.start for entry in entries if entry.opens} == {1: 0, 2: 0}
    given = [block for entry in entries for block in entry.new_blocks]
    assert len(given) == len(set(given))


def test_what_two_have_in_common_is_rebuilt_once() -> None:
    head = batcher()
    sharing(head)
    head.on_new_epoch(1)
    head.check_invariants()
    assert head.report().waiting == 0
    returns(head, plan_of(head))
    first = plan_of(head)
    assert (first.rebuild, shape(first)) == (1, [(1, 0, 15)])
    returns(head, first)
    second = plan_of(head)
    assert (second.rebuild, shape(second)) == (1, [(2, 12, 5)])
    assert second.entries[0].new_blocks[:3] == first.entries[0].new_blocks[:3]
    returns(head, second)
    report = head.report()
    assert (report.rebuilt, report.recomputed, report.preemptions) == (2, 0, 0)
    assert (2, 17, 1) in shape(plan_of(head))


def test_of_a_second_loss_only_what_the_first_one_left_is_rebuilt() -> None:
    head = batcher()
    sharing(head)
    head.on_new_epoch(1)
    returns(head, plan_of(head))
    plan_of(head)  # lost: stage 1 has nothing yet when stage 2 is lost too
    head.on_new_epoch(2)
    head.check_invariants()
    assert head.report().waiting == 1, "one of the two would have to write where the other reads"


def test_who_lacked_something_takes_nothing_over_again() -> None:
    head = batcher()
    after_one(head, ends=False)
    head.add(start(2, SYSTEM))
    second = plan_of(head)
    (shared,) = (entry for entry in second.entries if entry.sequence == 2)
    assert shared.start == 12
    returns(head, second, told={1: 1}, refused=(2,))
    assert head.report().recomputed == 1
    closing = plan_of(head)
    assert sequence_id(2) in closing.closes
    returns(head, closing)
    again = [entry for entry in plan_of(head).entries if entry.sequence == 2]
    assert [entry.start for entry in again] == [0]
    assert not set(again[0].new_blocks) & set(shared.new_blocks[:3])
