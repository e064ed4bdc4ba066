"""Messages in Anthropic's shape: the chat that they amount to, the order of events, the shape of errors."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from molink_gateway.api_errors import ApiError
from molink_gateway.messages_errors import error_body
from molink_gateway.messages_reply import MessageTeller
from molink_gateway.messages_request import chat_body, parse_count, parse_messages
from molink_gateway.requests import parse_chat

USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 3}}
ASKED = {"model": "demo", "max_tokens": 9, "messages": [{"role": "user", "content": "Hello"}]}
TOOL = {"name": "weather", "description": "d", "input_schema": {"type": "object", "properties": {}}}


def chat_of(**fields: Any) -> Any:
    body = chat_body(parse_messages(orjson.dumps(ASKED | fields)))
    parse_chat(body)  # it is one that is taken
    return orjson.loads(body)


def chunk(*, finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]}


def told(*chunks: dict[str, Any], met: str | None = None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    teller = MessageTeller("msg_1", "demo", lambda: met)
    events = [orjson.loads(orjson.dumps(event)) for event in teller.begin({**USAGE, "completion_tokens": 0})]
    for one in chunks:
        events += [orjson.loads(orjson.dumps(event)) for event in teller.take(one)]
    events += [orjson.loads(orjson.dumps(event)) for event in teller.end(USAGE)]
    return events, teller.message


def test_a_request_becomes_the_chat_that_asks_for_the_same() -> None:
    assert chat_of(
        system=[{"type": "text", "text": "Be brief."}], stop_sequences=["x"], temperature=0.5, top_k=3, stream=True
    ) == {
        "model": "demo",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        "max_tokens": 9,
        "temperature": 0.5,
        "top_k": 3,
        "stream": True,
        "stop": ["x"],
    }


def test_uses_of_tools_and_their_results_become_turns() -> None:
    body = chat_of(
        messages=[
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bonn"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "There."},
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sun"}]},
                ],
            },
        ],
        tools=[TOOL],
        tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
    )
    call = {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bonn"}'}}
    assert body["messages"] == [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t1", "content": "sun"},
        {"role": "user", "content": "There."},
    ]
    function = {"name": "weather", "description": "d", "parameters": TOOL["input_schema"]}
    assert body["tools"] == [{"type": "function", "function": function}]
    assert body["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert body["parallel_tool_calls"] is False


@pytest.mark.parametrize(("given", "asked"), [("any", "required"), ("auto", "auto"), ("none", "none")])
def test_choices_of_tools(given: str, asked: str) -> None:
    assert chat_of(tools=[TOOL], tool_choice={"type": given})["tool_choice"] == asked


def test_counting_needs_no_bound_of_the_answer() -> None:
    asked = {name: value for name, value in ASKED.items() if name != "max_tokens"}
    assert "max_tokens" not in orjson.loads(chat_body(parse_count(orjson.dumps(asked))))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
        ({"system": 5}, "system"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"temperature": 1.5}, "temperature"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice"),
    ],
)
def test_what_is_wrong(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat_of(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_text_and_uses_of_tools_are_told_in_anthropics_order() -> None:
    events, message = told(
        chunk(role="assistant", content=""),
        chunk(content="I "),
        chunk(content="look."),
        chunk(tool_calls=[{"index": 0, "id": "t1", "type": "function", "function": {"name": "weather"}}]),
        chunk(tool_calls=[{"index": 0, "function": {"arguments": '{"city":'}}]),
        chunk(tool_calls=[{"index": 0, "function": {"arguments": '"Bonn"}'}}]),
        chunk(finish="tool_calls"),
    )
    assert [event["type"] for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["usage"]["input_tokens"] == 2
    assert [event["index"] for event in events[1:9]] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert events[1]["content_block"] == {"type": "text", "text": ""}
    assert events[5]["content_block"] == {"type": "tool_use", "id": "t1", "name": "weather", "input": {}}
    assert events[6]["delta"] == {"type": "input_json_delta", "partial_json": '{"city":'}
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert message["content"] == [
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bonn"}},
    ]
    assert message["usage"] == {
        "input_tokens": 2,
        "output_tokens": 2,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 3,
    }


@pytest.mark.parametrize(
    ("finish", "met", "reason"),
    [
        ("stop", None, "end_turn"),
        ("stop", "END", "stop_sequence"),
        ("length", None, "max_tokens"),
        ("tool_calls", None, "tool_use"),
    ],
)
def test_why_an_answer_ends(finish: str, met: str | None, reason: str) -> None:
    events, message = told(chunk(content="x"), chunk(finish=finish), met=met)
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, met)
    assert events[-2]["delta"] == {"stop_reason": reason, "stop_sequence": met}


def test_arguments_that_were_cut_off_are_no_input() -> None:
    call = {"index": 0, "id": "t1", "function": {"name": "weather", "arguments": '{"ci'}}
    _, message = told(chunk(tool_calls=[call]), chunk(finish="length"))
    assert message["content"][0]["input"] == {}
    assert message["stop_reason"] == "max_tokens"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_errors_have_anthropics_names(status: int, kind: str) -> None:
    assert error_body(status, "m") == {"type": "error", "error": {"type": kind, "message": "m"}}
