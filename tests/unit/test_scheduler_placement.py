"""Placement on pools small enough to know the answer."""

from __future__ import annotations

from molink_common.messages import Dtype, ModelCard
from molink_scheduler.placement import Offer, Placement, PlacementSettings, choose_dtype, place
from tests.scheduler_builders import make_card

BF16, FP32, FP16 = Dtype.BFLOAT16, Dtype.FLOAT32, Dtype.FLOAT16
GIB = 2**30


def smol() -> ModelCard:
    """The proportions of SmolLM2-135M: the output head weighs eight layers."""
    return make_card(num_layers=30, context_length=8192).model_copy(
        update={
            "layer_parameters": (3_540_096,) * 30,
            "embedding_parameters": 28_311_552,
            "output_parameters": 28_312_128,
            "kv_scalars_per_token": (2 * 3 * 64,) * 30,
        }
    )


def layers(placement: Placement) -> list[tuple[str, int]]:
    return [(s.worker, s.last_layer - s.first_layer) for s in placement.pipelines[0].stages]


def test_equal_workers_compute_equally_the_output_head_counted() -> None:
    pool = [Offer(worker="a", memory_bytes=GIB), Offer(worker="b", memory_bytes=GIB)]
    placement = place(smol(), pool, dtype=BF16, settings=PlacementSettings())
    assert layers(placement) == [("a", 17), ("b", 13)]
    head_weights = 2 * (17 * 3_540_096 + 28_311_552)
    assert placement.pipelines[0].num_blocks == (GIB - 64 * 2**20 - head_weights) // (16 * 17 * 384 * 2)


def test_memory_decides_the_shares() -> None:
    model = make_card(num_layers=12).model_copy(update={"output_parameters": 0, "embedding_parameters": 0})
    pool = [Offer(worker="a", memory_bytes=10**6), Offer(worker="b", memory_bytes=2 * 10**6)]
    placement = place(model, pool, dtype=BF16, settings=PlacementSettings(overhead_bytes=0))
    assert layers(placement) == [("a", 4), ("b", 8)]


def test_blocks_are_what_the_fullest_stage_has_left() -> None:
    model = make_card(num_layers=2).model_copy(update={"output_parameters": 0, "embedding_parameters": 0})
    pool = [Offer(worker="a", memory_bytes=4000 + 50 * 16 * 64), Offer(worker="b", memory_bytes=4000 + 40 * 16 * 64)]
    settings = PlacementSettings(overhead_bytes=0, min_kv_tokens=16)
    placement = place(model, pool, dtype=FP32, settings=settings)
    assert placement.pipelines[0].num_blocks == 40


def test_a_worker_that_spoils_every_cut_is_left_out_with_its_reason() -> None:
    model = make_card(num_layers=2).model_copy(update={"output_parameters": 10_000, "embedding_parameters": 10_000})
    pool = [Offer(worker="big", memory_bytes=10**7), Offer(worker="tiny", memory_bytes=8_000)]
    placement = place(model, pool, dtype=FP32, settings=PlacementSettings(overhead_bytes=0, min_kv_tokens=16))
    assert layers(placement) == [("big", 2)]
    assert placement.reasons["tiny"] == "with it, no cut of the layers fits into everybody's memory"


def test_the_order_bends_so_that_head_and_tail_have_room() -> None:
    model = make_card(num_layers=3).model_copy(update={"output_parameters": 50_000, "embedding_parameters": 10})
    pool = [Offer(worker="big", memory_bytes=400_000), Offer(worker="small", memory_bytes=100_000)]
    placement = place(model, pool, dtype=FP32, settings=PlacementSettings(overhead_bytes=0, min_kv_tokens=16))
    assert [worker for worker, _ in layers(placement)] == ["small", "big"]


def test_a_site_is_crossed_once() -> None:
    pool = [Offer(worker=f"w{i}", memory_bytes=10**7, site="ab"[i % 2]) for i in range(4)]
    placement = place(make_card(num_layers=8), pool, dtype=FP32, settings=PlacementSettings(overhead_bytes=0))
    assert [worker for worker, _ in layers(placement)] == ["w0", "w2", "w1", "w3"]


def test_more_workers_than_layers_or_than_asked_for_stand_by() -> None:
    pool = [Offer(worker=f"w{i}", memory_bytes=10**7) for i in range(3)]
    two = place(make_card(num_layers=2), pool, dtype=FP32, settings=PlacementSettings(overhead_bytes=0))
    assert two.reasons["w2"] == "the model has only 2 layers"
    one = place(make_card(), pool, dtype=FP32, settings=PlacementSettings(overhead_bytes=0, max_stages=1))
    assert "1 stages" in one.reasons["w1"]


def test_missing_memory_is_counted() -> None:
    pool = [Offer(worker="w", memory_bytes=100 * 2**20)]
    placement = place(smol(), pool, dtype=BF16, settings=PlacementSettings(overhead_bytes=0))
    weights = 2 * (30 * 3_540_096 + 28_311_552 + 28_312_128)
    assert placement.missing_bytes == weights + 2048 * 30 * 384 * 2 - 100 * 2**20
    assert placement.problem is not None and "MiB of memory are missing" in placement.problem


def test_too_few_or_impossible_stages_are_said() -> None:
    pool = [Offer(worker="w", memory_bytes=10**7)]
    few = place(make_card(), pool, dtype=FP32, settings=PlacementSettings(overhead_bytes=0, min_stages=2))
    assert few.problem == "waiting for 2 workers that have room, 1 are there"
    many = place(make_card(), pool, dtype=FP32, settings=PlacementSettings(overhead_bytes=0, min_stages=9))
    assert many.problem == "9 stages asked for, the model has 4 layers"
    nobody = place(make_card(), [], dtype=FP32, settings=PlacementSettings())
    assert nobody.missing_bytes > 0


def test_dtype_is_bfloat16_only_where_everybody_is_best_at_it() -> None:
    assert choose_dtype(None, [(BF16, FP32), (BF16,)]) is BF16
    assert choose_dtype(None, [(BF16, FP32), (FP32, BF16)]) is FP32
    assert choose_dtype(None, [(BF16,), ()]) is FP32
    assert choose_dtype(None, []) is FP32
    assert choose_dtype(FP16, [(BF16,)]) is FP16
