"""The tools of a chat request: which functions the model may call, and whether it must. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from molink_gateway.api_errors import bad_request
from molink_gateway.request_fields import Fields, not_supported, wrong

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def _name(value: Any) -> Any:
    if not isinstance(value, str) or _NAME.fullmatch(value) is None:
        raise wrong("must be a name of 1 to 64 letters, digits, underscores, dots and dashes")
    return value


def _no_parameters() -> dict[str, Any]:
    return {"type": "object", "properties": {}}


def _parameters(value: Any) -> Any:
    if value is None:
        return _no_parameters()
    if not isinstance(value, dict):
        raise wrong('must be a JSON schema of an object, like {"type": "object", "properties": {…}}')
    if value.get("type", "object") != "object":
        raise wrong(f"must be a JSON schema with `type` 'object', but it is {str(value['type'])[:40]!r}")
    return value


def _tool_type(value: Any) -> Any:
    if value != "function":
        raise not_supported(f"must be 'function', but it is {str(value)[:40]!r}; other tools are not supported")
    return value


class Function(Fields):
    """A function that the model may call."""

    name: Annotated[str, BeforeValidator(_name)]
    description: str | None = None
    parameters: Annotated[dict[str, Any], BeforeValidator(_parameters)] = Field(default_factory=_no_parameters)
    strict: bool | None = None


class Tool(Fields):
    """One of `tools`."""

    type: Annotated[str, BeforeValidator(_tool_type)]
    function: Function


def _tools(value: Any) -> Any:
    if value is None:
        return []
    if not isinstance(value, list):
        raise wrong("must be a list of tools")
    if len(value) > MAX_TOOLS:
        raise wrong(f"must hold at most {MAX_TOOLS} tools, but holds {len(value)}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Choosing:
    """`tool_choice`, whatever its shape."""

    mode: Literal["none", "auto", "required"]
    names: tuple[str, ...] | None = None
    """None: all."""
    is_one: bool = False
    """A function was named, which is then called once."""


_SHAPES = (
    'must be \'none\', \'auto\', \'required\', {"type": "function", "function": {"name": …}} or '
    '{"type": "allowed_tools", "allowed_tools": {"mode": …, "tools": […]}}'
)


def _tool_choice(value: Any) -> Any:
    match value:
        case None | Choosing():
            return value
        case "none" | "auto" | "required":
            return Choosing(mode=value)
        case "any":  # what some clients say for it
            return Choosing(mode="required")
        case {"type": "function", "function": {"name": str(name)}}:
            return Choosing(mode="required", names=(name,), is_one=True)
        case {"type": "allowed_tools", "allowed_tools": {"mode": ("auto" | "required") as mode, "tools": list(tools)}}:
            return Choosing(mode=mode, names=tuple(_name_in(tool) for tool in tools))
        case _:
            raise wrong(_SHAPES)


def _name_in(tool: Any) -> str:
    match tool:
        case {"type": "function", "function": {"name": str(name)}}:
            return name
        case _:
            raise wrong(_SHAPES)


Tools = Annotated[list[Tool], BeforeValidator(_tools)]
ToolChoice = Annotated[Any, BeforeValidator(_tool_choice)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolPlan:
    """What the model may call in its answer."""

    functions: tuple[Function, ...]
    places: tuple[int, ...]
    """Of each function, where it stands in `tools`."""
    is_required: bool
    is_parallel: bool
    """Whether there may be several calls."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the functions."""
        return tuple(function.name for function in self.functions)


def plan_of(tools: Sequence[Tool], choice: Choosing | None, *, is_parallel: bool) -> ToolPlan | None:
    """What may be called; None: nothing.

    Raises:
        ApiError: 400, two functions have one name, or what is chosen is not there.
    """
    names = [tool.function.name for tool in tools]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise bad_request(
                f"`tools[{place}].function.name` is {name!r}, which an earlier tool has. Names must differ.",
                param=f"tools[{place}].function.name",
            )
    if choice is None:
        choice = Choosing(mode="auto")
    if not tools and (choice.mode == "required" or choice.names is not None):
        raise bad_request("`tool_choice` asks for a call, but `tools` holds none.", param="tool_choice")
    for name in choice.names or ():
        if name not in names:
            known = ", ".join(repr(one) for one in names)
            raise bad_request(
                f"`tool_choice` names {name[:64]!r}, which is not one of `tools`: {known}.", param="tool_choice"
            )
    if choice.mode == "none" or not tools or choice.names == ():
        return None
    places = tuple(place for place, name in enumerate(names) if choice.names is None or name in choice.names)
    return ToolPlan(
        functions=tuple(tools[place].function for place in places),
        places=places,
        is_required=choice.mode == "required",
        is_parallel=is_parallel and not choice.is_one,
    )
