"""The ring without overhead: near the bound where it should be, and never above it."""

from __future__ import annotations

import pytest

from bench import bounds
from bench.ideal_ring import IdealRing, Rules, best, timed_pipeline
from bench.link_grid.bounding import closed_loop


def bound_of(pipeline: bounds.PipelineBound, streams: int) -> float:
    return bounds.best(pipeline, closed_loop(streams)).tokens_per_s


def rate(link: str, stages: int, streams: int, rules: Rules, handover_s: float = 0.0) -> float:
    pipeline = timed_pipeline(link, stages=stages)
    return IdealRing(pipeline, streams=streams, rules=rules, handover_s=handover_s).tokens_per_s(seconds=8, warm_s=8)


@pytest.mark.parametrize("link", ["lan", "100m30", "10m30"])
def test_one_stream_is_as_fast_as_its_way_round(link: str) -> None:
    bound = bound_of(timed_pipeline(link, stages=2), 1)
    assert 0.93 * bound <= rate(link, 2, 1, Rules(1, 8)) <= bound


def test_a_handover_costs_each_hop_its_time() -> None:
    without, with_it = (1 / rate("lan", 3, 1, Rules(1, 8), handover_s) for handover_s in (0.0, 0.01))
    # and so does the one step more that a prompt of more than 26 tokens takes
    assert with_it - without == pytest.approx(3 * 0.01, rel=2 / 64)


@pytest.mark.parametrize("link", ["lan", "100m30", "100m100"])
@pytest.mark.parametrize(("stages", "streams"), [(2, 8), (2, 32), (3, 32)])
@pytest.mark.parametrize("rules", [Rules(1, 32), Rules(2, 8), Rules(4, 12), Rules(7, 6)])
def test_no_rules_beat_the_bound(link: str, stages: int, streams: int, rules: Rules) -> None:
    bound = bound_of(timed_pipeline(link, stages=stages), streams)
    assert 0.1 * bound < rate(link, stages, streams, rules) <= 1.01 * bound  # windows end in the middle of a cycle


def test_the_best_rules_come_near_the_bound() -> None:
    pipeline = timed_pipeline("100m30", stages=2)
    found, rules = best(pipeline, streams=8, handover_s=0.0)
    assert found > 0.95 * bound_of(pipeline, 8)
    assert rules.micro_batches == 3


def test_handovers_that_vary_cost_more_where_stages_are_busy_and_the_same_where_one_stream_waits() -> None:
    def rate_of(streams: int, rules: Rules, *, varies: bool) -> float:
        ring = IdealRing(
            timed_pipeline("100m30", stages=2), streams=streams, rules=rules, handover_s=0.003, varies=varies
        )
        return ring.tokens_per_s(seconds=8, warm_s=8)

    assert rate_of(1, Rules(1, 8), varies=True) == pytest.approx(rate_of(1, Rules(1, 8), varies=False), rel=0.03)
    busy, alike = (rate_of(32, Rules(4, 8), varies=varies) for varies in (True, False))
    assert 0.7 * alike < busy < 0.99 * alike
