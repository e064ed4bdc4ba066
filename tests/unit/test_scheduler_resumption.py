"""Streams that another gateway takes up."""

from __future__ import annotations

from molink_common.messages import Failed, FinishReason, Resumed, ResumeSequence, SubmitSequence
from molink_scheduler import holes
from molink_scheduler.events import CancelAsked, ResumeAsked, StartAnswered, StoreEmptied, TokensArrived
from molink_scheduler.instructions import (
    AppendTokens,
    DeleteSequence,
    Instruction,
    ReplyTo,
    SaveSequence,
    StartSequenceAt,
    StopSequenceAt,
)
from molink_scheduler.records import SequenceRecord, Snapshot, StoredSequence
from molink_scheduler.resumption import MOST_KEPT
from tests.scheduler_builders import S1, S2, Driver, beats_of, make_request, make_step, ready_driver, run_sequence

BEATS = beats_of(1, "w1", "w2")


def request_of(sequence: str, gateway: str = "g1") -> SubmitSequence:
    return make_request(sequence, gateway=gateway).model_copy(update={"resume_state": "{}"})


def running() -> Driver:
    driver = ready_driver()
    run_sequence(driver, request_of(S1))
    return driver


def ask(driver: Driver, sequence: str = S1, gateway: str = "g2") -> list[Instruction]:
    return driver.do(ResumeAsked(ResumeSequence(sequence=sequence, gateway=gateway), 9))


def answer(done: list[Instruction]) -> object:
    (reply,) = done
    assert isinstance(reply, ReplyTo)
    return reply.message


def record_of(sequence: str, gateway: str = "g1", finish: FinishReason | None = None) -> SequenceRecord:
    num_generated = None if finish is None else 2
    return SequenceRecord(
        request=request_of(sequence, gateway),
        fingerprint="f" * 16,
        started_epoch=1,
        finish=finish,
        num_generated=num_generated,
    )


def finish(driver: Driver, sequence: str = S1) -> list[Instruction]:
    return driver.do(TokensArrived(make_step(1, (sequence, 1, 12, FinishReason.STOP))))


def test_a_running_stream_is_handed_over_and_is_the_new_gateway_s() -> None:
    driver = running()
    assert ask(driver) == [
        SaveSequence(record_of(S1, "g2")),
        ReplyTo(9, Resumed(request=request_of(S1, "g2"), generated=(11,))),
    ]
    assert driver.machine.books.sequences[S1].gateway == "g2"


def test_it_runs_on_when_its_gateway_is_silent_and_is_kept_with_its_last_token() -> None:
    driver = running()
    assert [one for one in driver.wait(12, beats=BEATS) if isinstance(one, (StopSequenceAt, DeleteSequence))] == []
    assert finish(driver) == [AppendTokens(S1, 1, (12,)), SaveSequence(record_of(S1, finish=FinishReason.STOP))]
    resumed = Resumed(request=request_of(S1), generated=(11, 12), finish="stop")
    assert ask(driver) == [ReplyTo(9, resumed)]
    assert driver.wait(59, beats=BEATS) == []
    assert ask(driver) == [ReplyTo(9, resumed)]
    assert driver.wait(1.5, beats=BEATS) == [DeleteSequence(S1)]
    assert isinstance(answer(ask(driver)), Failed)


def test_others_are_handed_to_their_own_gateway_only_and_kept_for_seconds_and_in_memory() -> None:
    driver = ready_driver()
    run_sequence(driver, make_request(S1))
    assert isinstance(answer(ask(driver)), Failed)
    assert ask(driver, gateway="g1") == [ReplyTo(9, Resumed(request=make_request(S1), generated=(11,)))]
    assert finish(driver) == [DeleteSequence(S1)]
    assert isinstance(answer(ask(driver)), Failed)
    resumed = Resumed(request=make_request(S1), generated=(11, 12), finish="stop")
    assert ask(driver, gateway="g1") == [ReplyTo(9, resumed)]
    driver.wait(15.5, beats=BEATS)
    assert isinstance(answer(ask(driver, gateway="g1")), Failed)


def test_a_stop_string_ends_it_with_the_tokens_that_count() -> None:
    driver = running()
    driver.do(TokensArrived(make_step(1, (S1, 1, 12, None), (S1, 2, 13, None))))
    done = driver.do(CancelAsked(S1, "a stop string was met", 2))
    assert [type(one) for one in done] == [StopSequenceAt, SaveSequence]
    assert answer(ask(driver)) == Resumed(request=request_of(S1), generated=(11, 12), finish="stop")
    assert isinstance(done[1], SaveSequence)
    stored = StoredSequence(record=done[1].record, tokens=(11, 12, 13))
    again = Driver(snapshot=Snapshot(sequences=(stored,)))
    assert answer(ask(again)) == Resumed(request=request_of(S1), generated=(11, 12), finish="stop")


