"""Placement: every layer once, in order, within memory, for any model and any pool."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from molink_common.messages import Dtype, ModelCard
from molink_scheduler.placement import Offer, Placement, PlacementSettings, place
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
    memory = draw(st.lists(st.integers(0, 300_000), max_size=8))
    return [Offer(worker=f"w{i}", memory_bytes=size, site=draw(st.sampled_from("ab"))) for i, size in enumerate(memory)]


bounds = st.builds(
    PlacementSettings,
    min_stages=st.integers(1, 3),
    max_stages=st.none() | st.integers(3, 4),
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
    (layer_map,) = placement.pipelines
    memory = {offer.worker: offer.memory_bytes for offer in pool}
    layers = [layer for stage in layer_map.stages for layer in range(stage.first_layer, stage.last_layer)]
    assert layers == list(range(card.num_layers))
    assert len({stage.worker for stage in layer_map.stages}) == len(layer_map.stages)
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
def test_a_pool_with_plenty_uses_everybody_it_may(card: ModelCard, count: int) -> None:
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
