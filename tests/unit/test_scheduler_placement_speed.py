"""Placement by measured speed and links, several pipelines, standbys, and whether a move pays."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace

import pytest

from bench.placement import random_card, random_pool
from molink_common.messages import Dtype, ModelCard
from molink_scheduler.placement import (
    Forecast,
    LayerMap,
    Link,
    Offer,
    Placement,
    PlacementSettings,
    can_hold,
    is_worth_moving,
    place,
)
from tests.scheduler_builders import make_card

BF16 = Dtype.BFLOAT16
GIB = 2**30
SETTINGS = PlacementSettings()


def large_card(num_layers: int = 40) -> ModelCard:
    """Layers of 100 million parameters: 10 ms each at 10 billion a second. The ends hold nothing more."""
    return make_card(num_layers=num_layers).model_copy(
        update={
            "layer_parameters": (100_000_000,) * num_layers,
            "embedding_parameters": 0,
            "output_parameters": 0,
            "kv_scalars_per_token": (1024,) * num_layers,
            "hidden_size": 4096,
            "context_length": 8192,
        }
    )


def worker(
    name: str, speed: float | None = 10e9, *, gib: int = 64, site: str = "a", links: tuple[Link, ...] = ()
) -> Offer:
    return Offer(worker=name, memory_bytes=gib * GIB, site=site, parameters_per_s=speed, links=links)


def placed(pool: list[Offer], **bounds: int) -> Placement:
    return place(large_card(), pool, dtype=BF16, settings=replace(SETTINGS, **bounds))


def layers(placement: Placement) -> dict[str, int]:
    return {s.worker: s.last_layer - s.first_layer for one in placement.pipelines for s in one.stages}


def test_speed_decides_the_shares() -> None:
    assert layers(placed([worker("slow", 10e9), worker("fast", 30e9)])) == {"slow": 10, "fast": 30}


def test_memory_bounds_the_share_of_a_fast_worker() -> None:
    tight = placed([worker("slow", 10e9), worker("fast", 30e9, gib=4)])
    assert layers(tight)["fast"] < 21


def test_a_worker_that_was_not_measured_counts_as_the_median() -> None:
    pool = [worker("slow", 10e9), worker("mid", 20e9), worker("fast", 30e9), worker("new", None)]
    shares = layers(placed(pool))
    assert shares["new"] == shares["mid"]


def test_speed_counts_in_the_format_of_the_pipeline() -> None:
    half = replace(worker("bf16", 20e9), measured_in=BF16)
    whole = replace(worker("fp32", 10e9), measured_in=Dtype.FLOAT32)
    assert set(layers(placed([half, whole])).values()) == {20}


@pytest.mark.parametrize("by_speed", [True, False])
def test_who_joined_first_does_not_matter(by_speed: bool) -> None:
    pool = [worker(f"w{i}", 10e9 if by_speed else None, site=f"{i}") for i in range(4)]
    maps = [placed(list(order)).pipelines for order in itertools.permutations(pool)]
    assert [stage.worker for stage in maps[0][0].stages] == ["w0", "w1", "w2", "w3"]
    assert all(one == maps[0] for one in maps)


def test_every_worker_that_makes_it_faster_is_used() -> None:
    assert len(layers(placed([worker(f"w{i}") for i in range(5)]))) == 5


def test_a_worker_that_makes_nothing_faster_stands_by_and_is_told_why() -> None:
    placement = placed([worker("a", 100e9), worker("b", 100e9), worker("far", 1e9, site="z"), worker("near", 1e9)])
    assert set(layers(placement)) == {"a", "b"}
    assert "stands by" in placement.reasons["near"] and "crossed" not in placement.reasons["near"]
    assert "would have to be crossed to" in placement.reasons["far"]
    assert "ms a step" in placement.reasons["a"]


def test_no_worker_is_used_that_only_evens_out_a_remainder() -> None:
    card = large_card(num_layers=4)
    pool = [worker(f"w{i}") for i in range(3)]
    # 2 + 2 is as good as 2 + 1 + 1
    assert len(place(card, pool, dtype=BF16, settings=SETTINGS).workers) == 2


def test_sites_are_crossed_once_and_not_at_all_where_one_is_as_fast() -> None:
    mixed = [worker(f"w{i}", site="ab"[i % 2]) for i in range(4)]
    order = [stage.worker for stage in placed(mixed).pipelines[0].stages]
    assert order in (["w0", "w2", "w1", "w3"], ["w1", "w3", "w0", "w2"])
    one_is_enough = [worker("a", 10e9), worker("b1", 500e9, site="b"), worker("b2", 500e9, site="b")]
    assert set(layers(placed(one_is_enough))) == {"b1", "b2"}


def test_a_measured_link_says_more_than_the_site() -> None:
    slow = Link(peer="w1", round_trip_s=0.1)
    pool = [worker("w0", links=(slow,)), worker("w1"), worker("w2")]
    order = [stage.worker for stage in placed(pool).pipelines[0].stages]
    assert order.index("w2") == 1
    assert Forecast(large_card(), pool, dtype=BF16).crossings(placed(pool).pipelines[0]) == 0


def test_a_link_that_would_be_the_bottleneck_is_gone_around() -> None:
    narrow = Link(peer="w1", round_trip_s=0.001, bytes_per_s=1e5)  # 64 KiB a step take it 0.65 s
    pool = [worker("w0", links=(narrow,)), worker("w1")]
    assert len(layers(placed(pool))) == 1
    assert [s.worker for s in placed([*pool, worker("w2")]).pipelines[0].stages].index("w2") == 1


def test_it_is_gone_around_in_a_large_pool_too() -> None:
    narrow = tuple(Link(peer=f"w{index}", round_trip_s=0.001, bytes_per_s=1e5) for index in range(1, 3))
    # four fast ones make up the pipeline, of which w0 gets on with w3 only
    pool = [worker(f"w{index}", 100e9) for index in range(4)] + [worker(f"s{index}", 1e9) for index in range(6)]
    pool[0] = replace(pool[0], links=narrow)
    placement = placed(pool)
    times = Forecast(large_card(), pool, dtype=BF16)
    without = [replace(one, links=()) for one in pool]
    unhindered = Forecast(large_card(), without, dtype=BF16).bottleneck_s(placed(without).pipelines[0])
    assert times.bottleneck_s(placement.pipelines[0]) <= 1.5 * unhindered


def test_workers_are_held_back_where_the_model_fits_without_them() -> None:
    pool = [worker("a", 10e9), worker("b", 12e9), worker("c", 14e9)]
    placement = placed(pool, hold_back=1)
    assert set(layers(placement)) == {"b", "c"}
    assert "held back" in placement.reasons["a"]
    small = [replace(one, memory_bytes=3 * GIB) for one in pool]
    assert set(layers(placed(small, hold_back=1))) == {"a", "b", "c"}


def test_what_is_left_over_makes_up_a_second_pipeline_only_when_asked() -> None:
    pool = [worker("a", 100e9), worker("b", 100e9), worker("c", 1e9), worker("d", 1e9)]
    assert len(placed(pool).pipelines) == 1
    both = placed(pool, max_pipelines=2)
    assert [sorted(stage.worker for stage in one.stages) for one in both.pipelines] == [["a", "b"], ["c", "d"]]
    assert "in pipeline 2 of 2" in both.reasons["c"]
    kept = placed(pool, max_pipelines=2, hold_back=1)
    assert len(kept.workers) == 3


def test_a_pool_is_divided_where_that_is_faster() -> None:
    """With small layers every stage more mostly adds what a stage costs anyway."""
    card = make_card(num_layers=8)
    pool = [worker(f"w{i}", site="ab"[i % 2]) for i in range(4)]
    together = place(card, pool, dtype=BF16, settings=SETTINGS)
    divided = place(card, pool, dtype=BF16, settings=replace(SETTINGS, max_pipelines=2))
    assert len(together.pipelines[0].stages) == 4
    assert [sorted(stage.worker for stage in one.stages) for one in divided.pipelines] == [["w0", "w2"], ["w1", "w3"]]
    forecast = Forecast(card, pool, dtype=BF16)
    assert forecast.steps_per_s(divided.pipelines) > 1.2 * forecast.steps_per_s(together.pipelines)


@pytest.fixture
def two_halves() -> LayerMap:
    return placed([worker("a"), worker("b")]).pipelines[0]


def test_a_move_must_gain_a_fifth_and_win_back_its_pause(two_halves: LayerMap) -> None:
    def pays(pool: list[Offer], *, factor: float = 1.2, pause_s: float = 5.0, horizon_s: float = 300.0) -> bool:
        return is_worth_moving(
            two_halves, placed(pool), pool, large_card(), dtype=BF16,
            factor=factor, pause_s=pause_s, horizon_s=horizon_s,
        )  # fmt: skip

    assert not pays([worker("a"), worker("b")])
    assert not pays([worker("a"), worker("b", 12e9)])
    third = [worker("a"), worker("b"), worker("c")]
    assert pays(third)
    assert not pays(third, factor=2.0)
    assert not pays(third, pause_s=60.0, horizon_s=120.0)
    assert pays([worker("a"), worker("c")])  # b is gone
    assert not pays([worker("a", gib=1)])  # nothing better is there


def test_room_is_counted_to_the_byte() -> None:
    card = large_card()
    needed = 10 * 200_000_000 + 100 * 16 * 10 * 1024 * 2 + SETTINGS.overhead_bytes
    enough = Offer(worker="w", memory_bytes=needed)
    assert can_hold(card, enough, 5, 15, 100, BF16, SETTINGS)
    assert not can_hold(card, replace(enough, memory_bytes=needed - 1), 5, 15, 100, BF16, SETTINGS)


def test_five_hundred_workers_are_planned_in_two_seconds() -> None:
    dice = random.Random(1)
    card = random_card(dice, num_layers=80, alike=True)
    pool = [replace(one, memory_bytes=one.memory_bytes * 10) for one in random_pool(dice, card, workers=500, sites=20)]
    began_s = time.process_time()
    placement = place(card, pool, dtype=BF16, settings=SETTINGS)
    assert time.process_time() - began_s < 2.0
    assert placement.pipelines and set(placement.reasons) == {one.worker for one in pool}
