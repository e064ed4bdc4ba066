"""Requests: from the bytes of a body to frozen, valid values, or an `ApiError` that names the field.

Fields that are not known are left out, as OpenAI-compatible servers do. Fields that would change the meaning of
the answer and that this version does not carry out are refused, unless their value asks for nothing.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import Field, ValidationError

from molink_common.logs import get_logger
from molink_common.sampling import MAX_TOP_LOGPROBS
from molink_gateway.api_errors import ApiError, bad_request, unsupported
from molink_gateway.generation_fields import GenerationFields
from molink_gateway.request_fields import Prompts
from molink_gateway.tools import ToolChoice, ToolPlan, Tools, plan_of
from molink_gateway.turns import ChatMessage, Turn, turns_of

log = get_logger("gateway.requests")


class ChatRequest(GenerationFields):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: Tools = Field(default_factory=list)
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """vLLM's: variables for the model's chat template."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: str | None = None
    """For chat templates that know it."""
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

    def turns(self) -> list[Turn]:
        """The messages as a chat template reads them."""
        return turns_of(self.messages)

    def tool_plan(self) -> ToolPlan | None:
        """What the model may call; None: nothing.

        Raises:
            ApiError: 400, `tools` and `tool_choice` do not fit each other.
        """
        return plan_of(self.tools, self.tool_choice, is_parallel=self.parallel_tool_calls is not False)


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
    "functions": _NOTHING,
    "function_call": (None, "none", "auto"),
    "audio": _NOTHING,
    "modalities": (None, ["text"], []),
    "web_search_options": (None,),
    "use_beam_search": _NOTHING,
    "chat_template": _NOTHING,
    "suffix": _NOTHING,
}

_INSTEAD = {
    "functions": "Use `tools`, which came in its place.",
    "function_call": "Use `tool_choice`, which came in its place.",
    "suffix": "Text is completed only at its end: put what comes before into `prompt`.",
    "chat_template": "Messages are rendered with the model's own; `chat_template_kwargs` are passed on to it.",
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
    if request.continue_final_message and request.add_generation_prompt:
        raise bad_request(
            "`continue_final_message` and `add_generation_prompt` exclude each other: the answer either goes on with "
            "the last message or begins a new one.",
            param="continue_final_message",
        )
    request.tool_plan()
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
            instead = _INSTEAD.get(field, "Leave it out.")
            raise unsupported(f"`{field}` is not supported by this server. {instead}", param=field)
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
