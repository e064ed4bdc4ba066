"""Responses: what may be asked, the chat that it amounts to, the order of events. Checked by openai's types."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from pydantic import TypeAdapter

from molink_gateway.api_errors import ApiError, bad_request
from molink_gateway.responses_items import chat_messages, numbered
from molink_gateway.responses_reply import ResponseHead, ResponseTeller
from molink_gateway.responses_request import chat_body, parse_responses, retold
from molink_gateway.responses_routes import page_of

STEM = "0" * 32
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "prompt_tokens_details": {"cached_tokens": 2}}
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}
_EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def teller_for(**fields: Any) -> ResponseTeller:
    request, _ = parse_responses(orjson.dumps({"model": "demo", "input": "Hello", **fields}))
    return ResponseTeller(ResponseHead(stem=STEM, created_s=7, request=request), lambda: 9)


def chunk(*, finish: str | None = None, logprobs: Any = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]}


def call(place: int, *, arguments: str = "", **opening: Any) -> dict[str, Any]:
    function = {"arguments": arguments} | ({"name": opening["name"]} if "name" in opening else {})
    identity = {"id": opening["id"], "type": "function"} if "id" in opening else {}
    return {"index": place, "function": function, **identity}


def told(teller: ResponseTeller, *chunks: dict[str, Any]) -> list[Any]:
    """Every event as its bytes say it, validated by openai's types."""
    written = [orjson.dumps(event) for event in teller.begin()]
    for one in chunks:
        written += [orjson.dumps(event) for event in teller.take(one)]
    written += [orjson.dumps(event) for event in teller.end(USAGE)]
    events = [_EVENTS.validate_json(data) for data in written]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events] == [orjson.loads(data)["type"] for data in written]
    return events


def kinds(events: list[Any]) -> list[str]:
    return [event.type.removeprefix("response.") for event in events]


def test_a_text_is_told_in_openais_order() -> None:
    teller = teller_for(metadata={"a": "b"}, instructions="Be brief.", user="u")
    events = told(
        teller, chunk(role="assistant", content=""), chunk(content="Pa"), chunk(content="ris"), chunk(finish="stop")
    )
    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert events[0].response.output == []
    assert events[2].item.content == []
    assert events[3].part.text == ""
    assert [event.delta for event in events[4:6]] == ["Pa", "ris"]
    assert events[6].text == events[7].part.text == events[8].item.content[0].text == "Paris"
    response = events[-1].response
    assert response.output_text == "Paris"
    assert (response.status, response.created_at, response.completed_at) == ("completed", 7, 9)
    assert response.usage.input_tokens_details.cached_tokens == 2
    assert (response.metadata, response.instructions, response.user) == ({"a": "b"}, "Be brief.", "u")
    assert {event.item_id for event in events[3:8]} == {response.output[0].id}


def test_an_answer_that_was_cut_is_incomplete() -> None:
    response = told(teller_for(), chunk(content="Pa"), chunk(finish="length"))[-1].response
    assert response.status == response.output[0].status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"


def test_an_empty_answer_is_an_empty_message() -> None:
    events = told(teller_for(), chunk(finish="stop"))
    assert kinds(events)[2:4] == ["output_item.added", "content_part.added"]
    assert "response.output_text.delta" not in [event.type for event in events]
    assert events[-1].response.output_text == ""


