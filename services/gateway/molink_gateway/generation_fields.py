"""What requests for chats and for completions have in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from molink_common.sampling import MAX_TOP_LOGPROBS
from molink_gateway.request_fields import Fields, Finite, LogitBias, StopStrings, StopTokenIds

MAX_CHOICES = 16


class StreamOptions(Fields):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationFields(Fields):
    """What both kinds of request have."""

    model: Annotated[str, Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: StopStrings = Field(default_factory=list)
    stop_token_ids: StopTokenIds = Field(default_factory=list)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Finite, Field(ge=0.01, le=2)] | None = None
    """Much smaller ones make logits infinite."""
    logit_bias: LogitBias = Field(default_factory=dict)
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None
    """vLLM's: of the same key's requests the smaller goes first."""
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """vLLM's: tell the log probabilities of the prompt's tokens, with so many of the likeliest beside each."""
    return_token_ids: bool | None = None
    """vLLM's: tell the token ids of prompt and answer beside the text."""

    @property
    def num_choices(self) -> int:
        """Answers for each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_continuous_usage(self) -> bool:
        """Whether each chunk of a stream carries token counts."""
        return self.wants_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    @property
    def most_tokens(self) -> tuple[str, int | None]:
        """The field that bounds the answer, and its value."""
        return "max_tokens", self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens are told at each place; None: no log probabilities."""
        return None

    @property
    def likeliest_of_prompt(self) -> int | None:
        """The same for the prompt's places."""
        return self.prompt_logprobs
