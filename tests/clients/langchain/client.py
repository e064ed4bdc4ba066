"""LangChain, by langchain-openai."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

from tests.clients.reporting import API_KEY, BASE_URL, MODEL, TIMEOUT_S, Checks, same

checks = Checks("langchain")
QUESTION = "Name the capital of France."

chat = ChatOpenAI(
    model=MODEL, base_url=BASE_URL, api_key=API_KEY, temperature=0, max_tokens=200, timeout=TIMEOUT_S, max_retries=0
)


class Person(BaseModel):
    """A person."""

    name: Annotated[str, Field(max_length=20)]
    age: Annotated[int, Field(ge=0, le=120)]


@tool
def get_weather(city: Literal["Paris", "Rome", "Oslo"]) -> str:
    """The weather in a city."""
    return f"Snow in {city}."


@checks.add
def invoke() -> str:
    answer = chat.invoke([SystemMessage("Be brief."), HumanMessage(QUESTION)])
    same(answer.response_metadata["finish_reason"], "stop", "finish_reason")
    usage = answer.usage_metadata
    assert usage is not None
    same(usage["total_tokens"], usage["input_tokens"] + usage["output_tokens"], "total_tokens")
    return str(answer.content)


@checks.add
def stream() -> str:
    whole: Any = None
    pieces = 0
    for chunk in chat.stream(QUESTION, stream_usage=True):
        whole = chunk if whole is None else whole + chunk
        pieces += 1
    assert isinstance(whole, AIMessageChunk)
    same(whole.content, chat.invoke(QUESTION).content, "the streamed text")
    assert whole.usage_metadata is not None and whole.usage_metadata["output_tokens"] > 1, whole
    same(whole.response_metadata["finish_reason"], "stop", "finish_reason")
    return f"{pieces} chunks"


@checks.add
def asynchronous_batch() -> str:
    answers = asyncio.run(chat.abatch([f"What is {number} plus {number}?" for number in range(4)]))
    same(len([answer for answer in answers if answer.content]), 4, "number of answers")
    return f"{len(answers)} answers"


@checks.add
def log_probabilities() -> str:
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    told = answer.response_metadata["logprobs"]["content"]
    assert told and all(len(token["top_logprobs"]) == 2 for token in told), told
    return f"{len(told)} tokens"


@checks.add
def bind_tools() -> str:
    answer = chat.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False).invoke("Weather in Oslo?")
    (call,) = answer.tool_calls
    same(call["name"], "get_weather", "name")
    said = get_weather.invoke(call)
    assert isinstance(said, ToolMessage)
    after = chat.bind_tools([get_weather], tool_choice="none").invoke([HumanMessage("Weather?"), answer, said])
    assert after.content, after
    return f"{call['args']} → {after.content}"


@checks.add
def bind_tools_by_name_streamed() -> str:
    whole: Any = None
    for chunk in chat.bind_tools([get_weather], tool_choice="get_weather").stream("Weather in Oslo?"):
        whole = chunk if whole is None else whole + chunk
    (call,) = whole.tool_calls
    assert call["args"]["city"] in ("Paris", "Rome", "Oslo"), call
    return str(call["args"])


@checks.add
def with_structured_output() -> str:
    person = chat.with_structured_output(Person).invoke("Invent a person.")
    assert isinstance(person, Person), person
    return repr(person)


@checks.add
def with_structured_output_by_function_calling() -> str:
    person = chat.with_structured_output(Person, method="function_calling").invoke("Invent a person.")
    assert isinstance(person, Person), person
    return repr(person)


@checks.add
def with_structured_output_streamed() -> str:
    schema = Person.model_json_schema() | {"additionalProperties": False}
    partial = list(chat.with_structured_output(schema).stream("Invent one."))
    assert Person.model_validate(partial[-1]), partial
    return f"{len(partial)} partial objects, last {partial[-1]}"


@checks.add
def completion() -> str:
    model = OpenAI(model=MODEL, base_url=BASE_URL, api_key=API_KEY, temperature=0, max_tokens=6, max_retries=0)
    return str(model.invoke("1, 2, 3, 4,"))


@checks.add
def responses() -> str:
    model = ChatOpenAI(
        model=MODEL,
        base_url=BASE_URL,
        api_key=API_KEY,
        temperature=0,
        max_tokens=32,
        max_retries=0,
        use_responses_api=True,
    )
    whole: Any = None
    for chunk in model.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    assert isinstance(whole, AIMessageChunk)
    same(whole.text, model.invoke(QUESTION).text, "the streamed text")
    assert whole.text and whole.usage_metadata, whole
    return str(whole.text)


if __name__ == "__main__":
    checks.run()
