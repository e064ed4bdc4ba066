"""What idle workers preload, and how a leaving worker's place is taken."""

from __future__ import annotations

from molink_common.messages import Heartbeat, LayerRange
from molink_scheduler.events import EpochTaken, PreloadAnswered, WorkerDisconnected, WorkerProbed
from molink_scheduler.instructions import AssignStageTo, PreloadStagesAt, ReleaseStageOf, TakeEpoch
from tests.scheduler_builders import HALVES, Driver, beats_of, make_heartbeat, make_stage, ready_driver, running_driver

FIRST, SECOND = HALVES
W1, W2 = beats_of(1, "w1", "w2")


def told(driver: Driver) -> list[tuple[str, tuple[LayerRange, ...]]]:
    return [(one.worker, one.stages.layers) for one in driver.all if isinstance(one, PreloadStagesAt)]


def leaving(beat: Heartbeat) -> Heartbeat:
    return beat.model_copy(update={"leaving": True})


def test_standbys_preload_all_stages_beginning_with_different_ones() -> None:
    driver = ready_driver("w3", "w4", "w5")
    assert told(driver) == [("w3", (FIRST, SECOND)), ("w4", (SECOND, FIRST)), ("w5", (FIRST, SECOND))]
    order = next(one.stages for one in driver.all if isinstance(one, PreloadStagesAt))
    layout = driver.machine.books.pipeline.layout
    assert layout is not None
    assert (order.fingerprint, order.num_blocks, order.dtype) == ("f" * 16, layout.num_blocks, layout.dtype)


def test_only_what_was_not_taken_is_said_again() -> None:
    driver = ready_driver("w3", "w4")
    driver.do(PreloadAnswered("w3"))
    driver.do(PreloadAnswered("w4", "no answer"))
    beats = (W1, W2, make_heartbeat("w3"), make_heartbeat("w4"))
    driver.wait(5.5, beats=beats)
    assert [worker for worker, _ in told(driver)] == ["w3", "w4", "w4"]


def test_a_worker_that_has_started_again_is_told_again() -> None:
    driver = ready_driver("w3")
    driver.do(PreloadAnswered("w3"))
    driver.beat(make_heartbeat("w3", preparing="reading"), make_heartbeat("w3"))
    assert [worker for worker, _ in told(driver)] == ["w3", "w3"]


def test_the_state_says_what_a_standby_has_in_memory() -> None:
    driver = ready_driver("w3")
    driver.beat(make_heartbeat("w3", preloaded=(SECOND,)))
    reason = next(one.reason for one in driver.machine.state(now_s=driver.now_s).workers if one.worker == "w3")
    assert reason.endswith("it has stage 1 in memory, to take over at once")


def test_workers_that_joined_while_stages_change_are_told_the_new_cuts() -> None:
    driver = running_driver()
    driver.do(WorkerDisconnected("w2"))
    driver.do(WorkerProbed("w2", False))
    driver.do(EpochTaken(2))  # one stage is left
    driver.beat(make_heartbeat("w1", stage=make_stage(2, 0, (0, 4))), make_heartbeat("w3"))
    assert told(driver) == [("w3", ((0, 4),))]


def test_a_leaving_worker_s_successor_loads_first() -> None:
    driver = running_driver("w3")
    driver.do(PreloadAnswered("w3"))
    going, cold, warm = leaving(W2), make_heartbeat("w3"), make_heartbeat("w3", preloaded=(SECOND,))
    assert driver.wait(2, beats=(W1, going, cold)) == []
    assert told(driver) == [("w3", (FIRST, SECOND)), ("w3", (SECOND, FIRST))]
    assert driver.machine.state(now_s=driver.now_s).ready
    assert driver.beat(warm) == [TakeEpoch(1)]
    done = driver.do(EpochTaken(2))
    assert [(one.worker, one.stage.continues_epoch) for one in done if isinstance(one, AssignStageTo)] == [
        ("w1", 1),
        ("w3", None),
    ]
    assert done[-1] == ReleaseStageOf("w2", 1)


def test_it_does_not_wait_for_loading_longer_than_half_of_its_patience() -> None:
    driver = running_driver("w3")
    cold = make_heartbeat("w3")
    assert driver.wait(4.5, beats=(W1, leaving(W2), cold)) == []
    assert driver.wait(1.5, beats=(W1, leaving(W2), cold)) == [TakeEpoch(1)]


def test_a_successor_that_is_gone_leaves_everything_as_it_was() -> None:
    driver = running_driver("w3")
    small = make_heartbeat("w1", memory_bytes=1).model_copy(update={"stage": W1.stage})
    driver.beat(small, leaving(W2), make_heartbeat("w3", preloaded=(SECOND,)))
    assert TakeEpoch(1) in driver.all
    driver.do(WorkerDisconnected("w3"))
    driver.do(WorkerProbed("w3", False))
    assert driver.do(EpochTaken(2)) == []
    assert driver.machine.state(now_s=driver.now_s).ready


def test_two_leave_one_after_the_other() -> None:
    driver = running_driver("w3", "w4")
    both = (HALVES[1], HALVES[0])
    warm = tuple(make_heartbeat(name, preloaded=both) for name in ("w3", "w4"))
    assert driver.beat(*warm, leaving(W2)) == [TakeEpoch(1)]
    assert driver.beat(leaving(W1)) == []
    done = driver.do(EpochTaken(2))
    swapped = [one.worker for one in done if isinstance(one, AssignStageTo)]
    assert swapped == ["w1", "w3"]
    first, second = beats_of(2, "w1", "w3")
    driver.beat(leaving(first), second)
    assert driver.beat(leaving(first)) == [TakeEpoch(2)]
    assert [one.worker for one in driver.do(EpochTaken(3)) if isinstance(one, AssignStageTo)] == ["w4", "w3"]
