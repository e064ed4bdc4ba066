"""Placement: every layer once, in order, within memory, for any model and any pool."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from bench.placement import DTYPE, SETTINGS, bottleneck_s, brute_force, random_card, random_pool
from molink_common.messages import Dtype, ModelCard
from molink_scheduler.placement import (
    Forecast,
    LayerMap,
    Offer,
    Placement,
    PlacementSettings,
    can_hold,
    is_worth_moving,
    place,
)
from molink_scheduler.placement_pipelines import EXACT_UP_TO
from tests.scheduler_builders import make_card


@st.composite
def models(draw: st.DrawFn) -> ModelCard:
    num_layers = draw(st.integers(1, 12))
    sizes = draw(st.lists(st.integers(1, 5000), min_size=num_layers, max_size=num_layers))
    caches = draw(st.lists(st.sampled_from((0, 4, 16)), min_size=num_layers, max_size=num_layers))
    return make_card(num_layers=num_layers).model_copy(
        update={
            "layer_parameters": tuple(sizes),
            "kv_scalars_per_token": tuple(caches),
            "embedding_parameters": draw(st.integers(0, 20000)),
            "output_parameters": draw(st.integers(0, 20000)),
        }
    )


@st.composite
def pools(draw: st.DrawFn) -> list[Offer]:
    memory = draw(st.lists(st.integers(0, 300_000), max_size=12))
    speeds = draw(st.sampled_from((st.none(), st.none() | st.floats(1e7, 1e12))))
    return [
        Offer(worker=f"w{i}", memory_bytes=size, site=draw(st.sampled_from("ab")), parameters_per_s=draw(speeds))
        for i, size in enumerate(memory)
    ]


bounds = st.builds(
    PlacementSettings,
    min_stages=st.integers(1, 3),
    max_stages=st.none() | st.integers(3, 4),
    max_pipelines=st.integers(1, 3),
    hold_back=st.integers(0, 2),
    kv_tokens=st.integers(1, 4096),
    min_kv_tokens=st.integers(1, 512),
    block_size=st.sampled_from((1, 16, 64)),
    overhead_bytes=st.sampled_from((0, 10_000)),
)


def bytes_on(card: ModelCard, dtype: Dtype, first: int, last: int, kv_tokens: int) -> int:
    """Written anew, so that it can disagree with the code under test."""
    scalars = sum(card.layer_parameters[first:last]) + kv_tokens * sum(card.kv_scalars_per_token[first:last])
    scalars += card.embedding_parameters if first == 0 else 0
    scalars += card.output_parameters if last == card.num_layers else 0
    return scalars * dtype.size_bytes


def check(card: ModelCard, pool: list[Offer], dtype: Dtype, limits: PlacementSettings, placement: Placement) -> None:
    assert set(placement.reasons) == {offer.worker for offer in pool}
    assert all(placement.reasons.values())
    if not placement.pipelines:
        assert placement.problem
        return
    assert placement.problem is None and placement.missing_bytes == 0
    assert len(placement.pipelines) <= limits.max_pipelines
    assert len(placement.workers) == sum(len(layer_map.stages) for layer_map in placement.pipelines)
    for layer_map in placement.pipelines:
        check_pipeline(card, pool, dtype, limits, layer_map)


def check_pipeline(
    card: ModelCard, pool: list[Offer], dtype: Dtype, limits: PlacementSettings, layer_map: LayerMap
) -> None:
    memory = {offer.worker: offer.memory_bytes for offer in pool}
    layers = [layer for stage in layer_map.stages for layer in range(stage.first_layer, stage.last_layer)]
    assert layers == list(range(card.num_layers))
    assert all(stage.first_layer < stage.last_layer for stage in layer_map.stages)
    assert limits.min_stages <= len(layer_map.stages) <= (limits.max_stages or card.num_layers)
    kv_tokens = layer_map.num_blocks * limits.block_size
    assert layer_map.num_blocks >= 1
    assert kv_tokens <= max(limits.kv_tokens, limits.block_size)
    assert kv_tokens >= min(limits.min_kv_tokens, limits.kv_tokens // limits.block_size * limits.block_size, 512)
    for stage in layer_map.stages:
        needed = bytes_on(card, dtype, stage.first_layer, stage.last_layer, kv_tokens)
        assert needed + limits.overhead_bytes <= memory[stage.worker]


@given(card=models(), pool=pools(), dtype=st.sampled_from(Dtype), limits=bounds)
@settings(max_examples=300, deadline=None)
def test_every_layer_once_in_order_and_within_memory(
    card: ModelCard, pool: list[Offer], dtype: Dtype, limits: PlacementSettings
) -> None:
    placement = place(card, pool, dtype=dtype, settings=limits)
    check(card, pool, dtype, limits, placement)
    assert placement == place(card, pool, dtype=dtype, settings=limits)


@given(card=models(), count=st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_a_pool_with_plenty_of_unmeasured_workers_uses_everybody_it_may(card: ModelCard, count: int) -> None:
    pool = [Offer(worker=f"w{i}", memory_bytes=10**9) for i in range(count)]
    placement = place(card, pool, dtype=Dtype.FLOAT32, settings=PlacementSettings(overhead_bytes=0))
    check(card, pool, Dtype.FLOAT32, PlacementSettings(overhead_bytes=0), placement)
    assert len(placement.workers) == min(count, card.num_layers)


@given(card=models(), dtype=st.sampled_from(Dtype), short_bytes=st.integers(1, 1000))
@settings(max_examples=100, deadline=None)
def test_what_is_missing_is_what_would_do_on_one_worker(card: ModelCard, dtype: Dtype, short_bytes: int) -> None:
    limits = PlacementSettings(min_kv_tokens=16, overhead_bytes=0)
    enough = bytes_on(card, dtype, 0, card.num_layers, 16)
    short = [Offer(worker="w", memory_bytes=max(0, enough - short_bytes))]
    placement = place(card, short, dtype=dtype, settings=limits)
    assert not placement.pipelines
    assert place(card, [Offer(worker="w", memory_bytes=enough)], dtype=dtype, settings=limits).pipelines


dice = st.randoms(use_true_random=False)


@given(dice=dice, workers=st.integers(2, 6), sites=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_small_pools_are_placed_as_well_as_by_brute_force(dice: random.Random, workers: int, sites: int) -> None:
    card = random_card(dice, num_layers=dice.randint(workers, 12))
    pool = random_pool(dice, card, workers=workers, sites=sites)
    least = dice.choice((1, 1, 2, 3))
    bests = {(few, stages): best for (few, stages), best in brute_force(card, pool).items() if stages >= least}
    placement = place(card, pool, dtype=DTYPE, settings=replace(SETTINGS, min_stages=least))
    assert bool(placement.pipelines) == bool(bests)
    if bests:
        best_s = min(bests.values())
        assert bottleneck_s(card, pool, placement) <= best_s * 1.03
        # what is clearly within the tolerance may cost no further crossing
        crossings = Forecast(card, pool, dtype=DTYPE).crossings(placement.pipelines[0])
        assert crossings <= min(few for (few, _), slowest_s in bests.items() if slowest_s <= best_s * 1.02)


@given(dice=dice, workers=st.integers(2, 12), sites=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_a_little_noise_moves_nothing(dice: random.Random, workers: int, sites: int) -> None:
    card = random_card(dice, num_layers=dice.randint(4, 40))
    # in an order of more workers than that, slow links are where chance puts them
    pool = random_pool(dice, card, workers=workers, sites=sites, measured=workers <= EXACT_UP_TO)
    before = place(card, pool, dtype=DTYPE, settings=SETTINGS)
    noisy = [
        replace(one, parameters_per_s=one.parameters_per_s and one.parameters_per_s * dice.uniform(0.97, 1.03))
        for one in pool
    ]
    after = place(card, noisy, dtype=DTYPE, settings=SETTINGS)
    assert bool(before.pipelines) == bool(after.pipelines)
    if before.pipelines:
        assert not is_worth_moving(before.pipelines[0], after, noisy, card, dtype=DTYPE)


@given(dice=dice, workers=st.integers(2, 8))
@settings(max_examples=60, deadline=None)
def test_a_placed_stage_fits_its_worker_and_no_block_more_fits_all(dice: random.Random, workers: int) -> None:
    card = random_card(dice, num_layers=dice.randint(4, 20))
    pool = random_pool(dice, card, workers=workers, sites=2)
    for layer_map in place(card, pool, dtype=DTYPE, settings=SETTINGS).pipelines:
        offers = {offer.worker: offer for offer in pool}

        def fits(num_blocks: int, layer_map: LayerMap = layer_map, offers: dict[str, Offer] = offers) -> bool:
            return all(
                can_hold(card, offers[stage.worker], stage.first_layer, stage.last_layer, num_blocks, DTYPE)
                for stage in layer_map.stages
            )

        assert fits(layer_map.num_blocks)
        assert layer_map.num_blocks == SETTINGS.kv_tokens // SETTINGS.block_size or not fits(layer_map.num_blocks + 1)
        forecast = Forecast(card, pool, dtype=DTYPE)
        assert 0 < max(forecast.stages_s(layer_map)) <= forecast.bottleneck_s(layer_map)
