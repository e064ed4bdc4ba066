"""A lost stage is given to a standby; the layer map stays, and what is left goes on."""

from __future__ import annotations

import pytest

from molink_common.messages import AssignStage, FinishReason, SequencesHeld, StagePhase
from molink_scheduler.books import PipelinePhase, SequencePhase
from molink_scheduler.events import (
    AssignAnswered,
    EpochTaken,
    SequenceSaved,
    SequencesHeldArrived,
    SequenceSubmitted,
    StartAnswered,
    TokensArrived,
    WorkerDisconnected,
    WorkerProbed,
)
from molink_scheduler.instructions import (
    AppendTokens,
    AskSequencesOf,
    AssignStageTo,
    DeleteSequence,
    Instruction,
    ReleaseStageOf,
    SavePipeline,
    StartSequenceAt,
    TakeEpoch,
)
from molink_scheduler.records import Snapshot, StoredSequence
from tests.scheduler_builders import (
    HALVES,
    S1,
    S2,
    Driver,
    beats_of,
    layout_of,
    make_heartbeat,
    make_request,
    make_stage,
    make_step,
    record_of,
    running_driver,
    start_of,
)


@pytest.fixture
def running() -> Driver:
    """One sequence with one token, two stages, one standby."""
    return running_driver("w3")


def die(driver: Driver, name: str) -> list[Instruction]:
    driver.do(WorkerDisconnected(name))
    return driver.do(WorkerProbed(name, False))


def told(done: list[Instruction]) -> dict[str, AssignStage]:
    return {one.worker: one.stage for one in done if isinstance(one, AssignStageTo)}


def test_the_tail_is_replaced_and_the_head_goes_on_with_its_sequences(running: Driver) -> None:
    running.do(SequenceSubmitted(make_request(S2), 8))
    running.do(SequenceSaved(S2))  # sent to the head, which has not answered
    assert die(running, "w2") == [TakeEpoch(1)]
    done = running.do(EpochTaken(2))
    layout = layout_of(2, "w1", "w3").model_copy(update={"continued_epochs": (1,)})
    assert done[0] == SavePipeline(layout.model_copy(update={"num_blocks": done[0].record.num_blocks}))  # type: ignore[union-attr]
    stages = told(done)
    assert {w: (s.index, s.continues_epoch, s.rebuild) for w, s in stages.items()} == {
        "w1": (0, 1, 1),
        "w3": (1, None, 1),
    }
    books = running.machine.books
    assert (books.sequences[S1].phase, books.sequences[S1].epoch) == (SequencePhase.RUNNING, 2)
    # the last tokens of the old epoch may still be on their way
    assert running.do(TokensArrived(make_step(1, (S1, 1, 12, None)))) == [AppendTokens(S1, 1, (12,))]
    done = running.beat(*beats_of(2, "w1", "w3"))
    assert done == [AskSequencesOf("w1", 1), StartSequenceAt("w1", start_of(S2, 2, interruptions=1))]
    assert running.do(TokensArrived(make_step(1, (S1, 2, 99, None)))) == []
    held = SequencesHeld(pipeline=1, epoch=2, sequences=(S1, S2))
    assert running.do(SequencesHeldArrived(held, running.now_s)) == []
    assert running.do(TokensArrived(make_step(2, (S1, 2, 13, FinishReason.STOP)))) == [DeleteSequence(S1)]


def test_what_the_head_took_at_the_last_moment_is_heard(running: Driver) -> None:
    running.do(SequenceSubmitted(make_request(S2), 8))
    running.do(SequenceSaved(S2))
    die(running, "w2")
    running.do(EpochTaken(2))
    assert AppendTokens(S2, 0, (5,)) in running.do(TokensArrived(make_step(2, (S2, 0, 5, None))))


def test_what_the_head_lost_is_started_again(running: Driver) -> None:
    die(running, "w2")
    running.do(EpochTaken(2))
    running.beat(*beats_of(2, "w1", "w3"))
    nothing = SequencesHeld(pipeline=1, epoch=2, sequences=())
    done = running.do(SequencesHeldArrived(nothing, running.now_s))
    assert done == [StartSequenceAt("w1", start_of(S1, 2, (11,), interruptions=1))]


def test_a_new_head_begins_with_the_tokens_and_the_others_keep_their_place(running: Driver) -> None:
    assert die(running, "w1") == [TakeEpoch(1)]
    stages = told(running.do(EpochTaken(2)))
    assert {w: (s.index, s.continues_epoch, s.rebuild) for w, s in stages.items()} == {
        "w3": (0, None, None),
        "w2": (1, None, None),
    }
    assert running.do(TokensArrived(make_step(1, (S1, 1, 12, None)))) == []
    assert running.beat(*beats_of(2, "w3", "w2")) == [StartSequenceAt("w3", start_of(S1, 2, (11,), interruptions=1))]


