"""Several pipelines: formed of idle workers, chosen by prediction, and there for each other's sequences."""

from __future__ import annotations

import pytest

from molink_scheduler import draining
from molink_scheduler.events import (
    EpochTaken,
    SequenceSaved,
    SequenceSubmitted,
    StartAnswered,
    TokensArrived,
    WorkerDisconnected,
    WorkerProbed,
)
from molink_scheduler.instructions import (
    AppendTokens,
    AssignStageTo,
    Instruction,
    ReleaseStageOf,
    SavePipeline,
    StartSequenceAt,
    StopSequenceAt,
    TakeEpoch,
)
from molink_scheduler.prediction import Load, finish_s, first_to_finish
from molink_scheduler.records import Snapshot
from tests.scheduler_builders import (
    HALVES,
    S2,
    Driver,
    beats_of,
    layout_of,
    make_heartbeat,
    make_request,
    make_settings,
    make_stage,
    make_step,
    running_driver,
)

W1, W2 = beats_of(1, "w1", "w2")
IDLE = (make_heartbeat("w3"), make_heartbeat("w4"))
W3, W4 = (make_heartbeat(w, stage=make_stage(2, k, HALVES[k], pipeline=2)) for k, w in enumerate(("w3", "w4")))


@pytest.fixture
def two() -> Driver:
    """Pipeline 1 in epoch 1 with a sequence, pipeline 2 in epoch 2."""
    driver = running_driver()
    assert driver.wait(1.5, beats=(W1, W2, *IDLE)) == [TakeEpoch(1, 2)]
    done = driver.do(EpochTaken(2, 2))
    assert [one.worker for one in done if isinstance(one, AssignStageTo)] == ["w3", "w4"]
    driver.beat(W3, W4)
    state = driver.machine.state(now_s=driver.now_s)
    assert [(one.pipeline, one.ready, one.stages) for one in state.pipelines] == [
        (1, True, ("w1", "w2")),
        (2, True, ("w3", "w4")),
    ]
    return driver


def start(driver: Driver, sequence: str) -> list[str]:
    driver.do(SequenceSubmitted(make_request(sequence), 8))
    done = driver.do(SequenceSaved(sequence))
    return [one.worker for one in done if isinstance(one, StartSequenceAt)]


def test_idle_workers_form_a_further_pipeline_while_the_first_one_serves(two: Driver) -> None:
    assert two.machine.state(now_s=two.now_s).ready


def test_too_few_of_them_stay_standbys() -> None:
    driver = running_driver()
    assert driver.wait(5, beats=(W1, W2, IDLE[0])) == []
    assert list(driver.machine.books.pipelines) == [1]


def test_no_more_pipelines_than_asked_for() -> None:
    driver = Driver(make_settings(pipelines=1))
    driver.beat(make_heartbeat("w1"), make_heartbeat("w2"))
    driver.do(EpochTaken(1))
    assert driver.wait(5, beats=(W1, W2, *IDLE)) == []


def test_a_new_sequence_goes_where_there_is_less_to_do(two: Driver) -> None:
    assert start(two, S2) == ["w3"]
    two.do(StartAnswered(S2, 2))
    assert two.do(TokensArrived(make_step(2, (S2, 0, 5, None), pipeline=2))) == [AppendTokens(S2, 0, (5,))]
    assert two.do(TokensArrived(make_step(2, (S2, 1, 6, None), pipeline=1))) == []


def test_the_sequences_of_a_lost_pipeline_move_to_a_living_one(two: Driver) -> None:
    two.do(WorkerDisconnected("w2"))
    done = two.do(WorkerProbed("w2", False))
    (moved,) = [one for one in done if isinstance(one, StartSequenceAt)]
    assert (moved.worker, moved.start.pipeline, moved.start.generated) == ("w3", 2, (11,))
    assert two.machine.state(now_s=two.now_s).ready
    two.beat(W1)
    assert list(two.machine.books.pipelines) == [2]
    role = {one.worker: one.role for one in two.machine.state(now_s=two.now_s).workers}
    assert role["w1"] == "standby"


def test_two_workers_left_over_become_the_next_pipeline_again(two: Driver) -> None:
    two.do(WorkerDisconnected("w2"))
    two.do(WorkerProbed("w2", False))
    assert TakeEpoch(2, 1) in two.wait(1.5, beats=(make_heartbeat("w1"), make_heartbeat("w5"), W3, W4))


