"""Answers that call tools, field by field, whole and in a stream."""

from __future__ import annotations

import orjson

from molink_common.messages import FinishReason
from molink_gateway.answer_style import AnswerStyle, ExpectedCalls
from molink_gateway.call_chunks import call_id
from molink_gateway.call_formats import CallFormat
from molink_gateway.choice import Delta
from molink_gateway.replies import Answer, ChatReply, ReplyHead, usage_of
from molink_gateway.resume_state import ResumeState, StreamKind
from molink_gateway.tool_calls import CallDelta

HEAD = ReplyHead(id="chatcmpl-1", created=5, model="demo", fingerprint="fp_1")
FIRST, SECOND = call_id("chatcmpl-1", 0, 0), call_id("chatcmpl-1", 0, 1)
DELTAS = [
    Delta(text="Let me"),
    Delta(text=" see.", calls=(CallDelta(0, "weather"),)),
    Delta(calls=(CallDelta(0, None, '{"ci'), CallDelta(0, None, 'ty": 1}'), CallDelta(1, "time", "{}"))),
    Delta(finish=FinishReason.STOP, has_called=True),
]


def test_a_stream_with_calls() -> None:
    reply = ChatReply(HEAD)
    chunks = [chunk["choices"][0] for delta in DELTAS for chunk in reply.chunks(0, delta)]
    assert [(chunk["delta"], chunk["finish_reason"]) for chunk in chunks] == [
        ({"content": "Let me"}, None),
        (
            {
                "content": " see.",
                "tool_calls": [
                    {"index": 0, "id": FIRST, "type": "function", "function": {"name": "weather", "arguments": ""}}
                ],
            },
            None,
        ),
        (
            {
                "tool_calls": [
                    {"index": 0, "function": {"arguments": '{"city": 1}'}},
                    {"index": 1, "id": SECOND, "type": "function", "function": {"name": "time", "arguments": "{}"}},
                ]
            },
            None,
        ),
        ({}, "tool_calls"),
    ]


def test_a_whole_answer_with_calls() -> None:
    answer = Answer()
    for delta in DELTAS:
        answer.add(delta)
    reply = ChatReply(HEAD).whole([answer], usage_of(3, 4, 2))
    assert reply == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 5,
        "model": "demo",
        "system_fingerprint": "fp_1",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Let me see.",
                    "refusal": None,
                    "tool_calls": [
                        {
                            "id": FIRST,
                            "type": "function",
                            "function": {"name": "weather", "arguments": '{"city": 1}'},
                        },
                        {"id": SECOND, "type": "function", "function": {"name": "time", "arguments": "{}"}},
                    ],
                },
                "logprobs": None,
                "finish_reason": "tool_calls",
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 2, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        },
    }


def test_calls_alone_have_no_content() -> None:
    answer = Answer()
    answer.add(Delta(calls=(CallDelta(0, "time", "{}"),), finish=FinishReason.LENGTH, has_called=True))
    (choice,) = ChatReply(HEAD).whole([answer], usage_of(3, 4))["choices"]
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "length"  # the call may not be whole


def test_a_stream_that_is_taken_up_has_the_same_ids() -> None:
    calls = ExpectedCalls(form=CallFormat.BARE, functions=("time",), has_short_ids=True)
    state = ResumeState(
        kind=StreamKind.CHAT,
        id=HEAD.id,
        created=5,
        model="demo",
        fingerprint="fp_1",
        style=AnswerStyle(calls=calls),
    )
    delta = Delta(calls=(CallDelta(0, "time", "{}"),))
    again = state.reply((1, 2)).chunks(0, delta)
    assert again == ChatReply(HEAD, has_short_call_ids=True).chunks(0, delta)
    (call,) = orjson.loads(orjson.dumps(again[0]))["choices"][0]["delta"]["tool_calls"]
    assert len(call["id"]) == 9
    assert call["id"].isalnum()
