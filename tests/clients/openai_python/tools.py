"""Tools: calls that are asked for have the shape of the function, whole and streamed, and their results are read."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

from tests.clients.openai_python.connection import client, user
from tests.clients.reporting import MODEL, Checks, same

CITIES = ("Paris", "Rome", "Oslo")
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": list(CITIES)}, "days": {"type": "integer", "maximum": 9}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {
    "type": "function",
    "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}
QUESTION = user("What is the weather in Oslo?")


def _check_call(name: str, arguments: str) -> str:
    told = json.loads(arguments)
    if name == "get_weather":
        assert told["city"] in CITIES, told
    else:
        same((name, told), ("get_time", {}), "the call")
    return f"{name}({arguments})"


def tool_named() -> str:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        tools=[WEATHER, CLOCK],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=100,
        temperature=1.0,
    )
    choice = answer.choices[0]
    assert choice.finish_reason in ("stop", "tool_calls"), choice.finish_reason
    (call,) = choice.message.tool_calls or []
    assert call.type == "function" and call.id, call
    same(call.function.name, "get_weather", "name")
    assert not choice.message.content, choice.message.content
    return _check_call(call.function.name, call.function.arguments)


def tool_required() -> str:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        tools=[WEATHER, CLOCK],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
        temperature=0,
    )
    same(answer.choices[0].finish_reason, "tool_calls", "finish_reason")
    calls = answer.choices[0].message.tool_calls or []
    same(len(calls), 1, "number of calls")
    assert calls[0].type == "function"
    return _check_call(calls[0].function.name, calls[0].function.arguments)


def tool_stream() -> str:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
        temperature=0,
        stream=True,
    )
    name = arguments = identity = reason = ""
    pieces = 0
    for chunk in stream:
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or []:
                same(call.index, 0, "index")
                identity += call.id or ""
                if call.function is not None:
                    name += call.function.name or ""
                    arguments += call.function.arguments or ""
                    pieces += 1
    same(reason, "tool_calls", "finish_reason")
    same(name, "get_weather", "name")
    assert identity and pieces > 1, (identity, pieces)
    return f"{_check_call(name, arguments)} in {pieces} pieces"


class GetWeather(BaseModel):
    """The weather in a city."""

    city: Literal["Paris", "Rome", "Oslo"]


def tool_parsed() -> str:
    with client.chat.completions.stream(
        model=MODEL,
        messages=QUESTION,
        tools=[openai.pydantic_function_tool(GetWeather)],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
        temperature=0,
    ) as stream:
        kinds = {event.type for event in stream}
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, GetWeather), call
    assert "tool_calls.function.arguments.done" in kinds, kinds
    return repr(call.function.parsed_arguments)


def tool_result_read() -> str:
    messages: list[ChatCompletionMessageParam] = [
        *QUESTION,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city":"Oslo"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "Snow, minus four degrees."},
    ]
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER], tool_choice="none", max_tokens=24, temperature=0
    )
    assert not answer.choices[0].message.tool_calls
    return str(answer.choices[0].message.content)


def tool_auto() -> str:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, tools=[WEATHER], tool_choice="auto", max_tokens=60, temperature=0
    )
    message = answer.choices[0].message
    assert message.content or message.tool_calls, message
    for call in message.tool_calls or []:
        assert call.type == "function"
        json.loads(call.function.arguments)
    return f"{answer.choices[0].finish_reason}: {message.content or message.tool_calls}"


def add_to(checks: Checks) -> None:
    """Every check of this file."""
    for check in (tool_named, tool_required, tool_stream, tool_parsed, tool_result_read, tool_auto):
        checks.add(check)
