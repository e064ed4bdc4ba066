"""Which engines a worker keeps beside the stage that it holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from molink_common.messages import AssignStage, Dtype
from molink_stage_worker.engine.interface import StageSpec
from molink_stage_worker.engine_shelf import EngineShelf, Held
from molink_stage_worker.kept_stage import why_not_continued
from molink_stage_worker.stage_loading import Blocks, Weights, kv_bytes, weight_bytes
from tests.integration.counting_engine import CARD, CountingEngine


class SizedEngine(CountingEngine):
    def __init__(self, size_bytes: int) -> None:
        super().__init__(
            StageSpec(
                checkpoint=Path(),
                first_layer=0,
                last_layer=1,
                num_layers=1,
                dtype=Dtype.FLOAT32,
                device="cpu",
                num_blocks=1,
                block_size=1,
            )
        )
        self.size_bytes = size_bytes

    @property
    def weight_bytes(self) -> int:
        return self.size_bytes


def weights(first: int, last: int) -> Weights:
    return Weights(fingerprint="f", first_layer=first, last_layer=last, dtype=Dtype.FLOAT32)


A, B, C = weights(0, 1), weights(1, 2), weights(2, 3)


def shelf(*kept: Weights, room_bytes: int = 100, each_bytes: int = 30) -> EngineShelf:
    made = EngineShelf(room_bytes)
    for one in kept:
        assert made.put(one, SizedEngine(each_bytes))
    return made


def there(kept: EngineShelf) -> set[Weights]:
    return {one for one in (A, B, C) if one in kept}


def test_an_engine_is_taken_once() -> None:
    kept = shelf(A)
    engine = kept.take(A)
    assert engine is not None
    assert kept.take(A) is None
    assert kept.put(A, engine)
    assert not kept.put(A, SizedEngine(1)), "a second one of the same weights"
    assert kept.take(A) is engine


def test_what_came_first_goes_first() -> None:
    kept = shelf(A, B, each_bytes=50)
    assert kept.put(C, SizedEngine(50))
    assert there(kept) == {B, C}


def test_what_is_wanted_stays_longest() -> None:
    kept = shelf(A, B, C)
    kept.wanted = (A, B)
    assert kept.make_room(40)
    assert there(kept) == {A, B}
    assert kept.make_room(70)
    assert there(kept) == {A}
    assert not kept.make_room(71, sparing=(A,))
    assert there(kept) == {A}
    assert kept.make_room(100)
    assert there(kept) == set()


def test_the_stage_that_is_held_has_its_room_first() -> None:
    kept = shelf(A, B, C)
    kept.hold(Held(weights=weights(3, 4), weight_bytes=30, kv_bytes=10))
    assert there(kept) == {B, C}
    kept.hold(None)
    assert kept.put(A, SizedEngine(30))


def test_what_the_stage_will_take_is_not_dropped_for_it_nor_counted_twice() -> None:
    kept = shelf(A, B, C)
    kept.hold(Held(weights=A, weight_bytes=30, kv_bytes=10))
    assert there(kept) == {A, B, C}
    engine = kept.take(A)
    assert engine is not None
    kept.make_room(0)
    assert there(kept) == {B, C}
    kept.hold(Held(weights=A, weight_bytes=30, kv_bytes=70))  # the same layers again, with many more blocks
    assert there(kept) == set()
    assert kept.put(A, engine)


def test_an_engine_that_is_too_large_is_not_kept() -> None:
    assert not shelf(room_bytes=10).put(A, SizedEngine(11))


def test_the_card_says_what_a_stage_takes() -> None:
    blocks = Blocks(num_blocks=10, block_size=4)
    whole, head, middle, tail = weights(0, 6), weights(0, 2), weights(2, 4), weights(4, 6)
    assert [weight_bytes(CARD, one) for one in (whole, head, middle, tail)] == [32, 12, 8, 12]
    assert [kv_bytes(CARD, one, blocks) for one in (whole, middle)] == [6 * 160, 2 * 160]


def stage(**changes: object) -> AssignStage:
    place = {"pipeline": 1, "epoch": 4, "fingerprint": "f", "index": 1, "num_stages": 3}
    sizes = {"first_layer": 1, "last_layer": 2, "dtype": "float32", "num_blocks": 8, "block_size": 4}
    return AssignStage.model_validate({**place, **sizes, **changes})


def test_a_stage_is_continued_only_as_it_is() -> None:
    held = stage()
    assert why_not_continued(held, stage(epoch=5, continues_epoch=4, rebuild=2)) is None
    assert why_not_continued(held, stage(epoch=5, continues_epoch=4)) is None


@pytest.mark.parametrize(
    ("held", "changes", "reason"),
    [
        (None, {}, "holds no stage"),
        (stage(), {"continues_epoch": 3}, "holds a stage of epoch 4"),
        (stage(), {"pipeline": 2}, "of pipeline 1"),
        (stage(), {"num_blocks": 9}, "another num_blocks"),
        (stage(), {"last_layer": 3, "index": 0}, "another index and last_layer"),
        (stage(), {"dtype": "bfloat16"}, "another dtype"),
        (stage(), {"codec": "int8"}, "another codec"),
    ],
)
def test_it_says_why_a_stage_is_not_continued(
    held: AssignStage | None, changes: dict[str, object], reason: str
) -> None:
    problem = why_not_continued(held, stage(**{"epoch": 5, "continues_epoch": 4, **changes}))
    assert problem is not None
    assert reason in problem
