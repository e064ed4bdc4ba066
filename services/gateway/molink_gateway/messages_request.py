"""``POST /v1/messages`` as Anthropic's clients send it, and the chat request that it amounts to. Pure."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BeforeValidator, Field, ValidationError

from molink_gateway.api_errors import bad_request, unsupported
from molink_gateway.request_fields import Fields, Finite, not_supported, wrong
from molink_gateway.requests import complaint, json_object_in

Block = dict[str, Any]
_THOUGHTS = ("thinking", "redacted_thinking")
_MAX_STOPS = 16


def blocks_of(value: Any) -> Any:
    """Content as a list of blocks that are known: text, tool_use and tool_result. Thoughts are left out."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise wrong("must be a string or a list of blocks")
    blocks = [_block(place, given) for place, given in enumerate(value)]
    return [block for block in blocks if block is not None]


def _block(place: int, given: Any) -> Block | None:
    match given:
        case {"type": "text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "tool_use", "id": str(name_of_call), "name": str(name), "input": dict(arguments)}:
            return {"type": "tool_use", "id": name_of_call, "name": name, "input": arguments}
        case {"type": "tool_result", "tool_use_id": str(call), **rest}:
            return {"type": "tool_result", "tool_use_id": call, "text": _result(place, rest.get("content"))}
        case {"type": str(kind)} if kind in _THOUGHTS:
            return None
        case {"type": str(kind)} if kind not in ("text", "tool_use", "tool_result"):
            raise not_supported(f"holds a block of type {kind[:40]!r} at {place}; only text and tools are supported")
        case _:
            raise wrong(f'must hold blocks like {{"type": "text", "text": "…"}}, but block {place} is none')


def _result(place: int, content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise wrong(f"has a tool_result at {place} whose `content` is neither a string nor a list of text blocks")
    return "".join(_text(place, block) for block in content)


def _text(place: int, block: Any) -> str:
    match block:
        case {"type": "text", "text": str(text)}:
            return text
        case _:
            raise not_supported(f"has a tool_result at {place} that holds more than text")


def system_of(value: Any) -> Any:
    """The system prompt as one text."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong("must be a string or a list of text blocks")
    return "".join(_text(place, block) for place, block in enumerate(value))


class Turn(Fields):
    """One of `messages`."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], BeforeValidator(blocks_of)]


class MessageTool(Fields):
    """One of `tools`."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None


class MessageToolChoice(Fields):
    """Which tool is used."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountRequest(Fields):
    """``POST /v1/messages/count_tokens``."""

    model: Annotated[str, Field(min_length=1)]
    messages: Annotated[list[Turn], Field(min_length=1)]
    system: Annotated[str | None, BeforeValidator(system_of)] = None
    tools: list[MessageTool] | None = None
    tool_choice: MessageToolChoice | None = None


class MessagesRequest(CountRequest):
    """``POST /v1/messages``."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=_MAX_STOPS)] | None = None
    stream: bool | None = None
    temperature: Annotated[Finite, Field(ge=0, le=1)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None


R = TypeVar("R", bound=CountRequest)


def parse_messages(body: bytes) -> MessagesRequest:
    """The request in `body`.

    Raises:
        ApiError: 400 with the field that is wrong.
    """
    parsed = json_object_in(body)
    thinking = parsed.get("thinking")
    if isinstance(thinking, dict) and thinking.get("type") not in (None, "disabled"):
        raise unsupported("`thinking` is not supported by this server. Leave it out.", param="thinking")
    return _validated(MessagesRequest, parsed)


def parse_count(body: bytes) -> CountRequest:
    """The request in `body`.

    Raises:
        ApiError: 400 with the field that is wrong.
    """
    return _validated(CountRequest, json_object_in(body))


def _validated(kind: type[R], parsed: dict[str, Any]) -> R:
    try:
        return kind.model_validate(parsed)
    except ValidationError as error:
        raise complaint(error) from error


def chat_body(request: CountRequest) -> bytes:
    """The chat request that asks for the same.

    Raises:
        ApiError: 400, for a tool that is not the client's own.
    """
    messages: list[dict[str, Any]] = [] if not request.system else [{"role": "system", "content": request.system}]
    for turn in request.messages:
        messages += _chat_turns(turn)
    body: dict[str, Any] = {"model": request.model, "messages": messages}
    if isinstance(request, MessagesRequest):
        same = ("max_tokens", "temperature", "top_p", "top_k", "stream")
        body |= {name: value for name in same if (value := getattr(request, name)) is not None}
        body["stop"] = request.stop_sequences or []
    if request.tools:
        body["tools"] = [_tool(place, tool) for place, tool in enumerate(request.tools)]
        body |= _tool_choice(request.tool_choice)
    return orjson.dumps(body)


def _chat_turns(turn: Turn) -> list[dict[str, Any]]:
    """Results of tools are turns of their own, and stand first: they answer the turn before."""
    results = [
        {"role": "tool", "tool_call_id": block["tool_use_id"], "content": block["text"]}
        for block in turn.content
        if block["type"] == "tool_result"
    ]
    text = "".join(block["text"] for block in turn.content if block["type"] == "text")
    calls = [
        {
            "id": block["id"],
            "type": "function",
            "function": {"name": block["name"], "arguments": orjson.dumps(block["input"]).decode()},
        }
        for block in turn.content
        if block["type"] == "tool_use"
    ]
    if calls:
        return [*results, {"role": turn.role, "content": text, "tool_calls": calls}]
    if text or not results:
        return [*results, {"role": turn.role, "content": text}]
    return results


def _tool(place: int, tool: MessageTool) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise unsupported(
            f"`tools[{place}].type` is {tool.type[:40]!r}; only your own tools are supported.", param="tools"
        )
    function = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _tool_choice(choice: MessageToolChoice | None) -> dict[str, Any]:
    if choice is None:
        return {}
    is_parallel = {"parallel_tool_calls": False} if choice.disable_parallel_tool_use else {}
    match choice.type:
        case "any":
            return {"tool_choice": "required", **is_parallel}
        case "tool":
            if not choice.name:
                raise bad_request("`tool_choice` of type 'tool' needs a `name`.", param="tool_choice")
            return {"tool_choice": {"type": "function", "function": {"name": choice.name}}, **is_parallel}
        case "auto" | "none":
            return {"tool_choice": choice.type, **is_parallel}
