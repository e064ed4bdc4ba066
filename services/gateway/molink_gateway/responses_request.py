"""``POST /v1/responses``: what a client asks, and the chat request that it amounts to. Pure.

Sampling, tools and output formats are checked once, where chat requests are; this module puts them into a chat's
fields and puts a complaint about those back into the words of the client.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import orjson
from pydantic import BeforeValidator, Field, ValidationError

from molink_gateway.api_errors import ApiError, bad_request, unsupported
from molink_gateway.request_fields import Fields, Finite, wrong
from molink_gateway.requests import complaint, json_object_in
from molink_gateway.responses_items import Item, chat_messages, items_of

TOLD_LOGPROBS = "message.output_text.logprobs"
_MAX_METADATA = 16
_MAX_KEY_CHARACTERS, _MAX_VALUE_CHARACTERS = 64, 512

#: Fields of a chat request beyond OpenAI's Responses that are taken as they are.
PASSED_ON = (
    "stop",
    "stop_token_ids",
    "seed",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "min_tokens",
    "ignore_eos",
    "priority",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "chat_template_kwargs",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)

#: Fields that would change the answer, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "background": (None, False),
    "conversation": (None,),
    "prompt": (None,),
    "truncation": (None, "disabled"),
}


def _metadata(value: Any) -> Any:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise wrong("must be an object that maps strings to strings")
    if len(value) > _MAX_METADATA:
        raise wrong(f"must hold at most {_MAX_METADATA} pairs, but holds {len(value)}")
    if any(len(key) > _MAX_KEY_CHARACTERS or len(one) > _MAX_VALUE_CHARACTERS for key, one in value.items()):
        raise wrong(f"must have keys of at most {_MAX_KEY_CHARACTERS} characters and values of {_MAX_VALUE_CHARACTERS}")
    return value


Items = Annotated[list[Item], BeforeValidator(items_of)]
Metadata = Annotated[dict[str, str], BeforeValidator(_metadata)]
ResponseId = Annotated[str, Field(min_length=1, max_length=128)]


class TextConfig(Fields):
    """The form of the text that is wanted."""

    format: dict[str, Any] | None = None


class Reasoning(Fields):
    """How hard the model is to think, for chat templates that know it."""

    effort: str | None = None


class ResponsesRequest(Fields):
    """``POST /v1/responses``."""

    model: Annotated[str, Field(min_length=1)]
    input: Items
    instructions: str | None = None
    previous_response_id: ResponseId | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    text: TextConfig | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include: list[str] | None = None
    reasoning: Reasoning | None = None
    metadata: Metadata = Field(default_factory=dict)
    store: bool | None = None
    stream: bool | None = None
    user: str | None = None

    @property
    def is_kept(self) -> bool:
        """Whether the response can be asked for later."""
        return self.store is not False

    @property
    def tells_logprobs(self) -> bool:
        """Whether log probabilities are wanted."""
        return TOLD_LOGPROBS in (self.include or ()) or self.top_logprobs is not None

    @property
    def wanted_format(self) -> dict[str, Any]:
        """The form of the text, as the answer repeats it."""
        given = None if self.text is None else self.text.format
        return {"type": "text"} if given is None else given

    @property
    def told_tools(self) -> list[dict[str, Any]]:
        """The tools as the answer repeats them."""
        named = ("type", "name", "description", "parameters", "strict")
        return [{name: tool.get(name) for name in named} for tool in self.tools or ()]


def parse_responses(body: bytes) -> tuple[ResponsesRequest, dict[str, Any]]:
    """The request in `body`, and those of its fields that a chat request takes as they are.

    Raises:
        ApiError: 400 with the field that is wrong.
    """
    parsed = json_object_in(body)
    for field, harmless in _UNSUPPORTED.items():
        if field in parsed and parsed[field] not in harmless:
            raise unsupported(f"`{field}` is not supported by this server. Leave it out.", param=field)
    try:
        request = ResponsesRequest.model_validate(parsed)
    except ValidationError as error:
        raise complaint(error) from error
    return request, {field: parsed[field] for field in PASSED_ON if field in parsed}


def chat_body(request: ResponsesRequest, passed_on: dict[str, Any], context: list[Item]) -> bytes:
    """The chat request that asks for the same, for a conversation of `context`.

    Raises:
        ApiError: 400, for tools or a form of text that no chat request can ask for.
    """
    messages = chat_messages(context)
    if request.instructions:
        messages.insert(0, {"role": "developer", "content": request.instructions})
    if not messages:
        raise bad_request("`input` is empty; it must hold a message.", param="input")
    body: dict[str, Any] = {**passed_on, "model": request.model, "messages": messages}
    same = ("temperature", "top_p", "user", "stream")
    body |= {name: value for name in same if (value := getattr(request, name)) is not None}
    if request.max_output_tokens is not None:
        body["max_completion_tokens"] = request.max_output_tokens
    if request.tells_logprobs:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    if request.reasoning is not None and request.reasoning.effort is not None:
        body["reasoning_effort"] = request.reasoning.effort
    if request.wanted_format != {"type": "text"}:
        body["response_format"] = _response_format(request.wanted_format)
    if request.tools:
        body |= _tools(request)
    elif request.tool_choice not in (None, "none", "auto"):
        raise bad_request("`tool_choice` needs `tools`.", param="tool_choice")
    return orjson.dumps(body)


def _response_format(given: dict[str, Any]) -> dict[str, Any]:
    if given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}


def _tools(request: ResponsesRequest) -> dict[str, Any]:
    tools = [_tool(place, tool) for place, tool in enumerate(request.tools or ())]
    body: dict[str, Any] = {"tools": tools}
    if request.parallel_tool_calls is not None:
        body["parallel_tool_calls"] = request.parallel_tool_calls
    choice = request.tool_choice
    if isinstance(choice, dict):
        if choice.get("type") == "allowed_tools":
            body["tools"], body["tool_choice"] = _allowed(choice, tools)
        elif choice.get("type") == "function" and isinstance(choice.get("name"), str):
            body["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}}
        else:
            raise unsupported('`tool_choice` must be a word or {"type": "function", "name": "…"}.', param="tool_choice")
    elif choice is not None:
        body["tool_choice"] = choice
    return body


def _tool(place: int, tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        kind = str(tool.get("type"))[:40]
        raise unsupported(
            f"`tools[{place}].type` is {kind!r}; only 'function' is supported.", param=f"tools[{place}].type"
        )
    named = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in named if tool.get(name) is not None}}


def _allowed(choice: dict[str, Any], tools: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    allowed, mode = choice.get("tools"), choice.get("mode", "auto")
    if not isinstance(allowed, list) or mode not in ("auto", "required"):
        raise bad_request(
            "`tool_choice` of type 'allowed_tools' needs `tools` and a `mode`: 'auto' or 'required'.",
            param="tool_choice",
        )
    names = {one.get("name") for one in allowed if isinstance(one, dict)}
    kept = [tool for tool in tools if tool["function"].get("name") in names]
    if not kept:
        raise bad_request("`tool_choice` allows none of `tools`.", param="tool_choice")
    return kept, mode


_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
}
_CHAT_NAME = re.compile("|".join(re.escape(name) for name in _NAMES))
_FUNCTION = re.compile(r"(tools\[\d+\])\.function")


def retold(error: ApiError) -> ApiError:
    """A complaint about the chat request in the names of this one."""
    if error.param is None:
        return error

    def renamed(text: str) -> str:
        return _FUNCTION.sub(r"\1", _CHAT_NAME.sub(lambda found: _NAMES[found[0]], text))

    def quoted(found: re.Match[str]) -> str:
        return renamed(found[0])

    message = re.sub(r"`[^`]{1,200}`", quoted, error.message)
    return ApiError(
        error.status, message, param=renamed(error.param), code=error.code, retry_after_s=error.retry_after_s
    )
