"""The life of a sequence: admission, tokens, its end."""

from __future__ import annotations

import pytest

from molink_common.messages import (
    Admitted,
    FinishReason,
    RefusalCode,
    SequenceFailed,
    StopSequence,
)
from molink_scheduler.events import (
    CancelAsked,
    EpochTaken,
    GatewayAliveArrived,
    SequenceSaved,
    SequenceSubmitted,
    StartAnswered,
    StoreChanged,
    TokensArrived,
)
from molink_scheduler.instructions import (
    AppendTokens,
    AskSequencesOf,
    DeleteSequence,
    FailSequence,
    ReplyTo,
    SaveSequence,
    StartSequenceAt,
    StopSequenceAt,
)
from molink_scheduler.records import SequenceRecord
from tests.scheduler_builders import (
    S1,
    S2,
    Driver,
    beats_of,
    make_heartbeat,
    make_request,
    make_settings,
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


def test_tokens_of_another_epoch_and_after_a_gap_are_not_kept(running: Driver) -> None:
    assert running.do(TokensArrived(make_step(0, (S1, 1, 12, None)))) == []
    assert running.do(TokensArrived(make_step(1, (S1, 5, 99, None)))) == []
    assert running.machine.books.sequences[S1].generated == [11]
    assert running.do(TokensArrived(make_step(1, (S1, 6, 99, FinishReason.LENGTH)))) == []
    assert running.machine.books.holed[S1].generated == [11]


def test_a_sequence_that_is_not_finite_fails(running: Driver) -> None:
    sentence = (
        "the pipeline gave it up: its output was not finite, its grammar failed, or its steps were lost again and again"
    )
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
