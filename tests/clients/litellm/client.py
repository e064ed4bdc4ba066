"""LiteLLM, by its `openai/` and `text-completion-openai/` providers."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any

import litellm
from pydantic import BaseModel, Field

from tests.clients.reporting import API_KEY, BASE_URL, MODEL, TIMEOUT_S, Checks, same

checks = Checks("litellm")
CONNECTION: dict[str, Any] = {
    "model": f"openai/{MODEL}",
    "api_base": BASE_URL,
    "api_key": API_KEY,
    "timeout": TIMEOUT_S,
    "num_retries": 0,
}
QUESTION = [{"role": "user", "content": "Name the capital of France."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome", "Oslo"]}},
            "required": ["city"],
        },
    },
}


class Person(BaseModel):
    """A person."""

    name: Annotated[str, Field(max_length=20)]
    age: Annotated[int, Field(ge=0, le=120)]


@checks.add
def completion() -> str:
    answer = litellm.completion(**CONNECTION, messages=QUESTION, temperature=0, max_tokens=24)
    same(answer.choices[0].finish_reason, "stop", "finish_reason")
    same(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens, "total_tokens")
    return str(answer.choices[0].message.content)


@checks.add
def stream() -> str:
    chunks = list(
        litellm.completion(
            **CONNECTION,
            messages=QUESTION,
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    built = litellm.stream_chunk_builder(chunks, messages=QUESTION)
    whole = litellm.completion(**CONNECTION, messages=QUESTION, temperature=0, max_tokens=24)
    same(built.choices[0].message.content, whole.choices[0].message.content, "the streamed text")
    same(built.choices[0].finish_reason, "stop", "finish_reason")
    same(built.usage.completion_tokens, whole.usage.completion_tokens, "completion_tokens")
    return f"{len(chunks)} chunks"


@checks.add
def asynchronous() -> str:
    async def ask() -> str:
        stream = await litellm.acompletion(**CONNECTION, messages=QUESTION, max_tokens=24, temperature=0, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    text = asyncio.run(ask())
    assert text
    return text


@checks.add
def sampling_of_vllm() -> str:
    """What OpenAI does not know goes through `extra_body`."""
    answer = litellm.completion(
        **CONNECTION, messages=QUESTION, max_tokens=6, extra_body={"top_k": 1, "min_p": 0.1, "ignore_eos": True}
    )
    same(answer.usage.completion_tokens, 6, "completion_tokens")
    return str(answer.choices[0].message.content)


@checks.add
def tool_required() -> str:
    answer = litellm.completion(
        **CONNECTION,
        messages=[{"role": "user", "content": "Weather in Oslo?"}],
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=200,
    )
    (call,) = answer.choices[0].message.tool_calls
    same(call.function.name, "get_weather", "name")
    assert json.loads(call.function.arguments)["city"], call
    same(answer.choices[0].finish_reason, "tool_calls", "finish_reason")
    return str(call.function.arguments)


@checks.add
def tool_stream() -> str:
    question = [{"role": "user", "content": "Weather in Oslo?"}]
    chunks = list(
        litellm.completion(
            **CONNECTION,
            messages=question,
            tools=[WEATHER],
            tool_choice={"type": "function", "function": {"name": "get_weather"}},
            temperature=0,
            max_tokens=200,
            stream=True,
        )
    )
    (call,) = litellm.stream_chunk_builder(chunks, messages=question).choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"], call
    return str(call.function.arguments)


@checks.add
def structured() -> str:
    answer = litellm.completion(
        **CONNECTION,
        messages=[{"role": "user", "content": "Invent a person."}],
        response_format=Person,
        temperature=0,
        max_tokens=200,
    )
    return repr(Person.model_validate_json(answer.choices[0].message.content))


@checks.add
def text_completion() -> str:
    answer = litellm.text_completion(
        **(CONNECTION | {"model": f"text-completion-openai/{MODEL}"}), prompt="1, 2, 3, 4,", max_tokens=6, temperature=0
    )
    same(answer.choices[0].finish_reason, "length", "finish_reason")
    return str(answer.choices[0].text)


@checks.add
def responses() -> str:
    answer = litellm.responses(
        model=f"openai/{MODEL}",
        api_base=BASE_URL,
        api_key=API_KEY,
        input="Name the capital of France.",
        max_output_tokens=24,
        temperature=0,
    )
    text = answer.output[0].content[0].text
    assert text, answer
    return str(text)


@checks.add
def refused() -> str:
    try:
        litellm.completion(**(CONNECTION | {"model": "openai/gpt-9-none"}), messages=QUESTION)
    except litellm.NotFoundError as error:
        told = str(error.message)
    else:
        raise AssertionError("an unknown model was not refused")
    try:
        litellm.completion(**CONNECTION, messages=[{"role": "user", "content": "word " * 9000}])
    except litellm.ContextWindowExceededError:
        return told
    raise AssertionError("a prompt that is too long was not refused")


if __name__ == "__main__":
    checks.run()
