"""Tools and forms of the answer over real HTTP, with the usual client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from molink.embedded import EmbeddedServer
from molink_common.bus import NatsBus
from molink_common.messages import FinishReason, SubmitSequence, TokenEvent
from molink_gateway.call_formats import CallFormat
from molink_gateway.opening import RESUMABLE
from molink_gateway.tokenizer import load_tokenizer
from molink_gateway.tool_calls import CallReader
from tests.integration.test_gateway_pool import CHAT_TEMPLATE, FakePool, fake_pool, prompt_of, ready_gateway, submitted

HELLO: list[Any] = [{"role": "user", "content": "How is the weather in Paris?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
TIME: Any = {"type": "function", "function": {"name": "time"}}
TWO_CALLS = (
    'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris 日本"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)
QWEN_TEMPLATE = (
    "{% if tools %}Tools:{% for tool in tools %} {{ tool.function.name }}{% endfor %} <tool_call>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}[{{ call.function.name }}({{ call.function.arguments.city }})]"
    "{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if mood %}{{ mood }}{% endif %}"
)


@pytest.fixture
async def pool(bus: NatsBus, tmp_path: Path) -> AsyncIterator[FakePool]:
    async with fake_pool(bus, tmp_path, chat_template=QWEN_TEMPLATE) as pool:
        pool.text = TWO_CALLS
        yield pool


async def test_calls_in_a_whole_answer(client: openai.AsyncOpenAI, pool: FakePool) -> None:
    answer = await client.chat.completions.create(model="demo", messages=HELLO, tools=[WEATHER, TIME])
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    calls = choice.message.tool_calls
    assert calls is not None
    assert [(call.type, call.function.name, call.function.arguments) for call in calls if call.type == "function"] == [
        ("function", "weather", '{"city": "Paris 日本"}'),
        ("function", "time", "{}"),
    ]
    assert len({call.id for call in calls}) == 2
    assert await prompt_of(pool) == (
        f"Tools: weather time <tool_call>\n<|im_start|>user\n{HELLO[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_calls_in_a_stream_as_the_client_gathers_them(client: openai.AsyncOpenAI, pool: FakePool) -> None:
    strict: list[Any] = [{**tool, "function": {**tool["function"], "strict": True}} for tool in (WEATHER, TIME)]
    async with client.chat.completions.stream(model="demo", messages=HELLO, tools=strict) as stream:
        kinds = [event.type async for event in stream]
        (choice,) = (await stream.get_final_completion()).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    assert [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or ()] == [
        ("weather", {"city": "Paris 日本"}),
        ("time", {}),
    ]
    assert kinds.count("tool_calls.function.arguments.done") == 2
    assert kinds.count("tool_calls.function.arguments.delta") >= 2


async def test_without_tools_the_same_text_is_text(client: openai.AsyncOpenAI, pool: FakePool) -> None:
    cases: list[dict[str, Any]] = [{}, {"tools": [WEATHER], "tool_choice": "none"}]
    for fields in cases:
        answer = await client.chat.completions.create(model="demo", messages=HELLO, **fields)
        assert answer.choices[0].message.content == TWO_CALLS
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].finish_reason == "stop"
        assert "Tools:" not in await prompt_of(pool)


async def test_one_call_is_enough_where_only_one_may_be_made(client: openai.AsyncOpenAI, pool: FakePool) -> None:
    answer = await client.chat.completions.create(
        model="demo", messages=HELLO, tools=[WEATHER, TIME], parallel_tool_calls=False
    )
    assert [call.id for call in answer.choices[0].message.tool_calls or ()] != []
    assert len(answer.choices[0].message.tool_calls or ()) == 1
    assert answer.choices[0].finish_reason == "tool_calls"
    assert await pool.cancelled.get() == (await submitted(pool)).sequence


async def test_a_required_call_is_forced_at_the_tail(client: openai.AsyncOpenAI, pool: FakePool) -> None:
    pool.text = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    answer = await client.chat.completions.create(
        model="demo",
        messages=HELLO,
        tools=[WEATHER, TIME],
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )
    calls = answer.choices[0].message.tool_calls or []
    assert len(calls) == 1
    call = calls[0]
    assert call.type == "function"
    assert call.function.arguments == '{"city": "Oslo"}'
    assert answer.choices[0].message.content is None
    grammar = (await submitted(pool)).options.grammar
    assert grammar is not None
    assert "weather" in grammar
    assert "time" not in grammar


async def test_a_conversation_with_results_goes_through_the_template(
    client: openai.AsyncOpenAI, pool: FakePool
) -> None:
    first = await client.chat.completions.create(model="demo", messages=HELLO, tools=[WEATHER, TIME])
    await prompt_of(pool)
    message = first.choices[0].message
    results: list[Any] = [
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls or ()
    ]
    asked: list[Any] = [*HELLO, message.model_dump(), *results]
    await client.chat.completions.create(model="demo", messages=asked)
    assert "I look.[weather(Paris 日本)][time()]<|im_end|>\n<|im_start|>tool\nsunny" in await prompt_of(pool)


async def test_the_last_message_is_continued(client: openai.AsyncOpenAI, pool: FakePool) -> None:
    asked: list[Any] = [*HELLO, {"role": "assistant", "content": "It is"}]
    extra = {"continue_final_message": True, "chat_template_kwargs": {"mood": "!"}, "priority": -3}
    await client.chat.completions.create(model="demo", messages=asked, extra_body=extra)
    submit = await submitted(pool)
    assert submit.priority == -3
    text = pool.tokenizer.decode(list(submit.prompt), skip_special_tokens=False)
    assert text.endswith("<|im_start|>assistant\nIt is")
    extra = {"add_generation_prompt": False, "chat_template_kwargs": {"mood": "!"}}
    await client.chat.completions.create(model="demo", messages=HELLO, extra_body=extra)
    assert (await prompt_of(pool)).endswith("<|im_end|>\n!")


@pytest.mark.parametrize("name", ["messages", "conversation", "chat_template", "tokenize", "tools", "return_dict"])
async def test_a_template_never_reads_what_a_client_puts_in_the_servers_place(
    http: httpx.AsyncClient, pool: FakePool, name: str
) -> None:
    body = {"model": "demo", "messages": HELLO, "chat_template_kwargs": {name: []}}
    response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json() == {
        "error": {
            "message": f"`chat_template_kwargs` must not hold '{name}': that is for the server to say.",
            "type": "invalid_request_error",
            "param": "chat_template_kwargs",
            "code": None,
        }
    }
    assert pool.submitted.empty()


async def test_forms_of_the_answer_reach_the_tail(client: openai.AsyncOpenAI, pool: FakePool) -> None:
    await client.chat.completions.create(model="demo", messages=HELLO, response_format={"type": "json_object"})
    assert (await submitted(pool)).options.grammar is not None
    await client.chat.completions.create(model="demo", messages=HELLO, response_format={"type": "text"})
    assert (await submitted(pool)).options.grammar is None
    await client.completions.create(
        model="demo", prompt="Yes?", extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    )
    grammar = (await submitted(pool)).options.grammar
    assert grammar is not None
    assert '\\"no\\"' in grammar


async def test_cached_tokens_are_counted_once_for_each_prompt(client: openai.AsyncOpenAI, pool: FakePool) -> None:
    async def say(submit: SubmitSequence) -> None:
        first = TokenEvent(sequence=submit.sequence, index=0, token=5, cached_tokens=3)
        last = TokenEvent(sequence=submit.sequence, index=1, token=2, finish=FinishReason.STOP)
        await pool.say_step([first])
        await pool.say_step([last])

    pool.answer = say
    answer = await client.completions.create(model="demo", prompt=[[7, 8, 9, 10], [7, 8, 9]], n=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 7
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 6
    stream = await client.chat.completions.create(
        model="demo", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    usage = [chunk.usage async for chunk in stream][-1]
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 3


async def test_usage_in_every_chunk_only_beside_the_usage_at_the_end(http: httpx.AsyncClient) -> None:
    for options, counts in (
        ({"include_usage": True, "continuous_usage_stats": True}, True),
        ({"continuous_usage_stats": True}, False),
    ):
        body = {"model": "demo", "messages": HELLO, "stream": True, "stream_options": options}
        lines = (await http.post("/v1/chat/completions", json=body)).text.splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert all(("usage" in chunk) is counts for chunk in chunks)
        assert all(chunk["usage"]["total_tokens"] > 0 for chunk in chunks if counts)


async def test_stop_strings_and_special_tokens_may_be_part_of_the_answer(
    client: openai.AsyncOpenAI, pool: FakePool
) -> None:
    pool.text = "one<|im_start|> two three"
    extra: dict[str, Any] = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    answer = await client.completions.create(model="demo", prompt="x", max_tokens=50, stop=["two"], extra_body=extra)
    assert answer.choices[0].text == "one<|im_start|> two"
    answer = await client.completions.create(model="demo", prompt="x", max_tokens=50, stop=["two"])
    assert answer.choices[0].text == "one "


async def test_a_stop_tokens_text_is_no_part_of_the_answer(client: openai.AsyncOpenAI, pool: FakePool) -> None:
    async def say(submit: SubmitSequence) -> None:
        tokens = pool.tokenizer.encode("one!").ids
        for index, token in enumerate(tokens):
            finish = FinishReason.STOP if index == len(tokens) - 1 else None
            await pool.say(submit.sequence, index, token, finish)

    pool.answer = say
    (stop,) = pool.tokenizer.encode("!").ids
    for kept, text in ((False, "one"), (True, "one!")):
        extra = {"stop_token_ids": [stop], "include_stop_str_in_output": kept}
        answer = await client.completions.create(model="demo", prompt="x", extra_body=extra)
        assert answer.choices[0].text == text


async def test_a_stream_of_calls_is_taken_up_behind_any_token(http: httpx.AsyncClient, pool: FakePool) -> None:
    body = {"model": "demo", "messages": HELLO, "tools": [WEATHER, TIME], "stream": True}
    response = await http.post("/v1/chat/completions", json=body, headers={RESUMABLE: "1"})
    whole = gathered(response.text)
    assert whole[0] == "I look."
    assert [call[1:] for call in whole[1].values()] == [["weather", '{"city": "Paris 日本"}'], ["time", "{}"]]
    stream, tokens = response.headers["x-molink-stream"], pool.tokenizer.encode(TWO_CALLS).ids
    detokenizer = load_tokenizer(pool.folder).detokenizer((await submitted(pool)).prompt[-16:])
    read = ""
    for num_told in range(len(tokens) + 1):
        read += detokenizer.feed(tokens[num_told - 1]) if num_told else ""
        told = CallReader(CallFormat.HERMES, ["weather", "time"]).feed(read)
        place = f"{stream}.{num_told}"
        content, calls, ends = gathered(
            (await http.post("/v1/chat/completions", headers={"last-event-id": place})).text
        )
        assert told.text + content == whole[0]
        assert ends == whole[2] == ["tool_calls"]
        for delta in told.calls:
            rest = calls.setdefault(delta.index, ["", "", ""])
            calls[delta.index] = [whole[1][delta.index][0], (delta.name or "") + rest[1], delta.arguments + rest[2]]
        assert calls == whole[1]


def gathered(events: str) -> tuple[str, dict[int, list[str]], list[str]]:
    """Content, calls (id, name, arguments) and ends of a stream."""
    content, ends = "", []
    calls: dict[int, list[str]] = {}
    chunks = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    for choice in (chunk["choices"][0] for chunk in chunks):
        content += choice["delta"].get("content", "")
        for call in choice["delta"].get("tool_calls", ()):
            known = calls.setdefault(call["index"], ["", "", ""])
            known[0] += call.get("id", "")
            known[1] += call["function"].get("name", "")
            known[2] += call["function"]["arguments"]
        if choice["finish_reason"] is not None:
            ends.append(choice["finish_reason"])
    return content, calls, ends


async def test_a_template_without_tools_is_told_in_words(
    bus: NatsBus, nats_server: EmbeddedServer, tmp_path: Path
) -> None:
    async with fake_pool(bus, tmp_path, chat_template=CHAT_TEMPLATE) as pool:
        pool.card = pool.card.model_copy(update={"context_length": 4096})
        pool.text = TWO_CALLS
        async with ready_gateway(nats_server) as http:
            call = {"id": "1", "type": "function", "function": {"name": "time", "arguments": "{}"}}
            messages = [
                *HELLO,
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": "noon"},
            ]
            body = {"model": "demo", "messages": messages, "tools": [WEATHER, TIME]}
            answer = (await http.post("/v1/chat/completions", json=body)).json()
            assert [one["function"]["name"] for one in answer["choices"][0]["message"]["tool_calls"]] == [
                "weather",
                "time",
            ]
            prompt = await prompt_of(pool)
            assert prompt.startswith("<|im_start|>system\nYou can call these functions")
            assert "<|im_start|>user\n<tool_response>\nnoon\n</tool_response><|im_end|>" in prompt