def test_it_goes_on_until_the_tokens_that_count_are_here() -> None:
    driver = running()
    assert driver.do(CancelAsked(S1, "a stop string was met", 2)) == []
    done = driver.do(TokensArrived(make_step(1, (S1, 1, 12, None), (S1, 2, 13, None))))
    assert [type(one) for one in done] == [AppendTokens, StopSequenceAt, SaveSequence]
    assert driver.machine.books.ended[S1].generated == (11, 12)


def test_tokens_that_count_and_were_missed_are_made_again() -> None:
    driver = running()
    driver.do(CancelAsked(S1, "a stop string was met", 3))
    done = driver.do(TokensArrived(make_step(1, (S1, 2, 13, None))))
    assert [type(one) for one in done] == [StopSequenceAt, StartSequenceAt]


def test_for_other_sequences_a_stop_string_is_the_end() -> None:
    driver = ready_driver()
    run_sequence(driver, make_request(S1))
    assert driver.do(CancelAsked(S1, "a stop string was met", 1))[-1] == DeleteSequence(S1)


def test_an_ended_one_survives_restarts_and_an_empty_store() -> None:
    ended = record_of(S1, finish=FinishReason.LENGTH)
    driver = Driver(snapshot=Snapshot(sequences=(StoredSequence(record=ended, tokens=(11, 12)),)))
    assert driver.machine.books.sequences == {}
    assert ask(driver) == [ReplyTo(9, Resumed(request=request_of(S1), generated=(11, 12), finish="length"))]
    assert driver.do(StoreEmptied()) == [SaveSequence(ended), AppendTokens(S1, 0, (11, 12))]


def test_a_cancel_ends_it_running_or_kept() -> None:
    driver = running()
    finish(driver)
    assert driver.do(CancelAsked(S1, "no more use")) == [DeleteSequence(S1)]
    run_sequence(driver, request_of(S2))
    assert driver.do(CancelAsked(S2, "no more use"))[-1] == DeleteSequence(S2)


def test_as_many_are_kept_as_there_is_room_for() -> None:
    driver = ready_driver()
    names = [f"{number:016x}" for number in range(MOST_KEPT + 2)]
    for name in names:
        run_sequence(driver, request_of(name))
        finish(driver, name)
    assert len(driver.machine.books.ended) == MOST_KEPT
    assert [one.sequence for one in driver.all if isinstance(one, DeleteSequence)] == names[:2]


def with_missed_tokens_at_its_end() -> Driver:
    driver = running()
    driver.do(TokensArrived(make_step(1, (S1, 2, 13, None))))
    assert driver.do(TokensArrived(make_step(1, (S1, 3, 14, FinishReason.STOP)))) == []
    assert (driver.machine.books.sequences, driver.machine.books.ended) == ({}, {})
    return driver


def test_tokens_that_were_missed_are_made_again_for_whoever_asks_for_them() -> None:
    driver = with_missed_tokens_at_its_end()
    done = ask(driver)
    assert [type(one) for one in done] == [StartSequenceAt, SaveSequence, ReplyTo]
    driver.do(StartAnswered(S1, 1))
    for index, token in enumerate((12, 13), start=1):
        driver.do(TokensArrived(make_step(1, (S1, index, token, None))))
    driver.do(TokensArrived(make_step(1, (S1, 3, 14, FinishReason.STOP))))
    assert driver.machine.books.ended[S1].generated == (11, 12, 13, 14)


def test_tokens_that_were_missed_and_that_nobody_asks_for_are_not_made_again() -> None:
    driver = with_missed_tokens_at_its_end()
    driver.wait(holes.KEPT_S - 1)
    assert list(driver.machine.books.holed) == [S1]
    driver.wait(2)
    assert DeleteSequence(S1) in driver.all
    assert not driver.machine.books.holed
    driver = with_missed_tokens_at_its_end()
    assert driver.do(CancelAsked(S1, "no more use")) == [DeleteSequence(S1)]
    assert not driver.machine.books.holed


def test_a_gateway_that_takes_up_a_stream_with_a_hole_gets_what_was_missed() -> None:
    driver = running()
    driver.do(TokensArrived(make_step(1, (S1, 2, 13, None))))
    done = ask(driver)
    assert [type(one) for one in done] == [SaveSequence, ReplyTo, StopSequenceAt, StartSequenceAt]
    assert isinstance(done[-1], StartSequenceAt) and done[-1].start.generated == (11,)