def test_calls_are_items_of_their_own_behind_the_text() -> None:
    teller = teller_for(tools=[TOOL])
    events = told(
        teller,
        chunk(content="Let me see."),
        chunk(tool_calls=[call(0, id="call_a", name="weather")]),
        chunk(tool_calls=[call(0, arguments='{"a"')]),
        chunk(tool_calls=[call(0, arguments=":1}"), call(1, id="call_b", name="weather", arguments="{}")]),
        chunk(finish="tool_calls"),
    )
    assert kinds(events)[4:] == [
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    output = events[-1].response.output
    assert [item.type for item in output] == ["message", "function_call", "function_call"]
    assert [(item.call_id, item.arguments) for item in output[1:]] == [("call_a", '{"a":1}'), ("call_b", "{}")]
    assert len({item.id for item in output}) == 3
    assert [event.output_index for event in events if event.type == "response.output_item.done"] == [0, 1, 2]


def test_log_probabilities_stand_at_their_text() -> None:
    token = {"token": "Pa", "logprob": -0.5, "bytes": [80, 97], "top_logprobs": []}
    teller = teller_for(include=["message.output_text.logprobs"], top_logprobs=0)
    events = told(teller, chunk(content="Pa", logprobs={"content": [token], "refusal": None}), chunk(finish="stop"))
    assert events[4].logprobs[0].token == "Pa"
    assert events[-1].response.output[0].content[0].logprobs[0].logprob == -0.5


def test_a_failure_ends_the_stream_in_its_own_event() -> None:
    teller = teller_for()
    teller.begin()
    teller.take(chunk(content="Pa"))
    (event,) = teller.fail(ApiError(503, "A stage was lost."))
    failed = _EVENTS.validate_json(orjson.dumps(event))
    assert (failed.type, failed.response.status) == ("response.failed", "failed")
    assert (failed.response.error.code, failed.response.error.message) == ("server_error", "A stage was lost.")
    assert failed.response.output[0].status == "incomplete"


def test_the_whole_answer_is_the_one_that_ends_the_stream() -> None:
    streamed = told(teller_for(), chunk(content="Pa"), chunk(content="ris"), chunk(finish="stop"))[-1].response
    whole = teller_for()
    message = {"role": "assistant", "content": "Paris", "refusal": None}
    whole.take({"choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]})
    whole.end(USAGE)
    assert Response.model_validate(whole.response) == streamed


def test_items_become_the_turns_of_a_chat() -> None:
    given = [
        {"role": "user", "content": [{"type": "input_text", "text": "How is "}, {"type": "input_text", "text": "it?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {
            "type": "message",
            "role": "assistant",
            "id": "msg_x",
            "content": [{"type": "output_text", "text": "I look."}],
        },
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"a":1}'},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "rain"}]},
        {"role": "developer", "content": "Be brief."},
    ]
    request, _ = parse_responses(orjson.dumps({"model": "demo", "input": given}))
    items = numbered(request.input, STEM)
    assert len({item["id"] for item in items}) == len(items) == 7
    assert items[1]["id"] == "msg_x"
    function = {"name": "weather", "arguments": '{"a":1}'}
    assert chat_messages(items) == [
        {"role": "user", "content": "How is it?"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": function},
                {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
        {"role": "tool", "tool_call_id": "c2", "content": "rain"},
        {"role": "developer", "content": "Be brief."},
    ]
    ResponseItemList.model_validate(page_of(items, limit=20, after=None))


def test_a_request_becomes_the_chat_that_asks_for_the_same() -> None:
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    asked = {
        "model": "demo",
        "input": "Hello",
        "instructions": "Be brief.",
        "max_output_tokens": 5,
        "temperature": 0,
        "text": {"format": schema},
        "tools": [{**TOOL, "strict": True}],
        "tool_choice": {"type": "function", "name": "weather"},
        "parallel_tool_calls": False,
        "top_logprobs": 2,
        "seed": 4,
        "reasoning": {"effort": "low", "summary": "auto"},
        "unheard_of": 1,
    }
    request, passed_on = parse_responses(orjson.dumps(asked))
    body = orjson.loads(chat_body(request, passed_on, request.input))
    assert body == {
        "model": "demo",
        "messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        "max_completion_tokens": 5,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
        "seed": 4,
        "reasoning_effort": "low",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
        },
        "tools": [
            {"type": "function", "function": {"name": "weather", "parameters": TOOL["parameters"], "strict": True}}
        ],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "parallel_tool_calls": False,
    }


def test_only_the_allowed_tools_are_offered() -> None:
    tools = [TOOL, {**TOOL, "name": "time"}]
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "time"}]}
    asked = {"model": "demo", "input": "Hello", "tools": tools, "tool_choice": choice}
    request, _ = parse_responses(orjson.dumps(asked))
    body = orjson.loads(chat_body(request, {}, request.input))
    assert [tool["function"]["name"] for tool in body["tools"]] == ["time"]
    assert body["tool_choice"] == "required"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": 5}, "input", "must be a string or a list of items"),
        ({"input": [7]}, "input", "item 0 is none"),
        ({"input": [{"content": "x"}]}, "input", "neither"),
        ({"input": [{"role": "king", "content": "x"}]}, "input", "'king'"),
        ({"input": [{"role": "user"}]}, "input", "needs `content` in item 0"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "'item_reference'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "'input_image'"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input", "must hold parts"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": ""}]}, "input", "`call_id`"),
        ({"input": []}, "input", "must hold a message"),
        ({"model": ""}, "model", "model"),
        ({"metadata": {"a": 1}}, "metadata", "strings to strings"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "at most 16"),
        ({"metadata": {"k": "v" * 513}}, "metadata", "512"),
        ({"background": True}, "background", "not supported"),
        ({"truncation": "auto"}, "truncation", "not supported"),
        ({"conversation": "c"}, "conversation", "not supported"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'web_search'"),
        ({"tools": [TOOL], "tool_choice": {"type": "mcp"}}, "tool_choice", "must be a word"),
        ({"tool_choice": "required"}, "tool_choice", "needs `tools`"),
    ],
)
def test_what_is_wrong_is_said_in_the_clients_words(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        request, passed_on = parse_responses(orjson.dumps({"model": "demo", "input": "Hello", **fields}))
        chat_body(request, passed_on, request.input)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert words in caught.value.message


def test_complaints_about_the_chat_are_told_in_the_names_of_the_request() -> None:
    long = retold(bad_request("`max_completion_tokens` is too large: 9.", param="max_completion_tokens"))
    assert (long.message, long.param) == ("`max_output_tokens` is too large: 9.", "max_output_tokens")
    tool = retold(bad_request("`tools[1].function.name` must be text.", param="tools[1].function.name"))
    assert (tool.message, tool.param) == ("`tools[1].name` must be text.", "tools[1].name")
    schema = retold(bad_request("No.", param="response_format.json_schema.schema", code="c"))
    assert (schema.message, schema.param, schema.code) == ("No.", "text.format.schema", "c")


def test_a_list_is_turned_page_by_page() -> None:
    items = [{"id": str(n)} for n in range(5)]
    first = page_of(items, limit=2, after=None)
    assert ([item["id"] for item in first["data"]], first["has_more"]) == (["0", "1"], True)
    last = page_of(items, limit=3, after=first["last_id"])
    assert ([item["id"] for item in last["data"]], last["has_more"]) == (["2", "3", "4"], False)
    assert page_of(items, limit=3, after="4")["data"] == []
    with pytest.raises(ApiError):
        page_of(items, limit=3, after="x")
