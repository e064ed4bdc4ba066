"""The sampling options of a sequence: made by the gateway, used by the tail."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_TOP_LOGPROBS = 20
MAX_STOP_TOKENS = 64
MAX_LOGIT_BIAS = 1024
MAX_GRAMMAR_CHARACTERS = 256 * 1024

Finite = Annotated[float, Field(allow_inf_nan=False)]


class SamplingOptions(BaseModel):
    """How the next token is chosen. Valid from birth: a value out of range raises `pydantic.ValidationError`.

    The same (model, prompt, options, seed, index) gives the same token on any machine, whatever else is in
    the batch: the random number for a token is a function of `seed` and the token's index alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: Annotated[int, Field(ge=1)]
    """Most tokens to generate; the caller has bounded it by the context length."""
    min_tokens: Annotated[int, Field(ge=0)] = 0
    """End-of-text and stop tokens are not sampled before this many tokens."""
    temperature: Annotated[Finite, Field(ge=0.0, le=2.0)] = 1.0
    """0 is greedy."""
    top_p: Annotated[Finite, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """0 means all."""
    min_p: Annotated[Finite, Field(ge=0.0, le=1.0)] = 0.0
    presence_penalty: Annotated[Finite, Field(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[Finite, Field(ge=-2.0, le=2.0)] = 0.0
    repetition_penalty: Annotated[Finite, Field(gt=0.0, le=2.0)] = 1.0
    """Divides (multiplies, if negative) the logits of every token in prompt and output; 1 is off."""
    logit_bias: Annotated[
        dict[int, Annotated[Finite, Field(ge=-100.0, le=100.0)]], Field(max_length=MAX_LOGIT_BIAS)
    ] = {}
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """None: no log probabilities. n: that of the chosen token, and the n likeliest beside it."""
    stop_token_ids: Annotated[tuple[int, ...], Field(max_length=MAX_STOP_TOKENS)] = ()
    """Beside the model's own end-of-text tokens."""
    ignore_eos: bool = False
    grammar: Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARACTERS)] | None = None
    """What the answer must look like, in llguidance's JSON form; the gateway has checked that it compiles."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """n: tell the log probability of each of the prompt's tokens but the first, and the n likeliest beside it."""

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken without a draw."""
        return self.temperature == 0.0
