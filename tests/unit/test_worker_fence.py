"""Which frames a stage lets in."""

from __future__ import annotations

from dataclasses import replace

from molink_common.identity import sequence_id
from molink_common.messages import Dtype
from molink_common.wire import Entry, StepFrame, Traffic
from molink_stage_worker.fence import Drop, Fence


def frame(step: int, *, pipeline: int = 1, epoch: int = 3) -> StepFrame:
    return StepFrame(
        pipeline=pipeline,
        epoch=epoch,
        step=step,
        entries=(),
        extra=b"",
        hidden_size=4,
        dtype=Dtype.FLOAT32,
        hidden=memoryview(b""),
    )


def entry(start: int, count: int, *, opens: bool = False, sequence: int = 7) -> Entry:
    return Entry(sequence=sequence, start=start, count=count, opens=opens)


def test_only_newer_frames_of_this_pipeline_and_epoch_count() -> None:
    fence = Fence(pipeline=1, epoch=3, block_size=4)
    assert fence.check(frame(5)) is None
    assert fence.check(frame(5)) is Drop.SEEN_ALREADY
    assert fence.check(frame(4)) is Drop.SEEN_ALREADY
    assert fence.check(frame(9, epoch=2)) is Drop.OTHER_EPOCH
    assert fence.check(frame(9, pipeline=2)) is Drop.OTHER_PIPELINE
    assert fence.check(frame(6)) is None
    assert fence.check(frame(9)) is None
    assert fence.dropped == {Drop.SEEN_ALREADY: 2, Drop.OTHER_EPOCH: 1, Drop.OTHER_PIPELINE: 1}


def test_a_hole_makes_a_hole_of_everything_after_it() -> None:
    fence = Fence(pipeline=1, epoch=3, block_size=4)
    assert fence.enter(1, [entry(0, 4, opens=True), entry(0, 2, opens=True, sequence=8)], {}) is None
    assert fence.enter(1, [entry(5, 4)], {}) is Drop.HOLE
    assert fence.enter(1, [entry(4, 1)], {}) is Drop.HOLE
    assert fence.enter(1, [entry(2, 1, sequence=8)], {}) is None
    assert fence.enter(1, [entry(0, 4, opens=True)], {}) is None
    assert fence.enter(1, [entry(4, 1)], {}) is None
    assert fence.dropped.total() == 2


def test_only_an_opening_goes_back_and_nothing_goes_on_after_a_close() -> None:
    fence = Fence(pipeline=1, epoch=3, block_size=4)
    fence.enter(1, [entry(0, 4, opens=True)], {})
    # the step that opened it again at 0 was lost, the one behind it arrives
    assert fence.enter(1, [entry(2, 1)], {}) is Drop.HOLE
    fence.enter(1, [entry(0, 4, opens=True)], {})
    assert fence.enter(1, [entry(2, 1, opens=True)], {}) is None
    assert fence.enter(1, [entry(4, 1)], {}) is Drop.HOLE  # it went back to 3
    fence.enter(1, [entry(0, 4, opens=True)], {})
    assert fence.enter(1, [entry(4, 1)], {sequence_id(7): 1}) is Drop.HOLE


def test_what_the_engine_refuses_is_a_hole_too() -> None:
    fence = Fence(pipeline=1, epoch=3, block_size=4)
    fence.enter(1, [entry(0, 4, opens=True)], {})
    fence.refuse([entry(0, 4)], Drop.REFUSED)
    assert fence.enter(1, [entry(4, 1)], {}) is Drop.HOLE


def test_each_class_has_its_own_order() -> None:
    fence = Fence(pipeline=1, epoch=3, block_size=4)
    assert fence.check(frame(5)) is None
    assert fence.check(replace(frame(4), traffic=Traffic.BULK)) is None
    assert fence.check(replace(frame(4), traffic=Traffic.BULK)) is Drop.SEEN_ALREADY
    assert fence.check(replace(frame(6), traffic=Traffic.BULK)) is None
    assert fence.check(frame(6)) is None


def test_a_close_that_the_next_life_has_overtaken_does_nothing() -> None:
    fence = Fence(pipeline=1, epoch=3, block_size=4)
    fence.enter(3, [entry(0, 4, opens=True)], {})
    fence.enter(8, [entry(0, 5, opens=True)], {})
    assert fence.enter(7, [], {sequence_id(7): 3}) is None
    assert fence.enter(9, [entry(5, 1)], {}) is None
    assert fence.enter(10, [entry(6, 1)], {sequence_id(7): 8}) is Drop.HOLE


def test_a_sequence_opens_again_only_where_what_is_before_is_here() -> None:
    fence = Fence(pipeline=1, epoch=3, block_size=4)
    assert fence.enter(1, [entry(4, 1, opens=True)], {}) is Drop.HOLE
    fence.enter(2, [entry(0, 4, opens=True)], {})
    fence.enter(3, [entry(4, 4)], {})
    assert fence.enter(4, [entry(6, 1, opens=True)], {}) is None
    assert fence.enter(5, [entry(8, 1, opens=True)], {}) is Drop.HOLE  # it went back to 7
    assert fence.enter(6, [entry(0, 2, opens=True)], {}) is None