def test_two_losses_need_two_standbys_and_leave_nothing_to_go_on_with() -> None:
    driver = running_driver("w3", "w4")
    die(driver, "w2")
    die(driver, "w1")
    stages = told(driver.do(EpochTaken(2)))
    assert {w: (s.index, s.continues_epoch) for w, s in stages.items()} == {"w3": (0, None), "w4": (1, None)}


def test_a_standby_with_the_layers_in_memory_comes_first_then_a_near_one_then_the_largest() -> None:
    driver = running_driver()
    driver.beat(
        make_heartbeat("small", memory_bytes=1_100_000),
        make_heartbeat("large", memory_bytes=90_000_000, site="far"),
        make_heartbeat("tiny", memory_bytes=100),
        make_heartbeat("warm", memory_bytes=20_000_000, site="far", preloaded=((2, 4),)),
    )
    die(driver, "w2")
    assert list(told(driver.do(EpochTaken(2)))) == ["w1", "warm"]
    die(driver, "warm")
    assert list(told(driver.do(EpochTaken(3)))) == ["w1", "large"]


def test_a_refusal_to_go_on_keeps_the_layer_map_but_starts_afresh(running: Driver) -> None:
    die(running, "w2")
    running.do(EpochTaken(2))
    assert running.do(AssignAnswered("w1", 2, "it has lost the KV blocks")) == [TakeEpoch(2)]
    stages = told(running.do(EpochTaken(3)))
    assert {w: (s.index, s.continues_epoch) for w, s in stages.items()} == {"w1": (0, None), "w3": (1, None)}
    assert running.beat(*beats_of(3, "w1", "w3")) == [StartSequenceAt("w1", start_of(S1, 3, (11,), interruptions=2))]


def test_a_standby_that_fails_and_no_other_means_a_new_placement(running: Driver) -> None:
    die(running, "w2")
    running.do(EpochTaken(2))
    failed = make_heartbeat("w3", stage=make_stage(2, 1, HALVES[1], StagePhase.FAILED))
    assert running.beat(failed) == [TakeEpoch(2)]
    assert running.machine.books.pipeline.phase is PipelinePhase.FORMING
    assert [s.num_stages for s in told(running.do(EpochTaken(3))).values()] == [1]


def test_a_standby_that_is_gone_by_then_means_a_new_placement(running: Driver) -> None:
    die(running, "w2")
    die(running, "w3")
    assert running.do(EpochTaken(2)) == [TakeEpoch(2)]
    assert list(told(running.do(EpochTaken(3)))) == ["w1"]


def test_a_worker_that_comes_back_is_a_standby(running: Driver) -> None:
    _, old = beats_of(1, "w1", "w2")
    die(running, "w2")
    running.do(EpochTaken(2))
    running.beat(*beats_of(2, "w1", "w3"))
    assert running.beat(old) == [ReleaseStageOf("w2", 1)]
    running.beat(make_heartbeat("w2"))
    roles = {one.worker: one.role for one in running.machine.state(now_s=running.now_s).workers}
    assert roles["w2"] == "standby"


def test_a_worker_that_restarted_at_once_takes_its_own_place() -> None:
    driver = running_driver()
    assert driver.beat(make_heartbeat("w2")) == [TakeEpoch(1)]
    stages = told(driver.do(EpochTaken(2)))
    assert {w: (s.index, s.continues_epoch, s.rebuild) for w, s in stages.items()} == {
        "w1": (0, 1, 1),
        "w2": (1, None, 1),
    }


def test_nothing_waits_for_a_settled_pool_while_somebody_is_served() -> None:
    driver = running_driver()
    assert die(driver, "w2") == [TakeEpoch(1)]


def test_a_restart_takes_up_what_was_started_before_a_replacement() -> None:
    layout = layout_of(5, "w1", "w3").model_copy(update={"continued_epochs": (3, 4)})
    stored = (
        StoredSequence(record=record_of(S1, 3), tokens=(11,)),
        StoredSequence(record=record_of(S2, 2), tokens=()),
    )
    snapshot = Snapshot(epoch=5, pipelines=(layout,), sequences=stored, workers=beats_of(5, "w1", "w3"))
    driver = Driver(snapshot=snapshot)
    starts = [one for one in driver.all if isinstance(one, StartSequenceAt)]
    assert starts == [StartSequenceAt("w1", start_of(S2, 5))]
    driver.do(StartAnswered(S2, 5))
    assert driver.do(TokensArrived(make_step(5, (S1, 1, 12, None)))) == [AppendTokens(S1, 1, (12,))]
