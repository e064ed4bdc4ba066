"""Losses that a standby does not make good, and the restart of the scheduler."""

from __future__ import annotations

import pytest

from molink_common.messages import (
    Admitted,
    FinishReason,
    RefusalCode,
    SequencesHeld,
    StopSequence,
)
from molink_scheduler.books import PipelinePhase, SequencePhase
from molink_scheduler.events import (
    EpochTaken,
    GatewayAliveArrived,
    SequenceSaved,
    SequencesHeldArrived,
    SequenceSubmitted,
    StartAnswered,
    StoreEmptied,
    Tick,
    TokensArrived,
)
from molink_scheduler.instructions import (
    AppendTokens,
    AskSequencesOf,
    AssignStageTo,
    DeleteSequence,
    FailSequence,
    Instruction,
    ReleaseStageOf,
    ReplyTo,
    SavePipeline,
    SaveSequence,
    StartSequenceAt,
    StopSequenceAt,
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
    make_card,
    make_heartbeat,
    make_request,
    make_settings,
    make_stage,
    make_step,
    ready_driver,
    record_of,
    refusal,
    running_driver,
    start_of,
)


@pytest.fixture
def ready() -> Driver:
    return ready_driver()


@pytest.fixture
def running() -> Driver:
    return running_driver()


def test_a_silent_head_means_a_new_epoch_and_the_sequences_go_on(running: Driver) -> None:
    w1, w2, w3 = *beats_of(1, "w1", "w2"), make_heartbeat("w3")
    running.beat(w1, w3)
    assert running.wait(1.5, beats=(w2, w3)) == []
    assert running.wait(0.5, beats=(w2, w3)) == [TakeEpoch(1)]
    waiting = running.do(SequenceSubmitted(make_request(S2), 8))
    assert waiting == [SaveSequence(record_of(S2))]
    assert running.do(SequenceSaved(S2)) == [ReplyTo(8, Admitted(sequence=S2))]
    done = running.do(EpochTaken(2))
    assert [(one.worker, one.stage.index) for one in done if isinstance(one, AssignStageTo)] == [("w3", 0), ("w2", 1)]
    assert running.do(TokensArrived(make_step(1, (S1, 1, 12, None)))) == []
    assert running.beat(*beats_of(2, "w3", "w2")) == [
        StartSequenceAt("w3", start_of(S1, 2, (11,), interruptions=1)),
        StartSequenceAt("w3", start_of(S2, 2)),
    ]
    assert running.beat(w1) == [ReleaseStageOf("w1", 1)]
    assert running.do(TokensArrived(make_step(2, (S1, 1, 12, FinishReason.STOP)))) == [DeleteSequence(S1)]


def test_recovery_uses_fewer_workers_than_asked_for_rather_than_none(running: Driver) -> None:
    done = running.wait(6, beats=beats_of(1, "w1", "w2")[:1])
    assert done == [TakeEpoch(1)]
    done = running.do(EpochTaken(2))
    assert [(one.worker, one.stage.num_stages) for one in done if isinstance(one, AssignStageTo)] == [("w1", 1)]


def test_a_worker_that_restarted_without_its_stage_is_a_loss(running: Driver) -> None:
    assert running.beat(make_heartbeat("w2")) == [TakeEpoch(1)]


def test_a_leaving_worker_is_replaced_if_the_others_can_hold_the_model(running: Driver) -> None:
    leaving = make_heartbeat("w2", stage=make_stage(1, 1, HALVES[1]), leaving=True)
    assert running.beat(leaving) == [TakeEpoch(1)]
    done = running.do(EpochTaken(2))
    assert ReleaseStageOf("w2", 1) in done


def test_a_leaving_worker_that_cannot_be_spared_serves_on() -> None:
    driver = Driver()
    small = {"memory_bytes": 100_000}
    driver.beat(make_heartbeat("w1", **small), make_heartbeat("w2", **small))  # type: ignore[arg-type]
    driver.do(EpochTaken(1))
    beats = [make_heartbeat(w, stage=make_stage(1, k, HALVES[k]), **small) for k, w in enumerate(("w1", "w2"))]  # type: ignore[arg-type]
    driver.beat(*beats)
    assert driver.beat(beats[1].model_copy(update={"leaving": True})) == []
    assert driver.machine.state(now_s=driver.now_s).ready


