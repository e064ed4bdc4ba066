"""Chat: whole answers, streams, several choices, log probabilities."""

from __future__ import annotations

import asyncio

from tests.clients.openai_python.connection import async_client, client, user
from tests.clients.reporting import MODEL, Checks, same

QUESTION = "Name the capital of France."


def models() -> str:
    names = [model.id for model in client.models.list()]
    assert MODEL in names, names
    same(client.models.retrieve(MODEL).id, MODEL, "the model's id")
    return ", ".join(names)


def chat() -> str:
    answer = client.chat.completions.create(model=MODEL, messages=user(QUESTION), temperature=0, max_tokens=24)
    same(answer.object, "chat.completion", "object")
    same(answer.choices[0].message.role, "assistant", "role")
    same(answer.choices[0].finish_reason, "stop", "finish_reason")
    text, usage = answer.choices[0].message.content, answer.usage
    assert text and usage is not None
    same(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens, "total_tokens")
    return text


def chat_with_parts_and_roles() -> str:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "Answer with one word."},
            {"role": "user", "content": [{"type": "text", "text": "Say"}, {"type": "text", "text": " hello."}]},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "Again.", "name": "ann"},
        ],
        max_completion_tokens=8,
        user="ann",
        metadata={"case": "parts"},
        store=False,
    )
    assert answer.usage is not None and answer.usage.completion_tokens <= 8, answer.usage
    return str(answer.choices[0].message.content)


def chat_cut_at_its_limit() -> str:
    answer = client.chat.completions.create(
        model=MODEL, messages=user("Count to one hundred."), max_completion_tokens=3, temperature=0
    )
    same(answer.choices[0].finish_reason, "length", "finish_reason")
    assert answer.usage is not None
    same(answer.usage.completion_tokens, 3, "completion_tokens")
    return str(answer.choices[0].message.content)


def chat_stream() -> str:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=user(QUESTION),
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    same(len({chunk.id for chunk in chunks}), 1, "number of ids")
    *spoken, last = chunks
    same(last.choices, [], "choices of the usage chunk")
    assert last.usage is not None and last.usage.completion_tokens > 1, last.usage
    same(spoken[0].choices[0].delta.role, "assistant", "first role")
    same(spoken[-1].choices[0].finish_reason, "stop", "finish_reason")
    text = "".join(chunk.choices[0].delta.content or "" for chunk in spoken)
    whole = client.chat.completions.create(model=MODEL, messages=user(QUESTION), temperature=0, max_tokens=24)
    same(text, whole.choices[0].message.content, "the streamed text")
    same(last.usage.completion_tokens, whole.usage and whole.usage.completion_tokens, "streamed completion_tokens")
    return f"{len(chunks)} chunks"


def chat_stream_left_early() -> str:
    with client.chat.completions.create(
        model=MODEL, messages=user("Tell a long story."), max_tokens=400, stream=True
    ) as stream:
        first = next(iter(stream))
    return first.id


def chat_choices_seed_and_stop() -> str:
    def ask() -> list[str]:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=user("Write a sentence about the sea."),
            n=2,
            seed=7,
            temperature=1.0,
            top_p=0.9,
            stop=[".", "!"],
            max_tokens=24,
            presence_penalty=0.1,
            frequency_penalty=0.1,
            logit_bias={"11": -1},
        )
        same([choice.index for choice in answer.choices], [0, 1], "indices")
        return [str(choice.message.content) for choice in answer.choices]

    texts = ask()
    assert not any("." in text or "!" in text for text in texts), texts
    same(ask(), texts, "the same seed's second answer")
    return " | ".join(texts)


def chat_logprobs() -> str:
    answer = client.chat.completions.create(
        model=MODEL, messages=user(QUESTION), temperature=0, max_tokens=8, logprobs=True, top_logprobs=3
    )
    told = answer.choices[0].logprobs
    assert told is not None and told.content, told
    for token in told.content:
        same(len(token.top_logprobs), 3, "number of top_logprobs")
        assert token.logprob <= 0
        same(token.top_logprobs[0].token, token.token, "the likeliest token at temperature 0")
    assert answer.usage is not None
    text = b"".join(bytes(token.bytes or []) for token in told.content).decode(errors="replace")
    assert text.startswith(str(answer.choices[0].message.content)), text
    return f"{len(told.content)} tokens, first {told.content[0].token!r} {told.content[0].logprob:.3f}"


def chat_stream_logprobs() -> str:
    stream = client.chat.completions.create(
        model=MODEL, messages=user(QUESTION), temperature=0, max_tokens=8, logprobs=True, stream=True
    )
    tokens = [
        token
        for chunk in stream
        for choice in chunk.choices
        if choice.logprobs is not None
        for token in choice.logprobs.content or []
    ]
    assert tokens
    assert all(token.top_logprobs == [] for token in tokens)
    return f"{len(tokens)} tokens"


def chat_streams_at_once() -> str:
    async def one(number: int) -> str:
        stream = await asynchronous.chat.completions.create(
            model=MODEL, messages=user(f"What is {number} plus {number}?"), max_tokens=12, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    async def eight() -> list[str]:
        async with asynchronous:
            return await asyncio.gather(*(one(number) for number in range(8)))

    asynchronous = async_client()
    texts = asyncio.run(eight())
    assert all(texts), texts
    return f"{len(texts)} streams"


def request_id() -> str:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=user("Hi"), max_tokens=2, extra_headers={"X-Request-Id": "client-check-1"}
    )
    same(raw.headers.get("x-request-id"), "client-check-1", "x-request-id")
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=user("Hi"), max_tokens=2)
    assert raw.parse()._request_id, dict(raw.headers)
    return str(raw.parse()._request_id)


def cached_tokens() -> str:
    long = user("Remember this well. " + "The quick brown fox jumps over the lazy dog. " * 30)
    first, second = (
        client.chat.completions.create(model=MODEL, messages=long, max_tokens=2, temperature=0) for _ in range(2)
    )
    same(first.choices[0].message.content, second.choices[0].message.content, "the second answer")
    assert second.usage is not None and second.usage.prompt_tokens_details is not None, second.usage
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached, second.usage
    return f"{cached} of {second.usage.prompt_tokens}"


def add_to(checks: Checks) -> None:
    """Every check of this file."""
    for check in (models, chat, chat_with_parts_and_roles, chat_cut_at_its_limit, chat_stream, chat_stream_left_early):
        checks.add(check)
    for check in (chat_choices_seed_and_stop, chat_logprobs, chat_stream_logprobs, chat_streams_at_once):
        checks.add(check)
    for check in (request_id, cached_tokens):
        checks.add(check)
