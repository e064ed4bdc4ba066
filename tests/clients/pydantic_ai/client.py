"""Pydantic AI: agents with text, structured output and tools."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, RunContext
from pydantic_ai.capabilities import PrepareOutputTools
from pydantic_ai.messages import ToolCallPart
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai_compatible import OpenAICompatibleProvider
from pydantic_ai.settings import ModelSettings
from pydantic_ai.tools import ToolDefinition
from pydantic_ai.usage import UsageLimits

from tests.clients.reporting import API_KEY, BASE_URL, MODEL, TIMEOUT_S, Checks

checks = Checks("pydantic-ai")

provider = OpenAICompatibleProvider("molink", base_url=BASE_URL, api_key=API_KEY)
model = OpenAIChatModel(MODEL, provider=provider)
SETTINGS = ModelSettings(temperature=0, max_tokens=200, timeout=TIMEOUT_S, parallel_tool_calls=False)
LIMITS = UsageLimits(request_limit=4)


class Person(BaseModel):
    """A person."""

    name: Annotated[str, Field(max_length=20)]
    age: Annotated[int, Field(ge=0, le=120)]


class Report(BaseModel):
    """What the weather is like."""

    city: Literal["Paris", "Rome", "Oslo"]
    umbrella: bool


@checks.add
def text() -> str:
    run = Agent(model, system_prompt="Be brief.", model_settings=SETTINGS).run_sync("Name the capital of France.")
    usage = run.usage
    assert usage.input_tokens > 0 and usage.output_tokens > 0, usage
    return str(run.output)


@checks.add
def stream() -> str:
    agent = Agent(model, model_settings=SETTINGS)

    async def ask() -> tuple[list[str], str]:
        async with agent.run_stream("Name the capital of France.") as run:
            pieces = [piece async for piece in run.stream_text(delta=True, debounce_by=None)]
            return pieces, await run.get_output()

    pieces, whole = asyncio.run(ask())
    assert "".join(pieces) == whole, (pieces, whole)
    return f"{len(pieces)} pieces"


@checks.add
def output_by_tool() -> str:
    run = Agent(model, output_type=Person, model_settings=SETTINGS).run_sync("Invent a person.", usage_limits=LIMITS)
    assert isinstance(run.output, Person), run.output
    return repr(run.output)


@checks.add
def output_by_schema() -> str:
    agent = Agent(model, output_type=NativeOutput(Person), model_settings=SETTINGS)
    run = agent.run_sync("Invent a person.", usage_limits=LIMITS)
    assert isinstance(run.output, Person), run.output
    return repr(run.output)


@checks.add
def output_by_schema_streamed() -> str:
    agent = Agent(model, output_type=NativeOutput(Person), model_settings=SETTINGS)

    async def ask() -> Any:
        async with agent.run_stream("Invent a person.", usage_limits=LIMITS) as run:
            return await run.get_output()

    person = asyncio.run(ask())
    assert isinstance(person, Person), person
    return repr(person)


@checks.add
def tool_then_output() -> str:
    """The first step must call the tool; its result goes back, and the second gives the output."""

    def only_after_the_tool(context: RunContext[None], tools: list[ToolDefinition]) -> list[ToolDefinition]:
        return tools if asked else []

    async def only_once(context: RunContext[None], definition: ToolDefinition) -> ToolDefinition | None:
        return None if asked else definition

    asked: list[str] = []
    agent = Agent(
        model,
        output_type=Report,
        model_settings=SETTINGS,
        capabilities=[PrepareOutputTools(only_after_the_tool)],
    )

    @agent.tool_plain(prepare=only_once)
    def get_weather(city: Literal["Paris", "Rome", "Oslo"]) -> str:
        """The weather in a city."""
        asked.append(city)
        return f"Rain in {city}."

    run = agent.run_sync("Do I need an umbrella in Oslo?", usage_limits=LIMITS)
    assert asked, "the tool was not called"
    assert isinstance(run.output, Report), run.output
    calls = [
        part.tool_name for message in run.all_messages() for part in message.parts if isinstance(part, ToolCallPart)
    ]
    assert calls[0] == "get_weather", calls
    return f"{calls} → {run.output!r}"


@checks.add
def responses() -> str:
    agent = Agent(OpenAIResponsesModel(MODEL, provider=provider), output_type=NativeOutput(Person))
    run = agent.run_sync("Invent a person.", model_settings=SETTINGS, usage_limits=LIMITS)
    assert isinstance(run.output, Person), run.output
    return repr(run.output)


if __name__ == "__main__":
    checks.run()
