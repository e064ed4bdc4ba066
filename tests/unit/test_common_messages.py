"""Control messages: what goes out comes back, and what is wrong is refused with a sentence."""

from __future__ import annotations

import orjson
import pytest

from molink_common.errors import ProtocolError
from molink_common.messages import (
    Admitted,
    Done,
    FileChunk,
    FinishReason,
    Refused,
    StepTokens,
    SubmitSequence,
    TokenEvent,
    decode,
    encode,
)
from molink_common.sampling import SamplingOptions

SUBMIT = SubmitSequence(
    sequence="00000000000000ff",
    gateway="gateway-1",
    request="req-1",
    model="demo",
    prompt=(1, 2, 3),
    options=SamplingOptions(max_tokens=5, logit_bias={7: -1.0}, stop_token_ids=(2,)),
)


def test_messages_survive_the_round_trip() -> None:
    tokens = StepTokens(
        pipeline=1,
        epoch=2,
        step=3,
        events=(TokenEvent(sequence="00000000000000ff", index=0, token=9, finish=FinishReason.STOP, logprob=-0.5),),
    )
    for message in (SUBMIT, tokens, Done()):
        assert decode(encode(message), type(message)) == message


def test_bytes_survive_the_round_trip() -> None:
    raw = bytes(range(256))
    assert decode(encode(FileChunk.holding(raw)), FileChunk).data == raw


def test_a_field_of_a_newer_peer_is_ignored() -> None:
    body = orjson.loads(encode(Done()))
    body["colour"] = "blue"
    assert decode(orjson.dumps(body), Done) == Done()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"v": 99}, "version"),
        ({"type": "nonsense"}, "nonsense"),
        ({"sequence": "xyz"}, "sequence"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"gateway": "a.b"}, "gateway"),
        ({"options": {"max_tokens": 0}}, "max_tokens"),
        ({"options": {"max_tokens": 5, "temperature": 3}}, "temperature"),
    ],
)
def test_a_wrong_message_is_refused_and_the_field_named(change: dict[str, object], said: str) -> None:
    body = orjson.loads(encode(SUBMIT))
    body.update(change)
    with pytest.raises(ProtocolError, match=said):
        decode(orjson.dumps(body), SubmitSequence)


def test_another_type_than_expected_is_refused() -> None:
    with pytest.raises(ProtocolError, match="admitted, refused"):
        decode(encode(Done()), Admitted, Refused)
