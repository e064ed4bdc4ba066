"""Event ids, what is kept of a stream, epochs, and when to ask: the pure parts of taking a stream up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from molink_common.errors import ProtocolError
from molink_common.messages import Dtype, PipelineState
from molink_gateway.answer_style import AnswerStyle, ExpectedCalls
from molink_gateway.api_errors import ApiError
from molink_gateway.call_formats import CallFormat
from molink_gateway.epoch_fence import EpochFence
from molink_gateway.questions import Questions
from molink_gateway.resume_state import ResumeState, StreamKind, decode_resume_state
from molink_gateway.stream_place import Part, Place, check_stream_id, parse_place

STREAM = "0123456789abcdef"
STATE = ResumeState(
    kind=StreamKind.CHAT,
    id="chatcmpl-1",
    created=5,
    model="demo",
    fingerprint="fp_1",
    style=AnswerStyle(
        stop=("a", "ß"), calls=ExpectedCalls(form=CallFormat.HERMES, functions=("f", "g"), is_parallel=False)
    ),
    has_usage=True,
)


@given(tokens=some.integers(0, 10**9 - 1), part=some.sampled_from(Part))
def test_an_event_id_reads_as_it_was_written(tokens: int, part: Part) -> None:
    place = Place(sequence=STREAM, num_tokens=tokens, part=part)
    assert parse_place(place.encode()) == place


def test_event_ids_as_they_look() -> None:
    assert Place(sequence=STREAM, num_tokens=0).encode() == f"{STREAM}.0"
    assert Place(sequence=STREAM, num_tokens=7, part=Part.END).encode() == f"{STREAM}.7.end"
    assert Place(sequence=STREAM, num_tokens=7, part=Part.USAGE).encode() == f"{STREAM}.7.usage"


@pytest.mark.parametrize(
    "text",
    [
        "",
        STREAM,
        f"{STREAM}.",
        f"{STREAM}.x",
        f"{STREAM}.1.",
        f"{STREAM}.1.stop",
        f"{STREAM.upper()}.1",
        f"{STREAM}.1\n",
    ],
)
def test_what_is_no_event_id(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_place(text)
    assert caught.value.status == 400


def test_what_is_no_stream_id() -> None:
    assert check_stream_id(STREAM) == STREAM
    for text in ("", STREAM + "0", STREAM[1:], STREAM + "\n"):
        with pytest.raises(ApiError):
            check_stream_id(text)


def test_the_state_of_a_stream_survives_its_text() -> None:
    assert decode_resume_state(STATE.encode()) == STATE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        STATE.encode().replace('"version":1', '"version":2'),
        STATE.encode().replace("chat", "cat"),
    ],
)
def test_a_state_that_is_not_ours_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        decode_resume_state(text)


def pipeline(epoch: int, *, number: int = 1, ready: bool = True) -> PipelineState:
    return PipelineState(
        pipeline=number,
        epoch=epoch,
        ready=ready,
        model="m",
        dtype=Dtype.FLOAT32,
        num_blocks=1,
        block_size=1,
        stages=(),
        layers=(),
    )


def test_an_older_epoch_is_dropped_and_counted() -> None:
    fence = EpochFence()
    assert [fence.admits(1, epoch) for epoch in (3, 3, 4, 3, 4)] == [True, True, True, False, True]
    assert fence.admits(2, 1)
    assert fence.num_dropped == 1


def test_the_old_epoch_counts_until_the_new_one_is_ready() -> None:
    fence = EpochFence()
    fence.hear([pipeline(3)])
    fence.hear([pipeline(4, ready=False)])
    assert fence.admits(1, 3)
    fence.hear([pipeline(4)])
    assert not fence.admits(1, 3)
    assert fence.admits(1, 4)


def test_epochs_that_are_counted_anew_are_believed_after_a_while() -> None:
    fence = EpochFence()
    assert fence.admits(1, 9)
    fence.hear([pipeline(2)])
    fence.hear([pipeline(2)])
    assert not fence.admits(1, 2)
    fence.hear([pipeline(2)])
    assert fence.admits(1, 2)


def test_one_late_state_does_not_open_the_fence() -> None:
    fence = EpochFence()
    for _ in range(5):
        fence.hear([pipeline(9)])
        fence.hear([pipeline(8)])
    assert not fence.admits(1, 8)


def test_a_hole_is_asked_for_soon_and_a_silence_late() -> None:
    questions = Questions(0.0, hole_s=1, silence_s=10)
    assert questions.due_s == 10
    questions.heard(4.0)
    assert questions.due_s == 14
    questions.holes(5.0, has_hole=True)
    assert questions.due_s == 6
    questions.heard(5.5)  # another sequence's token
    assert questions.due_s == 6
    questions.asked(6.0)
    assert questions.due_s == 8
    questions.holes(7.0, has_hole=False)
    assert questions.due_s == 17
    questions.asked(17.0)
    assert questions.due_s == 37
