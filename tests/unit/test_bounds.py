"""Bounds against cases worked out by hand."""

from __future__ import annotations

import pytest

from bench.bounds import (
    Bound,
    Limit,
    LinearCost,
    LinkBound,
    Load,
    PipelineBound,
    best,
    payload_bytes_per_s,
    ring_s,
    with_micro_batches,
    with_processors,
)
from bench.cost_curve import CostCurve


def linear(fixed_s: float, per_sequence_s: float = 0.0, per_token_s: float = 0.0) -> LinearCost:
    return LinearCost(fixed_s=fixed_s, per_token_s=per_token_s, per_sequence_s=per_sequence_s, per_context_token_s=0.0)


def assert_bound(bound: Bound, tokens_per_s: float, micro_batches: int, limit: Limit) -> None:
    assert bound.tokens_per_s == pytest.approx(tokens_per_s)
    assert (bound.micro_batches, bound.limit) == (micro_batches, limit)


NO_LINK = LinkBound(rate_bytes_per_s=None, one_way_s=0.0)


def two_stages(cost: LinearCost, link: LinkBound, *, bytes_a_token: float = 1000.0) -> PipelineBound:
    return PipelineBound(stages=(cost, cost), links=(link,), return_s=link.one_way_s, bytes_a_token=bytes_a_token)


def test_one_stage_without_links_gives_a_batch_a_step() -> None:
    pipeline = PipelineBound(stages=(linear(0.010, 0.001),), links=(), return_s=0.0, bytes_a_token=1.0)
    # one micro-batch: 10 + 8 ms for 8 tokens; ring and stage are the same time, and the stage is named
    assert_bound(best(pipeline, Load(sequences=8)), 8 / 0.018, 1, Limit.STAGE)


def test_two_equal_stages_without_links_want_two_micro_batches() -> None:
    pipeline = two_stages(linear(0.010), NO_LINK)
    # M=1: ring 20 ms. M=2: stage 2·10 ms. The same cycle: the fewer win
    assert best(pipeline, Load(sequences=4)).micro_batches == 1
    # with a cost a sequence, halves are cheaper. M=1: ring 2·(10+4) = 28 ms; M=2: stage 2·(10+2) = 24, ring 24
    sized = two_stages(linear(0.010, 0.001), NO_LINK)
    assert_bound(best(sized, Load(sequences=4)), 4 / 0.024, 2, Limit.STAGE)


def test_a_long_ring_bounds_few_sequences() -> None:
    pipeline = two_stages(linear(0.005), LinkBound(rate_bytes_per_s=None, one_way_s=0.050))
    # 5 + 50 + 5 + 50 ms, and eight micro-batches keep a stage busy for 40 ms only
    bound = best(pipeline, Load(sequences=8))
    assert_bound(bound, 8 / 0.110, 1, Limit.RING)


def test_a_slow_link_bounds_many_sequences() -> None:
    pipeline = two_stages(linear(0.001), LinkBound(rate_bytes_per_s=1e6, one_way_s=0.010), bytes_a_token=16384)
    bound = best(pipeline, Load(sequences=64))
    assert bound.limit is Limit.LINK
    assert bound.tokens_per_s == pytest.approx(1e6 / 16384)


def test_ring_counts_each_transmission_once() -> None:
    pipeline = two_stages(linear(0.002), LinkBound(rate_bytes_per_s=1e6, one_way_s=0.010), bytes_a_token=1000)
    # 2 stages of 2 ms, 8 sequences of 1000 bytes at 1 MB/s = 8 ms, 10 ms there, 10 ms back
    assert ring_s(pipeline, Load(sequences=8), 1) == pytest.approx(0.032)
    assert ring_s(pipeline, Load(sequences=8), 4) == pytest.approx(0.026)


def test_prompts_take_link_and_stage_but_not_ring() -> None:
    slow = two_stages(linear(0.001), LinkBound(rate_bytes_per_s=1e6, one_way_s=0.0), bytes_a_token=10_000)
    assert best(slow, Load(sequences=10, prompt_share=1.5)).tokens_per_s == pytest.approx(1e6 / (10_000 * 2.5))
    busy = two_stages(linear(0.0, per_token_s=0.001), NO_LINK)
    assert best(busy, Load(sequences=10, prompt_share=3.0)).tokens_per_s == pytest.approx(1 / 0.004)
    far = two_stages(linear(0.0, per_token_s=1e-6), LinkBound(rate_bytes_per_s=None, one_way_s=0.5))
    load, laden = Load(sequences=2), Load(sequences=2, prompt_share=5.0)
    assert best(far, load).tokens_per_s == best(far, laden).tokens_per_s