def test_a_head_that_stands_still_is_given_a_new_epoch(running: Driver) -> None:
    stuck = make_heartbeat("w1", stage=make_stage(1, 0, HALVES[0], oldest_step_age_s=31))
    other = beats_of(1, "w1", "w2")[1]
    running.do(GatewayAliveArrived("g1"))
    for _ in range(3):
        running.wait(9, beats=(stuck, other))
        running.do(GatewayAliveArrived("g1"))
    assert TakeEpoch(1) not in running.all
    assert TakeEpoch(1) in running.wait(4, beats=(stuck, other))


def test_sequences_fail_in_words_when_no_pipeline_comes_back(running: Driver) -> None:
    done: list[Instruction] = []
    for _ in range(14):
        done += running.wait(5)
        running.do(GatewayAliveArrived("g1"))
    assert [type(one) for one in done] == [FailSequence, DeleteSequence]
    failed = done[0]
    assert isinstance(failed, FailSequence) and "within 60 s" in failed.failed.message
    assert refusal(running.do(SequenceSubmitted(make_request(S2), 9))).code is RefusalCode.NO_PIPELINE


def test_a_submission_waits_for_a_pipeline_all_of_whose_workers_have_gone(ready: Driver) -> None:
    ready.wait(6)
    assert ready.machine.state(now_s=ready.now_s).workers == ()
    assert ready.do(SequenceSubmitted(make_request(S1), 7)) == [SaveSequence(record_of(S1))]
    ready.do(SequenceSaved(S1))
    stranger = make_heartbeat("x", card=make_card(fingerprint="0" * 16))
    assert ready.wait(5, beats=(stranger,)) == []
    assert ready.beat(make_heartbeat("w3")) == [TakeEpoch(1)]


def test_a_sequence_that_no_longer_fits_fails() -> None:
    small = make_heartbeat("w1", memory_bytes=35_000)
    driver = Driver(make_settings(min_kv_tokens=16))
    driver.beat(small, make_heartbeat("w2", memory_bytes=35_000))
    driver.do(EpochTaken(1))
    loaded = [
        small.model_copy(update={"worker": w, "stage": make_stage(1, k, HALVES[k])}) for k, w in enumerate(("w1", "w2"))
    ]
    driver.beat(*loaded)
    driver.do(SequenceSubmitted(make_request(S1, max_tokens=100), 1))
    driver.do(SequenceSaved(S1))
    driver.wait(6, beats=tuple(loaded[:1]))
    driver.do(EpochTaken(2))
    done = driver.beat(small.model_copy(update={"stage": make_stage(2, 0, (0, 4))}))
    assert [type(one) for one in done] == [FailSequence, DeleteSequence]
    assert isinstance(done[0], FailSequence) and "103" in done[0].failed.message


def test_an_outage_of_the_broker_is_nobody_s_silence(running: Driver) -> None:
    for _ in range(20):
        assert running.do(Tick(bus_up=False), after_s=1) == []
    assert running.do(Tick(), after_s=1) in ([], [AskSequencesOf("w1", 1)])
    assert running.machine.state(now_s=running.now_s).ready


def test_more_workers_are_taken_in_when_nobody_is_served() -> None:
    driver = Driver(make_settings(stages="auto", pipelines=1))
    driver.wait(1.5, beats=(make_heartbeat("w1"),))
    driver.do(EpochTaken(1))
    alone = make_heartbeat("w1", stage=make_stage(1, 0, (0, 4)))
    driver.beat(alone)
    driver.do(SequenceSubmitted(make_request(S1), 1))
    driver.do(SequenceSaved(S1))
    driver.do(StartAnswered(S1, 1))
    assert driver.wait(3, beats=(alone, make_heartbeat("w2"))) == []
    standby = driver.machine.state(now_s=driver.now_s).workers[1]
    assert standby.role == "standby" and "when no sequence runs" in standby.reason
    driver.do(TokensArrived(make_step(1, (S1, 0, 11, FinishReason.STOP))))
    assert driver.wait(2, beats=(alone, make_heartbeat("w2"))) == [TakeEpoch(1)]
    assert driver.do(SequenceSubmitted(make_request(S2), 2)) != []
    done = driver.do(EpochTaken(2))
    assert [one.worker for one in done if isinstance(one, AssignStageTo)] == ["w1", "w2"]


