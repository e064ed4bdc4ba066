"""The messages of a chat, and how a chat template reads them. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from molink_gateway.request_fields import Content, Fields, wrong

Turn = dict[str, Any]


def _tool_calls(value: Any) -> Any:
    """The calls, their arguments as objects where they are: so chat templates want them."""
    if value is None:
        return None
    if not isinstance(value, list):
        raise wrong("must be a list of calls")
    return [_tool_call(call, place) for place, call in enumerate(value)]


def _tool_call(call: Any, place: int) -> Turn:
    match call:
        case {"function": {"name": str(name), **function}}:
            arguments = function.get("arguments")
        case _:
            raise wrong(
                'must hold calls like {"id": …, "type": "function", "function": {"name": …, "arguments": "{…}"}}, '
                f"but call {place} is none"
            )
    if isinstance(arguments, str):
        arguments = _object_or_text(arguments)
    turn: Turn = {"type": "function", "function": {"name": name, "arguments": {} if arguments is None else arguments}}
    if isinstance(call.get("id"), str):
        turn["id"] = call["id"]
    return turn


def _object_or_text(written: str) -> Any:
    """What a model wrote as arguments; it reads its own text again where that is no object."""
    if not written.strip():
        return {}
    try:
        parsed = json.loads(written)
    except (ValueError, RecursionError):
        return written
    return parsed if isinstance(parsed, dict) else written


class ChatMessage(Fields):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_calls: Annotated[list[Turn] | None, BeforeValidator(_tool_calls)] = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    """What a model has thought before it answered; some templates show it again."""

    @model_validator(mode="after")
    def _fits_its_role(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise wrong(f"needs `content`: a string or a list of text parts (role {self.role!r})")
        if self.tool_calls and self.role != "assistant":
            raise wrong(f"has `tool_calls`, which only an assistant's may have (role {self.role!r})")
        return self

    def turn(self) -> Turn:
        """As a chat template reads it: `developer` is the newer name of `system`."""
        turn: Turn = {"role": "system" if self.role == "developer" else self.role, "content": self.content or ""}
        optional = {
            "name": self.name,
            "tool_calls": self.tool_calls or None,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content,
        }
        return turn | {name: value for name, value in optional.items() if value is not None}


def turns_of(messages: Sequence[ChatMessage]) -> list[Turn]:
    """The messages as a chat template reads them."""
    return [message.turn() for message in messages]