def test_prompts_that_come_by_the_clock_take_their_part_whatever_the_rest_does() -> None:
    slow = two_stages(linear(0.001), LinkBound(rate_bytes_per_s=1e6, one_way_s=0.0), bytes_a_token=10_000)
    # 100 tokens a second fit; 40 are taken
    assert best(slow, Load(sequences=10, prompt_tokens_per_s=40)).tokens_per_s == pytest.approx(60)
    # one stage, 1 ms a token: 1000 a second fit, 300 are taken
    busy = two_stages(linear(0.0, per_token_s=0.001), NO_LINK)
    assert best(busy, Load(sequences=10, prompt_tokens_per_s=300)).tokens_per_s == pytest.approx(700)
    # together with prompts of one's own, as many as there are tokens
    both = Load(sequences=10, prompt_tokens_per_s=300, prompt_share=1.0)
    assert best(busy, both).tokens_per_s == pytest.approx(350)
    for more_than_fits in (Load(sequences=1, prompt_tokens_per_s=1001), Load(sequences=1, prompt_tokens_per_s=1e9)):
        assert best(busy, more_than_fits).tokens_per_s == 0.0


def test_the_slowest_of_unequal_stages_counts() -> None:
    pipeline = PipelineBound(
        stages=(linear(0.001), linear(0.020), linear(0.001)),
        links=(NO_LINK, NO_LINK),
        return_s=0.0,
        bytes_a_token=1.0,
    )
    assert with_micro_batches(pipeline, Load(sequences=8), 2).limit is Limit.STAGE
    assert_bound(best(pipeline, Load(sequences=8)), 8 / 0.022, 1, Limit.RING)


@pytest.mark.parametrize("sequences", [1, 8, 32, 64])
def test_no_fixed_count_is_faster_than_the_best(sequences: int) -> None:
    pipeline = two_stages(linear(0.018, 0.0004), LinkBound(rate_bytes_per_s=12e6, one_way_s=0.015), bytes_a_token=16384)
    load = Load(sequences=sequences, prompt_share=0.5)
    bound = best(pipeline, load)
    counts = [with_micro_batches(pipeline, load, count) for count in range(1, sequences + 1)]
    assert max(one.tokens_per_s for one in counts) == bound.tokens_per_s
    # physical limits that need no thought about micro-batches
    assert bound.tokens_per_s <= 12e6 / (16384 * 1.5)
    assert bound.tokens_per_s <= sequences / (2 * 0.015 + 2 * 0.018)


def test_the_roofline_by_hand() -> None:
    curve = CostCurve()
    # one token: 40 layers' weights, 100 tokens of context, 1 ms
    assert curve.step_s(layers=40, tokens=1, context_tokens=100) == pytest.approx(17.5e-3 + 16.4e-6 + 1e-3)
    # a chunk of 256 tokens is bound by arithmetic
    assert curve.step_s(layers=40, tokens=256, context_tokens=0) == pytest.approx(256 * 0.68e-3 + 1e-3)
    assert curve.step_s(layers=40, tokens=0, context_tokens=0) == 0.0


def test_payload_is_what_headers_leave() -> None:
    assert payload_bytes_per_s(None) is None
    assert payload_bytes_per_s(100e6) == pytest.approx(12.5e6 * 1448 / 1500)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="joined by"):
        PipelineBound(stages=(linear(1.0),), links=(NO_LINK,), return_s=0.0, bytes_a_token=1.0)
    with pytest.raises(ValueError, match="no load"):
        Load(sequences=0)
    with pytest.raises(ValueError, match="any time"):
        best(two_stages(linear(0.0), NO_LINK), Load(sequences=1))
    with pytest.raises(ValueError, match="3 micro-batches"):
        with_micro_batches(two_stages(linear(1.0), NO_LINK), Load(sequences=2), 3)


def test_processors_that_all_hosts_share_bound_what_the_pipeline_alone_would_allow() -> None:
    pipeline = Bound(tokens_per_s=600.0, micro_batches=3, limit=Limit.STAGE)
    shared = with_processors(pipeline, tokens_per_s=475.0, busy_share=0.95)
    assert shared.tokens_per_s == pytest.approx(500.0)
    assert shared.limit is Limit.PROCESSORS
    assert with_processors(pipeline, tokens_per_s=475.0, busy_share=0.5) is pipeline
    with pytest.raises(ValueError, match="busy"):
        with_processors(pipeline, tokens_per_s=475.0, busy_share=0.0)
