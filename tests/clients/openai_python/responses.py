"""The responses endpoint: create, stream, keep, go on, parse, call."""

from __future__ import annotations

import json
from typing import Any

import openai

from tests.clients.openai_python.connection import client
from tests.clients.openai_python.structured import Person
from tests.clients.openai_python.tools import CITIES, WEATHER
from tests.clients.reporting import MODEL, Checks, same

QUESTION = "Name the capital of France."


def responses_create() -> str:
    answer = client.responses.create(
        model=MODEL, input=QUESTION, instructions="Be brief.", max_output_tokens=32, temperature=0
    )
    same(answer.object, "response", "object")
    assert answer.status in ("completed", "incomplete"), answer.status
    assert answer.output_text and answer.usage is not None
    same(answer.usage.total_tokens, answer.usage.input_tokens + answer.usage.output_tokens, "total_tokens")
    return answer.output_text


def responses_stream() -> str:
    events = list(
        client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=32, temperature=0, stream=True)
    )
    kinds = [event.type for event in events]
    same(kinds[0], "response.created", "first event")
    assert kinds[-1] in ("response.completed", "response.incomplete"), kinds[-1]
    for kind in ("response.output_item.added", "response.content_part.added", "response.output_text.done"):
        assert kind in kinds, kinds
    numbers = [event.sequence_number for event in events if hasattr(event, "sequence_number")]
    same(numbers, list(range(len(events))), "sequence numbers")
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    final: Any = events[-1]
    same(text, final.response.output_text, "the streamed text")
    return f"{len(events)} events"


def responses_stream_helper() -> str:
    with client.responses.stream(model=MODEL, input=QUESTION, max_output_tokens=32, temperature=0) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_text
    return final.output_text


def responses_kept() -> str:
    first = client.responses.create(model=MODEL, input="My name is Ann.", max_output_tokens=16, store=True)
    same(client.responses.retrieve(first.id).output_text, first.output_text, "the kept text")
    second = client.responses.create(
        model=MODEL, input="What is my name?", previous_response_id=first.id, max_output_tokens=16
    )
    same(second.previous_response_id, first.id, "previous_response_id")
    assert first.usage is not None and second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens, (first.usage, second.usage)
    client.responses.delete(first.id)
    try:
        client.responses.retrieve(first.id)
    except openai.NotFoundError as error:
        return error.message
    raise AssertionError("a deleted response was still there")


def responses_parse() -> str:
    answer = client.responses.parse(
        model=MODEL, input="Invent a person.", text_format=Person, max_output_tokens=200, temperature=0
    )
    assert isinstance(answer.output_parsed, Person), answer.output_text
    return repr(answer.output_parsed)


def responses_tool() -> str:
    tool: Any = {"type": "function", **WEATHER["function"], "strict": False}
    answer = client.responses.create(
        model=MODEL,
        input="What is the weather in Oslo?",
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=200,
        temperature=0,
    )
    calls = [item for item in answer.output if item.type == "function_call"]
    same(len(calls), 1, "number of calls")
    same(calls[0].name, "get_weather", "name")
    assert json.loads(calls[0].arguments)["city"] in CITIES
    after = client.responses.create(
        model=MODEL,
        input=[
            {"role": "user", "content": "What is the weather in Oslo?"},
            {
                "type": "function_call",
                "call_id": calls[0].call_id,
                "name": calls[0].name,
                "arguments": calls[0].arguments,
            },
            {"type": "function_call_output", "call_id": calls[0].call_id, "output": "Snow."},
        ],
        tools=[tool],
        tool_choice="none",
        max_output_tokens=16,
    )
    assert after.output_text
    return calls[0].arguments


def add_to(checks: Checks) -> None:
    """Every check of this file."""
    for check in (responses_create, responses_stream, responses_stream_helper, responses_kept):
        checks.add(check)
    checks.add(responses_parse)
    checks.add(responses_tool)