def test_a_restart_takes_up_what_the_store_has() -> None:
    beats = beats_of(4, "w1", "w2")
    snapshot = Snapshot(
        epoch=4,
        pipelines=(layout_of(4, "w1", "w2"),),
        sequences=(
            StoredSequence(record=record_of(S1, 4), tokens=(11, 12)),
            StoredSequence(record=record_of(S2), tokens=()),
        ),
        workers=beats[:1],
    )
    driver = Driver(snapshot=snapshot)
    assert not driver.machine.state(now_s=driver.now_s).ready
    assert driver.wait(1) == []
    assert driver.beat(beats[1]) == [AskSequencesOf("w1", 1), StartSequenceAt("w1", start_of(S2, 4))]
    done = driver.do(
        SequencesHeldArrived(SequencesHeld(pipeline=1, epoch=4, sequences=("00000000000000ff",)), driver.now_s)
    )
    stranger = StopSequence(pipeline=1, sequence="00000000000000ff")
    assert done == [DeleteSequence(S1), StopSequenceAt("w1", stranger)]


def test_a_restart_keeps_what_the_head_holds() -> None:
    snapshot = Snapshot(
        epoch=4,
        pipelines=(layout_of(4, "w1", "w2"),),
        sequences=(StoredSequence(record=record_of(S1, 4), tokens=(11, 12)),),
        workers=beats_of(4, "w1", "w2"),
    )
    driver = Driver(snapshot=snapshot)
    assert driver.machine.state(now_s=driver.now_s).ready
    assert AskSequencesOf("w1", 1) in driver.all
    assert driver.do(SequencesHeldArrived(SequencesHeld(pipeline=1, epoch=4, sequences=(S1,)), driver.now_s)) == []
    assert driver.do(TokensArrived(make_step(4, (S1, 2, 13, None)))) == [AppendTokens(S1, 2, (13,))]


def test_a_restart_whose_workers_have_gone_places_anew_with_the_tokens() -> None:
    snapshot = Snapshot(
        epoch=4,
        pipelines=(layout_of(4, "w1", "w2"),),
        sequences=(StoredSequence(record=record_of(S1, 4), tokens=(11, 12)),),
    )
    driver = Driver(snapshot=snapshot)
    fresh = (make_heartbeat("w3"), make_heartbeat("w4"))
    assert driver.wait(4.5, beats=fresh) == []
    assert driver.wait(1, beats=fresh) == [TakeEpoch(4)]
    driver.do(EpochTaken(5))
    assert driver.beat(*beats_of(5, "w3", "w4")) == [StartSequenceAt("w3", start_of(S1, 5, (11, 12), interruptions=1))]


def test_an_emptied_store_is_written_again(running: Driver) -> None:
    layout = running.machine.books.pipeline.layout
    assert layout is not None
    assert running.do(StoreEmptied()) == [
        SavePipeline(layout),
        SaveSequence(record_of(S1, 1)),
        AppendTokens(S1, 0, (11,)),
    ]


def test_what_the_head_has_lost_is_started_again_and_given_up_at_last(running: Driver) -> None:
    nothing = SequencesHeld(pipeline=1, epoch=1, sequences=())
    assert running.do(SequencesHeldArrived(nothing, running.now_s - 1)) == []
    kinds: list[str] = []
    for _ in range(8):
        running.now_s += 1
        done = running.do(SequencesHeldArrived(nothing, running.now_s))
        kinds += [type(one).__name__ for one in done]
        running.do(StartAnswered(S1, 1))
    assert kinds == ["StartSequenceAt"] * 6 + ["FailSequence", "StopSequenceAt", "DeleteSequence"]


def test_illegal_moves_tell_their_story(running: Driver) -> None:
    with pytest.raises(AssertionError, match="running → starting"):
        running.machine.books.sequences[S1].move(SequencePhase.STARTING, 0)
    with pytest.raises(AssertionError, match="ready → forming"):
        running.machine.books.pipeline.move(PipelinePhase.FORMING, 0)
