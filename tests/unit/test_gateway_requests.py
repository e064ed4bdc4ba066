"""What the gateway takes for a request and what it says to the rest."""

from __future__ import annotations

import json
from typing import Any

import pytest

from molink_gateway.api_errors import ApiError
from molink_gateway.requests import parse_chat, parse_completion

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "demo", "messages": HELLO, **fields}).encode()


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": "demo", "prompt": "Hello", **fields}).encode()


def test_a_small_chat_has_the_defaults_of_openai() -> None:
    request = parse_chat(chat())
    assert request.num_choices == 1
    assert request.stop == []
    assert request.temperature is None
    assert request.likeliest is None
    assert not request.wants_usage


def test_nulls_mean_the_default() -> None:
    names = ("stream", "n", "stop", "seed", "temperature", "top_p", "logit_bias", "max_tokens", "stream_options")
    request = parse_chat(chat(**dict.fromkeys([*names, "tools", "response_format", "logprobs", "user"])))
    assert request.num_choices == 1
    assert request.stop == []
    assert request.logit_bias == {}


def test_content_parts_are_joined_and_roles_mapped() -> None:
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None},
    ]
    assert parse_chat(chat(messages=messages)).turns() == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": ""},
    ]


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert parse_chat(chat(max_tokens=5, max_completion_tokens=7)).most_tokens == ("max_completion_tokens", 7)
    assert parse_chat(chat(max_tokens=5)).most_tokens == ("max_tokens", 5)


def test_unknown_fields_are_left_out() -> None:
    request = parse_chat(chat(reasoning_effort="high", store=True, metadata={"a": "b"}, nonsense=[1]))
    assert request.model == "demo"


def test_values_that_ask_for_nothing_are_harmless() -> None:
    parse_chat(chat(tools=[], tool_choice="none", response_format={"type": "text"}, modalities=["text"]))
    parse_completion(completion(suffix="", best_of=1))


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_every_shape_of_prompt(prompt: Any, prompts: list[Any]) -> None:
    assert parse_completion(completion(prompt=prompt)).prompt == prompts


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "'user'"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]", "content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content", "part 0"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "required"),
        ({"model": 5}, "model", "string"),
        ({"model": ""}, "model", "at least 1 character"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"n": 1000}, "n", "less than or equal to 16"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1.5}, "n", "integer"),
        ({"n": True}, "n", "integer"),
        ({"stop": ["x"] * 100}, "stop", "at most 16 strings, but holds 100"),
        ({"stop": [""]}, "stop", "empty"),
        ({"stop": 7}, "stop", "string or a list"),
        ({"stop": ["y" * 2000]}, "stop", "1024"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "token ids"),
        ({"temperature": 3}, "temperature", "less than or equal to 2, but it is 3"),
        ({"temperature": "hot"}, "temperature", 'number, but it is "hot"'),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 1.1}, "top_p", "less than or equal to 1"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"min_p": 2}, "min_p", "less than or equal to 1"),
        ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "'x'"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100"),
        ({"logit_bias": {str(n): 1 for n in range(2000)}}, "logit_bias", "at most 1024"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 1, but it is -1"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 10**30}, "max_tokens", "integer"),
        ({"max_completion_tokens": "9"}, "max_completion_tokens", "integer"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens", "max_tokens"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "boolean"),
        ({"user": 5}, "user", "string"),
    ],
)
def test_a_wrong_field_is_named_and_put_right(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat(chat(**fields))
    error = caught.value
    assert error.status == 400
    assert error.param == param
    assert words in error.message
    assert set(error.body()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": [{}]},
        {"function_call": {"name": "f"}},
        {"tools": [{"type": "web_search", "function": {"name": "f"}}]},
        {"chat_template": "{{ messages }}"},
        {"audio": {"voice": "alloy"}},
        {"modalities": ["text", "audio"]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    ],
)
def test_what_would_change_the_answer_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat(chat(**fields))
    assert caught.value.status == 400
    assert caught.value.code == "unsupported"
    assert caught.value.param is not None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, None),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["x"] * 200}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_wrong_completions(fields: dict[str, Any], param: str | None) -> None:
    if param is None:
        parse_completion(completion(**fields))  # an empty text may hold a begin-of-text token: known later
        return
    with pytest.raises(ApiError) as caught:
        parse_completion(completion(**fields))
    assert caught.value.param == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"{",
        b"[1]",
        b'"text"',
        b"null",
        b'{"model": "demo", "temperature": NaN}',
        b'{"model": "demo", "temperature": Infinity}',
        b'{"model": "demo", "temperature": 1e999}',
        b'{"model": "d\xff\xfe"}',
        b'{"model": "\\ud800"}',
        b"[" * 5000,
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat(body)
    assert caught.value.status == 400
    assert caught.value.code == "invalid_json"


def test_a_value_is_never_shown_at_length() -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat(chat(temperature="x" * 100_000))
    assert len(caught.value.message) < 300