def test_a_restart_takes_up_all_of_them_but_those_whose_workers_have_gone_on() -> None:
    second = layout_of(4, "w3", "w4").model_copy(update={"pipeline": 2})
    stale = layout_of(2, "w2", "w3").model_copy(update={"pipeline": 3})
    driver = Driver(snapshot=Snapshot(epoch=4, pipelines=(layout_of(1, "w1", "w2"), second, stale)))
    assert sorted(driver.machine.books.pipelines) == [1, 2]
    assert not [one for one in driver.all if isinstance(one, SavePipeline)]


def test_prediction() -> None:
    def load(pipeline: int, assigned: int, cycle_s: float | None, reported: int | None = None) -> Load:
        reported = assigned if reported is None else reported
        return Load(pipeline=pipeline, assigned=assigned, reported=reported, cycle_s=cycle_s)

    assert finish_s(load(1, 0, 0.1), tokens=20) == pytest.approx(2)
    assert finish_s(load(1, 4, 0.1), tokens=20) == pytest.approx(2.5)
    # sent there since the head spoke: they will share its time too
    assert finish_s(load(1, 4, 0.1, reported=1), tokens=20) == pytest.approx(10)
    assert finish_s(load(1, 4, None), tokens=20) is None
    # a fast pipeline with some work is better than a slow idle one, until it has too much
    assert first_to_finish([load(1, 3, 0.05), load(2, 0, 0.2)], tokens=100) == 1
    assert first_to_finish([load(1, 7, 0.05, reported=1), load(2, 0, 0.2)], tokens=100) == 2
    assert first_to_finish([load(1, 2, 0.05), load(2, 1, None)], tokens=100) == 2
    assert first_to_finish([load(2, 1, 0.1), load(1, 1, 0.1)], tokens=100) == 1


def fill(two: Driver) -> None:
    """Start sequences until four are at the second pipeline."""
    at_second = 0
    for number in range(16):
        sequence = f"{0xB0 + number:016x}"
        at_second += start(two, sequence) == ["w3"]
        two.do(StartAnswered(sequence, two.machine.books.sequences[sequence].epoch or 0))
        if at_second == 4:
            return
    raise AssertionError("sequences do not go to the second pipeline")


def test_a_leaving_workers_sequences_move_a_few_at_a_time(two: Driver) -> None:
    fill(two)
    here = [one.id for one in two.machine.books.sequences.values() if one.pipeline == 2]
    assert len(here) == 4
    leaving = W4.model_copy(update={"leaving": True})

    def moved(beats: list[Instruction]) -> list[str]:
        stopped = [one.stop.sequence for one in beats if isinstance(one, StopSequenceAt)]
        started = [(one.worker, one.start.sequence) for one in beats if isinstance(one, StartSequenceAt)]
        assert started == [("w1", sequence) for sequence in stopped], "stopped where they were, started elsewhere"
        return stopped

    first = moved(two.beat(leaving))
    assert len(first) == draining.MOST_MOVING
    assert moved(two.beat(leaving)) == [], "until one of them goes on"
    assert start(two, S2) == ["w1"], "nothing new comes in"
    two.do(StartAnswered(first[0], 1))
    two.do(TokensArrived(make_step(1, (first[0], 0, 5, None))))
    second = moved(two.beat(leaving))
    assert len(second) == 1
    for sequence in (first[1], *second):
        two.do(StartAnswered(sequence, 1))
        two.do(TokensArrived(make_step(1, (sequence, 0, 5, None))))
    last = moved(two.beat(leaving))
    assert sorted([*first, *second, *last]) == sorted(here)
    done = two.beat(leaving)
    assert list(two.machine.books.pipelines) == [1]
    assert ReleaseStageOf("w4", 2) in done or ReleaseStageOf("w4", 2) in two.beat(leaving)


def test_a_pipeline_that_drains_serves_when_the_other_is_lost(two: Driver) -> None:
    fill(two)
    leaving = W4.model_copy(update={"leaving": True})
    two.beat(leaving)
    two.do(WorkerDisconnected("w1"))
    two.do(WorkerProbed("w1", is_there=False))
    assert not two.machine.books.pipelines[2].is_draining
    assert start(two, S2) == ["w3"]
