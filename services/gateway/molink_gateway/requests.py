"""Requests: from the bytes of a body to frozen, valid values, or an `ApiError` that names the field.

Fields that are not known are left out, as OpenAI-compatible servers do. Fields that would change the meaning of
the answer and that this version does not carry out are refused, unless their value asks for nothing.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import Field, ValidationError, model_validator

from molink_common.logs import get_logger
from molink_common.sampling import MAX_TOP_LOGPROBS
from molink_gateway.api_errors import ApiError, bad_request, unsupported
from molink_gateway.request_fields import (
    Content,
    Fields,
    Finite,
    LogitBias,
    Prompts,
    StopStrings,
    StopTokenIds,
    not_supported,
    wrong,
)

log = get_logger("gateway.requests")

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
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Finite, Field(gt=0, le=2)] | None = None
    logit_bias: LogitBias = Field(default_factory=dict)
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    user: str | None = None
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


class ChatMessage(Fields):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_calls: Any = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> ChatMessage:
        if self.tool_calls:
            raise not_supported("carries tool_calls, which are not supported yet")
        if self.content is None and self.role != "assistant":
            raise wrong(f"needs `content`: a string or a list of text parts (role {self.role!r})")
        return self


class ChatRequest(GenerationFields):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @property
    def most_tokens(self) -> tuple[str, int | None]:
        """See `GenerationFields.most_tokens`; the newer name wins."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """See `GenerationFields.likeliest`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def turns(self) -> list[dict[str, Any]]:
        """The messages as a chat template reads them: `developer` is the newer name of `system`."""
        turns: list[dict[str, Any]] = []
        for message in self.messages:
            role = "system" if message.role == "developer" else message.role
            turn: dict[str, Any] = {"role": role, "content": message.content or ""}
            if message.name is not None:
                turn["name"] = message.name
            if message.tool_call_id is not None:
                turn["tool_call_id"] = message.tool_call_id
            turns.append(turn)
        return turns


class CompletionRequest(GenerationFields):
    """``POST /v1/completions``."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """0, with `echo`: the prompt alone."""
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: int | None = None

    @property
    def likeliest(self) -> int | None:
        """See `GenerationFields.likeliest`."""
        return self.logprobs

    @property
    def likeliest_of_prompt(self) -> int | None:
        """See `GenerationFields.likeliest_of_prompt`; with `echo` the log probabilities are of prompt and answer."""
        echoed = self.logprobs if self.echo else None
        return max((one for one in (echoed, self.prompt_logprobs) if one is not None), default=None)


_NOTHING: tuple[Any, ...] = (None, False, [], {}, "")
#: Fields that would change the answer, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": _NOTHING,
    "tool_choice": (None, "none", "auto"),
    "functions": _NOTHING,
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "audio": _NOTHING,
    "modalities": (None, ["text"], []),
    "prediction": _NOTHING,
    "web_search_options": (None,),
    "use_beam_search": _NOTHING,
    "structured_outputs": _NOTHING,
    "guided_json": _NOTHING,
    "guided_regex": _NOTHING,
    "guided_choice": _NOTHING,
    "guided_grammar": _NOTHING,
    "chat_template": _NOTHING,
    "chat_template_kwargs": _NOTHING,
    "continue_final_message": _NOTHING,
    "add_generation_prompt": (None, True),
    "include_stop_str_in_output": _NOTHING,
    "skip_special_tokens": (None, True),
    "suffix": _NOTHING,
}

R = TypeVar("R", bound=GenerationFields)


def parse_chat(body: bytes) -> ChatRequest:
    """The chat request in `body`.

    Raises:
        ApiError: 400 with the field that is wrong.
    """
    request = _validated(ChatRequest, _object_in(body))
    if request.top_logprobs and not request.logprobs:
        raise bad_request("`top_logprobs` needs `logprobs` to be true.", param="top_logprobs")
    return _checked(request)


def parse_completion(body: bytes) -> CompletionRequest:
    """The completion request in `body`.

    Raises:
        ApiError: 400 with the field that is wrong.
    """
    request = _validated(CompletionRequest, _object_in(body))
    if request.best_of is not None and request.best_of != request.num_choices:
        raise unsupported("`best_of` is not supported unless it equals `n`. Leave it out.", param="best_of")
    if request.max_tokens == 0 and not request.echo:
        raise bad_request(
            "`max_tokens` must be at least 1 unless `echo` is true: there would be nothing to answer.",
            param="max_tokens",
        )
    return _checked(request)


def _checked(request: R) -> R:
    field, most = request.most_tokens
    if most is not None and (request.min_tokens or 0) > most:
        raise bad_request(
            f"`min_tokens` ({request.min_tokens}) must not be larger than `{field}` ({most}).", param="min_tokens"
        )
    if request.stream_options is not None and not request.stream:
        raise bad_request("`stream_options` needs `stream` to be true.", param="stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise bad_request("`prompt_logprobs` is not available when `stream` is true.", param="prompt_logprobs")
    return request


def _object_in(body: bytes) -> dict[str, Any]:
    parsed = json_object_in(body)
    for field, harmless in _UNSUPPORTED.items():
        if field in parsed and parsed[field] not in harmless:
            raise unsupported(f"`{field}` is not supported by this server yet. Leave it out.", param=field)
    return parsed


def json_object_in(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`.

    Raises:
        ApiError: 400, there is none.
    """
    if not body.strip():
        raise bad_request("The request body is empty; it must be a JSON object.", code="invalid_json")
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise bad_request(
            f"The request body is not valid JSON: {error}. It must be a JSON object in UTF-8; NaN, Infinity and "
            "lone surrogates are not JSON.",
            code="invalid_json",
        ) from error
    if not isinstance(parsed, dict):
        raise bad_request("The request body must be a JSON object.", code="invalid_json")
    return parsed


def _validated(kind: type[R], body: dict[str, Any]) -> R:
    unknown = body.keys() - kind.model_fields.keys()
    if unknown:
        log.debug("fields ignored", fields=sorted(unknown)[:20])
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise complaint(error) from error


def complaint(error: ValidationError) -> ApiError:
    """The first complaint, in one sentence that names the field as a client would write it."""
    first = error.errors(include_url=False)[0]
    param = ""
    for part in first["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else str(part)
    kind, text = first["type"], first["msg"]
    if kind == "missing":
        return bad_request(f"`{param}` is required.", param=param, code="missing_required_parameter")
    if kind in ("wrong", "unsupported"):
        return bad_request(f"`{param}` {text}.", param=param, code="unsupported" if kind == "unsupported" else None)
    if kind == "too_short" and param == "messages":
        return bad_request("`messages` must hold at least one message.", param=param)
    rule = text.replace("Input should be", "must be").replace("Value should", "must")
    return bad_request(f"`{param}` {rule}, but it is {_shown(first.get('input'))}.", param=param)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
