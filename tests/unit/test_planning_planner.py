"""The planner's rules, one by one, without a simulated machine around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from molink_common.messages import PipelinePolicy, Scheduling, Speculation
from molink_common.wire import MAX_STEP_TOKENS, Traffic
from molink_stage_worker.batch_plan import BatchPlan
from molink_stage_worker.planning import Demand, Planner, StepObservation
from molink_stage_worker.planning.chunks import grid, separate_chunk_tokens
from molink_stage_worker.planning.cycle import Bottleneck, Machine, distinct_counts, predict
from molink_stage_worker.planning.published import published_micro_batches
from molink_stage_worker.planning.ring import Links
from molink_stage_worker.planning.stage_cost import StageCurve

FLAT = StageCurve(
    tokens=(1.0, 64.0), times_s=(0.01, 0.01), fixed_s=0.01, per_token_s=0.0, per_sequence_s=0.0,
    per_context_token_s=0.0,
)  # fmt: skip
LINKS = Links(latency_s=0.06, s_per_byte=8e-8, seen_bytes=0.0, rate_bytes_per_s=12.5e6)
MACHINE = Machine(stages=(FLAT, FLAT), prompt_shares=(0.0, 0.0), riding=0.0, token_bytes=1000, links=LINKS, scatter=0.0)


def make_planner(*, num_stages: int = 2, latency_target_s: float | None = None, **policy: object) -> Planner:
    return Planner(
        num_stages=num_stages,
        token_bytes=16384,
        step_tokens=256,
        policy=PipelinePolicy.model_validate(policy),
        latency_target_s=latency_target_s,
    )


def make_demand(decoding: int) -> Demand:
    return Demand(decoding=decoding, context_tokens=60, prompt_tokens_waiting=0)


def feed(
    planner: Planner, *, steps: int, since_s: float, tokens: int = 8, links_s: float = 0.04, stages: int = 2,
    prompt_tokens: int = 0, cost: Callable[[int], float] = lambda tokens: 0.008 + 0.0016 * tokens,
) -> float:  # fmt: skip
    """Steps of an affine machine, or another one; the time after them."""
    now_s = since_s
    for _ in range(steps):
        compute_s = cost(tokens)
        now_s += 0.05
        planner.on_step(
            StepObservation(
                traffic=Traffic.DECODE, tokens=tokens, sequences=tokens, context_tokens=60 * tokens,
                decode_tokens=tokens - prompt_tokens, payload_bytes=16384 * tokens, compute_s=(compute_s,) * stages,
                waited_s=(0.0,) * stages, ring_s=stages * compute_s + links_s,
            ),
            now_s,
        )  # fmt: skip
    return now_s


def test_before_measuring_there_is_a_micro_batch_for_each_stage() -> None:
    plan = make_planner(num_stages=3).plan(make_demand(32), 0.0)
    assert (plan.micro_batches, plan.along_tokens) == (3, 0)


def test_before_a_link_is_known_nothing_large_goes_at_once() -> None:
    large = Planner(num_stages=2, token_bytes=16384, step_tokens=1024, policy=PipelinePolicy())
    plan = large.plan(make_demand(32), 0.0)
    assert plan == BatchPlan(micro_batches=2, chunk_tokens=16, chunks_under_way=4, separate_prefill=True)
    alone = Planner(num_stages=1, token_bytes=16384, step_tokens=1024, policy=PipelinePolicy())
    assert not alone.plan(make_demand(32), 0.0).separate_prefill


def test_a_fixed_count_stays() -> None:
    planner = make_planner(micro_batches=5)
    now_s = feed(planner, steps=50, since_s=0.0)
    planner.on_link(12.5e6, 0.03)
    assert planner.plan(make_demand(32), now_s).micro_batches == 5
    assert planner.report().cycle_s is not None


def test_plain_has_one_whole_step_under_way() -> None:
    planner = make_planner(scheduling=Scheduling.PLAIN)
    now_s = feed(planner, steps=50, since_s=0.0)
    assert planner.plan(make_demand(32), now_s) == BatchPlan(
        micro_batches=1, chunk_tokens=MAX_STEP_TOKENS, chunks_under_way=1, separate_prefill=False
    )


def test_published_computes_prompts_whole_and_apart() -> None:
    planner = make_planner(scheduling=Scheduling.PUBLISHED)
    now_s = feed(planner, steps=50, since_s=0.0)
    plan = planner.plan(make_demand(32), now_s)
    assert plan.separate_prefill
    assert (plan.chunk_tokens, plan.chunks_under_way) == (MAX_STEP_TOKENS, 1)
    assert plan.micro_batches > 2


def published(sequences: int, *, assumed_bytes_per_s: float, head: StageCurve | None = FLAT) -> int:
    return published_micro_batches(
        head, sequences=sequences, context_tokens=60, num_stages=2, token_bytes=16384,
        assumed_bytes_per_s=assumed_bytes_per_s,
    )  # fmt: skip


def test_the_published_rule() -> None:
    assert published(1, assumed_bytes_per_s=12.5e6) == 1
    assert published(2, assumed_bytes_per_s=12.5e6) == 2
    assert published(32, assumed_bytes_per_s=12.5e6, head=None) == 2
    # 15 ms of computing for each further one; a fast link costs 2 × 5 ms and a little
    assert published(32, assumed_bytes_per_s=125e6) == 3
    # 100 Mbit/s: 2 × 15.5 ms with four, just over 2 × 15 ms; 2 × 12.9 ms with five, within 3 × 15 ms
    assert published(32, assumed_bytes_per_s=12.5e6) == 5
    assert published(64, assumed_bytes_per_s=1e5) == 10


def test_demand_that_doubles_is_answered_at_once_and_small_changes_are_not() -> None:
    planner = make_planner()
    planner.on_link(12.5e6, 0.03)
    now_s = feed(planner, steps=60, since_s=0.0, tokens=2)
    few = planner.plan(make_demand(4), now_s).micro_batches
    many = planner.plan(make_demand(60), now_s + 0.01).micro_batches
    assert many > few
    assert planner.plan(make_demand(59), now_s + 0.02).micro_batches == many


def test_steps_of_another_pipeline_say_nothing() -> None:
    planner = make_planner(num_stages=3)
    feed(planner, steps=50, since_s=0.0)
    assert planner.report().costs == ()


def test_it_reports_costs_and_the_bottleneck() -> None:
    planner = make_planner()
    assert planner.report().bottleneck == "not known yet"
    now_s = feed(planner, steps=50, since_s=0.0)
    planner.on_link(12.5e6, 0.03)
    planner.plan(make_demand(32), now_s)
    report = planner.report()
    assert len(report.costs) == 2
    assert report.costs[0].observations == 50
    assert report.cycle_s is not None
    assert report.bottleneck != "not known yet"


def test_a_latency_target_bounds_a_shared_chunk() -> None:
    planner = make_planner(num_stages=1, latency_target_s=0.1)
    now_s = feed(planner, steps=50, since_s=0.0, tokens=64, links_s=0.0, stages=1)
    plan = planner.plan(make_demand(8), now_s)
    assert not plan.separate_prefill
    assert plan.chunk_tokens < 64


def test_short_prompts_ride_where_no_link_notices() -> None:
    planner = make_planner(micro_batches=2)
    planner.on_link(1.25e9, 0.001)
    now_s = 0.0
    for tokens in (16, 32, 64) * 20:
        now_s = feed(planner, steps=1, since_s=now_s, tokens=tokens, links_s=0.001, prompt_tokens=tokens // 2)
    assert planner.plan(make_demand(64), now_s).riding_tokens == 8, "nobody knows what 32 + 8 would cost"
    now_s = feed(planner, steps=3, since_s=now_s, tokens=40, links_s=0.001, prompt_tokens=20)
    plan = planner.plan(make_demand(64), now_s + 1.0)
    assert plan.along_tokens < plan.riding_tokens <= 64
    planner.on_link(1.25e6, 0.001)
    assert planner.plan(make_demand(64), now_s + 2.0).riding_tokens == 0


def test_each_bound_of_a_cycle() -> None:
    stage = predict(MACHINE, decoding=32, context_tokens=60, micro_batches=16, chunk_tokens=64)
    assert stage.bottleneck is Bottleneck.STAGE
    assert stage.stage_s == pytest.approx(0.16)
    ring = predict(MACHINE, decoding=32, context_tokens=60, micro_batches=2, chunk_tokens=64)
    assert ring.bottleneck is Bottleneck.RING
    assert ring.ring_s == pytest.approx(0.02 + 0.06 + 16_000 * 8e-8)
    slow = replace(MACHINE, links=replace(LINKS, rate_bytes_per_s=1e4))
    link = predict(slow, decoding=32, context_tokens=60, micro_batches=8, chunk_tokens=64)
    assert link.bottleneck is Bottleneck.LINK
    assert link.link_s == pytest.approx(3.2)


def test_prompts_take_their_share_of_a_stage() -> None:
    busy = replace(MACHINE, prompt_shares=(0.5, 0.0))
    cycle = predict(busy, decoding=32, context_tokens=60, micro_batches=16, chunk_tokens=64)
    assert cycle.stage_s == pytest.approx(0.32)


def test_prompts_that_ride_make_steps_larger() -> None:
    knee = StageCurve(
        tokens=(1.0, 24.0, 48.0), times_s=(0.018, 0.018, 0.036), fixed_s=0.018, per_token_s=0.00075,
        per_sequence_s=0.0, per_context_token_s=0.0,
    )  # fmt: skip
    machine = replace(MACHINE, stages=(knee, knee), riding=0.5)
    two, one = (
        predict(machine, decoding=32, context_tokens=60, micro_batches=count, chunk_tokens=64) for count in (2, 1)
    )
    assert two.stages_s == (pytest.approx(0.036),) * 2
    assert one.stages_s == (pytest.approx(0.036),) * 2  # 48 tokens in one pass


def riding_tokens_after(prompts_a_token: int) -> int:
    """On a machine with a knee at 24 tokens, 16 of which decode in each step."""
    planner = make_planner(micro_batches=2)
    planner.on_link(1.25e9, 0.001)
    now_s = 0.0
    for tokens in (8, 16, 24, 32, 48) * 12:
        now_s = feed(
            planner, steps=1, since_s=now_s, tokens=tokens, links_s=0.001,
            prompt_tokens=tokens * prompts_a_token // (1 + prompts_a_token),
            cost=lambda tokens: max(0.018, 0.00075 * tokens),
        )  # fmt: skip
    return planner.plan(make_demand(32), now_s).riding_tokens


def test_those_who_ride_are_counted() -> None:
    assert 8 <= riding_tokens_after(0) <= 10
    assert riding_tokens_after(1) == 16


def test_counts_that_make_no_difference_are_left_out() -> None:
    assert distinct_counts(1) == [1]
    assert distinct_counts(8) == [1, 2, 3, 4, 8]
    assert distinct_counts(1000)[-1] <= 64


def test_sizes_of_chunks() -> None:
    assert grid(64) == [16, 20, 24, 28, 32, 40, 48, 56, 64]
    assert grid(8) == [8]
    assert grid(100)[-1] == 100


def chunk_with(queue: float, *, cycle_s: float = 0.1, crowd: float = 0.0, crowd_tokens: int = 0) -> int:
    rising = StageCurve(
        tokens=(1.0, 256.0), times_s=(0.01, 0.2), fixed_s=0.01, per_token_s=0.00075, per_sequence_s=0.0,
        per_context_token_s=0.0,
    )  # fmt: skip
    machine = replace(MACHINE, stages=(rising, rising))
    return separate_chunk_tokens(
        machine, step_tokens=256, context_tokens=60, cycle_s=cycle_s, crowd=crowd, crowd_tokens=crowd_tokens,
        queue=queue, latency_target_s=None,
    )  # fmt: skip


def test_chunks_grow_where_prompts_queue_up() -> None:
    assert chunk_with(0.0) == chunk_with(1.0) < chunk_with(1.5) < chunk_with(2.0)
    assert chunk_with(2.0) == chunk_with(50.0), "a chunk takes no stage longer than a cycle"
    assert 0.01 + 0.00075 * chunk_with(50.0) <= 0.1


def test_a_crowd_of_prompts_goes_through_all_stages_soonest() -> None:
    alone, rebuilt = chunk_with(0.0), chunk_with(0.0, crowd=7.0)
    assert rebuilt == 256, "one stage computes all of it"
    few, many = (chunk_with(0.0, crowd=7.0, crowd_tokens=tokens) for tokens in (126, 2_000))
    assert alone < few < 126, "the second stage need not wait for all of it"
    assert few < many < rebuilt, "each chunk pays a step's fixed cost"


def price_of(planner: Planner, decoding: int, window: float = 1.0) -> float | None:
    planner.on_link(12.5e6, 0.03)
    now_s = 0.0
    for tokens in (decoding, 2 * decoding) * 20:
        now_s = feed(planner, steps=1, since_s=now_s, tokens=tokens)
    demand = replace(make_demand(decoding), window=window)
    planner.plan(demand, now_s)
    return planner.plan(demand, now_s + 1.0).draft_price


def test_guesses_have_a_price_where_they_are_wanted() -> None:
    assert price_of(make_planner(), 1) is None
    assert price_of(make_planner(scheduling=Scheduling.PLAIN, speculation=Speculation.LOOKUP), 1) is None
    alone, crowd = (price_of(make_planner(speculation=Speculation.LOOKUP), decoding) for decoding in (1, 64))
    assert alone is not None and crowd is not None
    assert 0.01 < alone < 0.2, "one stream waits for its way round: a token more costs little"
    assert crowd > 0.4, "a full stage has no time for guesses"


def test_the_price_is_the_same_share_of_a_cycle_that_guesses_are_in_already() -> None:
    planner = make_planner(speculation=Speculation.LOOKUP)
    few, many = price_of(planner, 64), price_of(planner, 64, window=4.0)
    assert few is not None and many is not None
    assert many < few, "the cycle is longer by the guesses that are in it"
