"""The scheduler's decisions: events in, exact instructions out."""

from __future__ import annotations

import pytest

from molink_common.messages import (
    Admitted,
    AssignStage,
    Dtype,
    FinishReason,
    Heartbeat,
    RefusalCode,
    Refused,
    SequenceFailed,
    SequencesHeld,
    StagePhase,
    StartSequence,
    StopSequence,
)
from molink_scheduler.books import PipelinePhase, SequencePhase
from molink_scheduler.events import (
    AssignAnswered,
    CancelAsked,
    EpochTaken,
    GatewayAliveArrived,
    SequenceSaved,
    SequencesHeldArrived,
    SequenceSubmitted,
    StartAnswered,
    StoreChanged,
    StoreEmptied,
    Tick,
    TokensArrived,
)
from molink_scheduler.instructions import (
    AppendTokens,
    AskSequencesOf,
    AssignStageTo,
    BroadcastState,
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
from molink_scheduler.records import PipelineRecord, SequenceRecord, Snapshot, StageRecord, StoredSequence
from tests.scheduler_builders import (
    MIB,
    Driver,
    make_card,
    make_heartbeat,
    make_request,
    make_settings,
    make_stage,
    make_step,
)

S1, S2 = "00000000000000a1", "00000000000000a2"
HALVES = ((0, 2), (2, 4))


def beats_of(epoch: int, *workers: str) -> tuple[Heartbeat, ...]:
    return tuple(make_heartbeat(w, stage=make_stage(epoch, k, HALVES[k])) for k, w in enumerate(workers))


def layout_of(epoch: int, *workers: str) -> PipelineRecord:
    return PipelineRecord(
        pipeline=1,
        epoch=epoch,
        card=make_card(),
        dtype=Dtype.FLOAT32,
        num_blocks=8192 if len(workers) == 2 else 4096,
        block_size=16,
        stages=tuple(
            StageRecord(worker=w, first_layer=a, last_layer=b) for w, (a, b) in zip(workers, HALVES, strict=True)
        ),
    )


def assign(epoch: int, worker: str, index: int, num_blocks: int) -> AssignStageTo:
    stage = AssignStage(
        pipeline=1,
        epoch=epoch,
        fingerprint="f" * 16,
        index=index,
        num_stages=2,
        first_layer=HALVES[index][0],
        last_layer=HALVES[index][1],
        dtype=Dtype.FLOAT32,
        num_blocks=num_blocks,
        block_size=16,
    )
    return AssignStageTo(worker, stage)


def start_of(sequence: str, epoch: int, generated: tuple[int, ...] = ()) -> StartSequence:
    request = make_request(sequence)
    return StartSequence(
        pipeline=1, epoch=epoch, sequence=sequence, prompt=request.prompt, generated=generated, options=request.options
    )


def record_of(sequence: str, started_epoch: int | None = None) -> SequenceRecord:
    return SequenceRecord(request=make_request(sequence), fingerprint="f" * 16, started_epoch=started_epoch)


@pytest.fixture
def ready() -> Driver:
    driver = Driver()
    driver.beat(make_heartbeat("w1"), make_heartbeat("w2"))
    driver.do(EpochTaken(1))
    driver.beat(*beats_of(1, "w1", "w2"))
    assert driver.machine.state(now_s=driver.now_s).ready
    return driver


@pytest.fixture
def running(ready: Driver) -> Driver:
    """One sequence with one token."""
    ready.do(SequenceSubmitted(make_request(S1), 7))
    ready.do(SequenceSaved(S1))
    ready.do(StartAnswered(S1, 1))
    ready.do(TokensArrived(make_step(1, (S1, 0, 11, None))))
    return ready


# --- forming ---


def test_the_whole_way_from_heartbeats_to_a_ready_pipeline() -> None:
    driver = Driver()
    assert driver.beat(make_heartbeat("w1")) == []
    assert driver.beat(make_heartbeat("w2")) == [TakeEpoch(0)]
    num_blocks = driver.machine.books.settings.kv_tokens // 16
    two = (10 * MIB - 2800 * 4) // (16 * 2 * 16 * 4)
    assert two < num_blocks
    layout = layout_of(1, "w1", "w2").model_copy(update={"num_blocks": two})
    assert driver.do(EpochTaken(1)) == [SavePipeline(layout), assign(1, "w1", 0, two), assign(1, "w2", 1, two)]
    loading = [
        make_heartbeat(w, stage=make_stage(1, k, HALVES[k], StagePhase.LOADING)) for k, w in enumerate(("w1", "w2"))
    ]
    assert driver.beat(*loading) == []
    first, second = beats_of(1, "w1", "w2")
    assert driver.beat(first) == []
    assert not driver.machine.state(now_s=driver.now_s).ready
    assert driver.beat(second) == []
    assert driver.machine.state(now_s=driver.now_s).ready
    assert isinstance(driver.all[-1], BroadcastState)


def test_auto_waits_until_the_set_is_stable() -> None:
    driver = Driver(make_settings(stages="auto", settle_s=1.0))
    one, two = make_heartbeat("w1"), make_heartbeat("w2")
    driver.beat(one)
    assert driver.wait(0.9, beats=(one,)) == []
    driver.beat(two)
    assert driver.wait(0.9, beats=(one, two)) == []
    assert driver.wait(0.2, beats=(one, two)) == [TakeEpoch(0)]


def test_a_fixed_number_waits_for_ever_for_the_first_pipeline() -> None:
    driver = Driver(make_settings(stages=2))
    assert driver.wait(100, beats=(make_heartbeat("w1"),)) == []
    assert "waiting for 2 workers" in driver.machine.state(now_s=driver.now_s).reason


def test_who_is_not_fit_is_not_used_and_told_why() -> None:
    driver = Driver(make_settings(stages="auto"))
    driver.beat(
        make_heartbeat("ok1"),
        make_heartbeat("ok2"),
        make_heartbeat("other", card=make_card(fingerprint="0" * 16)),
        make_heartbeat("busy", preparing="downloading 40 %"),
        make_heartbeat("broken", problem="its disk is full"),
        make_heartbeat("going", leaving=True),
        make_heartbeat("small", memory_bytes=10),
    )
    assert driver.wait(1.5) == [TakeEpoch(0)]
    done = driver.do(EpochTaken(1))
    assert [one.worker for one in done if isinstance(one, AssignStageTo)] == ["ok1", "ok2"]
    roles = {one.worker: (one.role, one.reason) for one in driver.machine.state(now_s=driver.now_s).workers}
    assert roles["ok1"] == ("stage 0 of pipeline 1", "layers 0 to 1 of 4; told to load, no answer yet")
    assert roles["other"][0] == "unfit" and "other weights" in roles["other"][1]
    assert roles["busy"] == ("preparing", "downloading 40 %")
    assert roles["broken"] == ("unfit", "its disk is full")
    assert roles["going"] == ("unfit", "it is leaving")
    assert roles["small"][0] == "standby" and "do not hold one layer" in roles["small"][1]


def test_a_pool_without_room_says_how_much_is_missing_and_tries_again_when_it_grows() -> None:
    driver = Driver(make_settings(stages="auto"))
    first, second = (make_heartbeat(name, memory_bytes=100_000) for name in ("w1", "w2"))
    assert driver.wait(2, beats=(first,)) == []
    assert "missing" in driver.machine.state(now_s=driver.now_s).reason
    assert driver.wait(1.5, beats=(first, second)) == [TakeEpoch(0)]


def test_a_worker_that_refuses_or_fails_is_left_out_for_a_while() -> None:
    driver = Driver(make_settings(stages="auto"))
    driver.beat(make_heartbeat("w1"), make_heartbeat("w2"))
    driver.wait(1.5)
    driver.do(EpochTaken(1))
    failed = make_heartbeat("w2", stage=make_stage(1, 1, HALVES[1], StagePhase.FAILED))
    assert driver.beat(failed) == []
    assert driver.wait(2, beats=(make_heartbeat("w1"), failed)) == [TakeEpoch(1)]
    done = driver.do(EpochTaken(2))
    assert [one.worker for one in done if isinstance(one, AssignStageTo)] == ["w1"]
    state = driver.machine.state(now_s=driver.now_s)
    assert "no memory" in next(one.reason for one in state.workers if one.worker == "w2")
    assert driver.do(AssignAnswered("w1", 2, "busy")) == []
    assert not driver.machine.state(now_s=driver.now_s).pipelines


def test_an_epoch_that_nobody_wants_any_more_changes_nothing(ready: Driver) -> None:
    assert ready.do(EpochTaken(9)) == []
    assert ready.machine.books.highest_epoch == 9


def test_an_epoch_older_than_what_a_worker_has_is_drawn_again() -> None:
    driver = Driver()
    driver.beat(make_heartbeat("w1"), make_heartbeat("w2"))
    driver.beat(make_heartbeat("w1", stage=make_stage(7, 0, HALVES[0])))
    assert driver.do(EpochTaken(1)) == [TakeEpoch(7)]
    assert [type(one) for one in driver.do(EpochTaken(8))] == [SavePipeline, AssignStageTo, AssignStageTo]


# --- the life of a sequence ---


def test_a_sequence_from_submission_to_its_end(ready: Driver) -> None:
    assert ready.do(SequenceSubmitted(make_request(S1), 7)) == [SaveSequence(record_of(S1))]
    admitted = ReplyTo(7, Admitted(sequence=S1))
    assert ready.do(SequenceSaved(S1)) == [admitted, StartSequenceAt("w1", start_of(S1, 1))]
    assert ready.do(StartAnswered(S1, 1)) == [SaveSequence(record_of(S1, 1))]
    assert ready.do(SequenceSaved(S1)) == []
    assert ready.do(TokensArrived(make_step(1, (S1, 0, 11, None)))) == [AppendTokens(S1, 0, (11,))]
    assert ready.do(TokensArrived(make_step(1, (S1, 0, 11, None)))) == []
    assert ready.do(TokensArrived(make_step(1, (S1, 1, 12, FinishReason.STOP)))) == [DeleteSequence(S1)]
    assert ready.do(TokensArrived(make_step(1, (S1, 2, 13, None)))) == []
    assert ready.machine.books.sequences == {}


def test_the_same_submission_twice_is_answered_twice_and_run_once(ready: Driver) -> None:
    ready.do(SequenceSubmitted(make_request(S1), 1))
    assert ready.do(SequenceSubmitted(make_request(S1), 2)) == []
    done = ready.do(SequenceSaved(S1))
    assert done[:2] == [ReplyTo(1, Admitted(sequence=S1)), ReplyTo(2, Admitted(sequence=S1))]
    assert ready.do(SequenceSubmitted(make_request(S1), 3)) == [ReplyTo(3, Admitted(sequence=S1))]


def test_tokens_of_another_epoch_and_after_a_gap_are_not_kept_but_an_end_is(running: Driver) -> None:
    assert running.do(TokensArrived(make_step(0, (S1, 1, 12, None)))) == []
    assert running.do(TokensArrived(make_step(1, (S1, 5, 99, None)))) == []
    assert running.machine.books.sequences[S1].generated == [11]
    assert running.do(TokensArrived(make_step(1, (S1, 6, 99, FinishReason.LENGTH)))) == [DeleteSequence(S1)]


def test_a_sequence_that_is_not_finite_fails(running: Driver) -> None:
    sentence = "the pipeline gave it up: its output was not finite, or its steps were lost again and again"
    failed = SequenceFailed(sequence=S1, message=sentence)
    assert running.do(TokensArrived(make_step(1, failed=(S1,)))) == [FailSequence("g1", failed), DeleteSequence(S1)]


def test_cancel_frees_everything_and_unknown_ids_are_ignored(running: Driver) -> None:
    stop = StopSequenceAt("w1", StopSequence(pipeline=1, sequence=S1))
    assert running.do(CancelAsked(S1, "gone")) == [stop, DeleteSequence(S1)]
    assert running.do(CancelAsked(S1, "gone")) == []


def test_a_cancel_before_the_store_has_it_answers_the_submission(ready: Driver) -> None:
    ready.do(SequenceSubmitted(make_request(S1), 7))
    done = ready.do(CancelAsked(S1, "gone"))
    assert [type(one) for one in done] == [ReplyTo, DeleteSequence]
    assert ready.do(SequenceSaved(S1)) == []


def test_a_silent_gateway_has_its_sequences_cancelled(running: Driver) -> None:
    beats = beats_of(1, "w1", "w2")
    assert running.wait(9.5, beats=beats) == []
    running.do(GatewayAliveArrived("g1"))
    assert running.wait(9.5, beats=beats) == [AskSequencesOf("w1", 1)]
    stop = StopSequenceAt("w1", StopSequence(pipeline=1, sequence=S1))
    assert running.wait(1, beats=beats) == [stop, DeleteSequence(S1)]


def test_a_start_that_fails_is_tried_again_and_then_given_up(ready: Driver) -> None:
    ready.do(SequenceSubmitted(make_request(S1), 7))
    done = ready.do(SequenceSaved(S1))[1:]
    for _ in range(5):
        assert done == [StartSequenceAt("w1", start_of(S1, 1))]
        assert ready.do(StartAnswered(S1, 1, "busy")) == []
        done = ready.wait(0.5, beats=beats_of(1, "w1", "w2"))
    done = ready.do(StartAnswered(S1, 1, "busy"))
    assert [type(one) for one in done] == [FailSequence, StopSequenceAt, DeleteSequence]


def test_tokens_prove_a_start_whose_answer_was_lost(ready: Driver) -> None:
    ready.do(SequenceSubmitted(make_request(S1), 7))
    ready.do(SequenceSaved(S1))
    done = ready.do(TokensArrived(make_step(1, (S1, 0, 11, None))))
    assert done == [SaveSequence(record_of(S1, 1)), AppendTokens(S1, 0, (11,))]
    assert ready.do(StartAnswered(S1, 1, "no answer")) == []


# --- admission ---


def refusal(done: list[Instruction]) -> Refused:
    assert len(done) == 1 and isinstance(done[0], ReplyTo)
    assert isinstance(done[0].message, Refused)
    return done[0].message


def test_refusals(ready: Driver) -> None:
    unknown = refusal(ready.do(SequenceSubmitted(make_request(S1, model="gpt-9"), 1)))
    assert unknown.code is RefusalCode.UNKNOWN_MODEL and "Tiny, demo" in unknown.message
    long = refusal(ready.do(SequenceSubmitted(make_request(S1, max_tokens=510), 1)))
    assert long.code is RefusalCode.TOO_LONG and "512" in long.message
    ready.do(StoreChanged(False))
    down = refusal(ready.do(SequenceSubmitted(make_request(S1), 1)))
    assert down.code is RefusalCode.NO_PIPELINE and "Redis" in down.message
    assert "Redis" in ready.machine.state(now_s=ready.now_s).reason
    ready.do(StoreChanged(True))
    assert ready.do(SequenceSubmitted(make_request(S1, max_tokens=509), 1)) != []


def test_more_than_the_kv_blocks_hold_is_too_long() -> None:
    driver = Driver(make_settings(kv_tokens=64))
    driver.beat(make_heartbeat("w1"), make_heartbeat("w2"))
    driver.do(EpochTaken(1))
    driver.beat(*beats_of(1, "w1", "w2"))
    long = refusal(driver.do(SequenceSubmitted(make_request(S1, max_tokens=62), 1)))
    assert long.code is RefusalCode.TOO_LONG and "64 tokens" in long.message
    assert driver.do(SequenceSubmitted(make_request(S1, max_tokens=61), 1)) == [
        SaveSequence(SequenceRecord(request=make_request(S1, max_tokens=61), fingerprint="f" * 16))
    ]


def test_a_full_queue_says_when_to_come_back() -> None:
    driver = Driver(make_settings(max_sequences=1))
    driver.beat(make_heartbeat("w1"), make_heartbeat("w2"))
    driver.do(EpochTaken(1))
    driver.beat(*beats_of(1, "w1", "w2"))
    driver.do(SequenceSubmitted(make_request(S1), 1))
    full = refusal(driver.do(SequenceSubmitted(make_request(S2), 2)))
    assert full.code is RefusalCode.QUEUE_FULL and full.retry_after_s == 5.0


def test_without_a_pipeline_nothing_is_admitted() -> None:
    driver = Driver()
    assert refusal(driver.do(SequenceSubmitted(make_request(S1), 1))).code is RefusalCode.NO_PIPELINE
    driver.beat(make_heartbeat("w1"), make_heartbeat("w2"))
    driver.do(EpochTaken(1))
    assert refusal(driver.do(SequenceSubmitted(make_request(S1), 1))).code is RefusalCode.NO_PIPELINE


def test_a_store_that_does_not_take_it_in_time_is_a_refusal(ready: Driver) -> None:
    ready.do(SequenceSubmitted(make_request(S1), 7))
    assert ready.wait(1.5) == []
    done = ready.wait(1)
    assert [type(one) for one in done] == [ReplyTo, DeleteSequence]
    assert refusal(done[:1]).code is RefusalCode.NO_PIPELINE


# --- recovery ---


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
        StartSequenceAt("w3", start_of(S1, 2, (11,))),
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
    driver = Driver(make_settings(stages="auto"))
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


# --- restart ---


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
    assert driver.beat(*beats_of(5, "w3", "w4")) == [StartSequenceAt("w3", start_of(S1, 5, (11, 12)))]


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
