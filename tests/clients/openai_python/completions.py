"""Plain completions: texts and token ids, streams, echo."""

from __future__ import annotations

from tests.clients.openai_python.connection import client
from tests.clients.reporting import MODEL, Checks, same

PROMPT = "1, 2, 3, 4,"


def completion() -> str:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=6)
    same(answer.object, "text_completion", "object")
    same(answer.choices[0].finish_reason, "length", "finish_reason")
    assert answer.usage is not None
    same(answer.usage.completion_tokens, 6, "completion_tokens")
    return answer.choices[0].text


def completion_stream() -> str:
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt=PROMPT,
            temperature=0,
            max_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    whole = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=6)
    same(text, whole.choices[0].text, "the streamed text")
    assert chunks[-1].usage is not None
    same(chunks[-1].usage.completion_tokens, 6, "completion_tokens")
    return f"{len(chunks)} chunks"


def completion_of_several_prompts() -> str:
    answer = client.completions.create(model=MODEL, prompt=[PROMPT, "a, b, c,"], n=2, max_tokens=4)
    same([choice.index for choice in answer.choices], [0, 1, 2, 3], "indices")
    return " | ".join(choice.text for choice in answer.choices)


def completion_of_token_ids() -> str:
    asked = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=1, extra_body={"return_token_ids": True})
    ids = asked.choices[0].model_dump()["prompt_token_ids"]
    by_text = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=6)
    by_ids = client.completions.create(model=MODEL, prompt=[ids, ids], temperature=0, max_tokens=6)
    same([choice.text for choice in by_ids.choices], [by_text.choices[0].text] * 2, "the texts from token ids")
    return f"{len(ids)} ids"


def completion_logprobs() -> str:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=4, logprobs=2)
    told = answer.choices[0].logprobs
    assert told is not None and told.tokens and told.token_logprobs and told.text_offset and told.top_logprobs
    same("".join(told.tokens), answer.choices[0].text, "the tokens' text")
    same(len(told.token_logprobs), 4, "number of token_logprobs")
    return str(told.tokens)


def completion_echo_with_logprobs() -> str:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=1, logprobs=1, echo=True)
    told = answer.choices[0].logprobs
    assert answer.choices[0].text.startswith(PROMPT), answer.choices[0].text
    assert told is not None and told.tokens and told.token_logprobs and told.top_logprobs
    assert answer.usage is not None
    same(len(told.tokens), answer.usage.prompt_tokens + 1, "number of tokens")
    same(told.token_logprobs[0], None, "the first token's log probability")
    assert all(number is not None and number <= 0 for number in told.token_logprobs[1:]), told.token_logprobs
    same("".join(told.tokens), answer.choices[0].text, "the tokens' text")
    return f"{len(told.tokens)} tokens"


def add_to(checks: Checks) -> None:
    """Every check of this file."""
    for check in (completion, completion_stream, completion_of_several_prompts, completion_of_token_ids):
        checks.add(check)
    checks.add(completion_logprobs)
    checks.add(completion_echo_with_logprobs)
