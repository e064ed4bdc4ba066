"""From a request to sampling options."""

from __future__ import annotations

from typing import Any

import pytest

from molink_gateway.api_errors import ApiError
from molink_gateway.options import derived_seed, sampling_options
from molink_gateway.requests import ChatRequest


def options_of(num_prompt_tokens: int = 10, default_tokens: int | None = None, **fields: Any) -> list[Any]:
    request = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields})
    return sampling_options(
        request,
        num_prompt_tokens=num_prompt_tokens,
        context_length=100,
        vocabulary_size=50,
        seed=99,
        default_tokens=default_tokens,
        prompt_field="messages",
    )


def test_an_answer_may_fill_the_context() -> None:
    (options,) = options_of()
    assert options.max_tokens == 90
    assert options.temperature == 1.0
    assert options.seed == 99


def test_a_default_is_bounded_by_the_context() -> None:
    assert options_of(default_tokens=16)[0].max_tokens == 16
    assert options_of(95, default_tokens=16)[0].max_tokens == 5


@pytest.mark.parametrize("num_prompt_tokens", [100, 101, 5000])
def test_a_prompt_that_fills_the_context_is_refused_with_the_numbers(num_prompt_tokens: int) -> None:
    with pytest.raises(ApiError) as caught:
        options_of(num_prompt_tokens)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
    assert "100" in caught.value.message
    assert str(num_prompt_tokens) in caught.value.message


def test_an_absurd_length_is_refused_with_what_is_left() -> None:
    with pytest.raises(ApiError) as caught:
        options_of(max_completion_tokens=10**9)
    assert caught.value.param == "max_completion_tokens"
    assert "at most 90" in caught.value.message


def test_min_tokens_must_fit_what_is_left() -> None:
    with pytest.raises(ApiError) as caught:
        options_of(min_tokens=91)
    assert caught.value.param == "min_tokens"


@pytest.mark.parametrize("fields", [{"stop_token_ids": [50]}, {"logit_bias": {"50": 1}}])
def test_tokens_outside_of_the_vocabulary_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="49"):
        options_of(**fields)


def test_the_values_arrive() -> None:
    (options,) = options_of(
        temperature=0,
        top_p=0,
        top_k=-1,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        logit_bias={"3": -100},
        seed=-1,
        max_tokens=7,
        min_tokens=2,
        stop_token_ids=[4, 4, 5],
        ignore_eos=True,
        logprobs=True,
        top_logprobs=3,
    )
    assert options.is_greedy
    assert 0 < options.top_p < 1e-6
    assert options.top_k == 0
    assert options.logit_bias == {3: -100.0}
    assert options.seed == 2**63 - 1
    assert options.stop_token_ids == (4, 5)
    assert options.top_logprobs == 3
    assert (options.max_tokens, options.min_tokens, options.ignore_eos) == (7, 2, True)


def test_seeds_of_several_choices_differ_and_repeat() -> None:
    seeds = [options.seed for options in options_of(n=16, seed=7)]
    assert len(set(seeds)) == 16
    assert seeds[0] == 7
    assert seeds == [options.seed for options in options_of(n=16, seed=7)]
    assert seeds != [options.seed for options in options_of(n=16, seed=8)]
    assert [derived_seed(7, choice) for choice in range(16)] == seeds
