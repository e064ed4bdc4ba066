"""From a request and its prompt's length to the sampling options of its sequences. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from molink_common.sampling import SamplingOptions
from molink_gateway.api_errors import ApiError, bad_request, too_long
from molink_gateway.generation_fields import GenerationFields

COMPLETION_TOKENS = 16
"""Of a completion that does not say how many, as at OpenAI."""
_SEEDS = 2**63
_SMALLEST_TOP_P = 1e-9
"""OpenAI takes a `top_p` of 0; it means the likeliest token alone."""


def derived_seed(seed: int, choice: int) -> int:
    """The seed of the `choice`-th answer of a request with `n` > 1.

    Choice 0 has the request's own seed, so the first of several answers is the one that `n` = 1 gives. The others
    are the first 63 bits of BLAKE2b over ``seed`` and ``choice`` (8 bytes each, little-endian).
    """
    own = seed % _SEEDS
    if choice == 0:
        return own
    digest = hashlib.blake2b(own.to_bytes(8, "little") + choice.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _SEEDS


def sampling_options(
    request: GenerationFields,
    *,
    num_prompt_tokens: int,
    context_length: int,
    vocabulary_size: int,
    seed: int,
    default_tokens: int | None,
    prompt_field: str,
    grammar: str | None = None,
) -> list[SamplingOptions]:
    """The options of each choice, seeds apart.

    `seed` is used where the request has none; `default_tokens` bounds an answer of which the request does not
    say how long it may be (None: the rest of the context).

    Raises:
        ApiError: 400, when the prompt or the answer does not fit the context or a token is not in the vocabulary.
    """
    left = context_length - num_prompt_tokens
    if left < 1:
        raise too_long(num_prompt_tokens, context_length, param=prompt_field)
    max_tokens = _answer_length(request, left, num_prompt_tokens, context_length, default_tokens)
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise bad_request(
            f"`min_tokens` ({min_tokens}) is more than the {max_tokens} tokens that the answer may have.",
            param="min_tokens",
        )
    check_vocabulary(request.stop_token_ids, vocabulary_size, "stop_token_ids")
    check_vocabulary(list(request.logit_bias), vocabulary_size, "logit_bias")
    first = SamplingOptions(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else max(request.top_p, _SMALLEST_TOP_P),
        top_k=min(max(request.top_k or 0, 0), vocabulary_size),
        min_p=request.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        logit_bias=request.logit_bias,
        seed=derived_seed(seed if request.seed is None else request.seed, 0),
        top_logprobs=request.likeliest,
        stop_token_ids=tuple(dict.fromkeys(request.stop_token_ids)),
        ignore_eos=bool(request.ignore_eos),
        grammar=grammar,
        prompt_logprobs=request.likeliest_of_prompt,
    )
    # one of them tells the prompt's log probabilities for all
    others = [
        {"seed": derived_seed(first.seed, choice), "prompt_logprobs": None} for choice in range(request.num_choices)
    ]
    return [first, *(first.model_copy(update=changes) for changes in others[1:])]


def _answer_length(
    request: GenerationFields, left: int, num_prompt_tokens: int, context_length: int, default_tokens: int | None
) -> int:
    field, asked = request.most_tokens
    if asked is None:
        return left if default_tokens is None else min(default_tokens, left)
    if asked > left:
        raise ApiError(
            400,
            f"`{field}` is too large: {asked}. This model's maximum context length is {context_length} tokens and the "
            f"prompt has {num_prompt_tokens}, so at most {left} are left for the answer.",
            param=field,
            code="context_length_exceeded",
        )
    return max(asked, 1)  # a sequence has at least one token; the answer may leave it out


def check_vocabulary(tokens: Sequence[int], vocabulary_size: int, field: str) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        ApiError: 400 with the first such id.
    """
    for token in tokens:
        if token >= vocabulary_size:
            raise bad_request(
                f"`{field}` holds token id {token}, but the model's vocabulary ends at {vocabulary_size - 1}.",
                param=field,
            )
