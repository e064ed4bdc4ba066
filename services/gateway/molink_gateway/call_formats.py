"""How models write their calls of tools, and which way a model writes. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class CallFormat(StrEnum):
    """By name, as the state of a stream keeps it."""

    HERMES = "hermes"
    """``<tool_call>{"name": …, "arguments": {…}}</tool_call>``: Hermes, Qwen, and every model that is told so."""
    LLAMA = "llama"
    """The whole answer is ``{"name": …, "parameters": {…}}``, perhaps behind ``<|python_tag|>``; more behind ``;``."""
    MISTRAL = "mistral"
    """``[TOOL_CALLS]`` and a list of calls, or a function's name and its arguments."""
    BARE = "bare"
    """A list of calls and nothing else: what a grammar forces when a call is required."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Markers:
    """What stands around calls."""

    opens: str | None
    """Begins calls anywhere in the text. None: only the beginning of the answer does."""
    closes: str | None = None
    """Stands behind each call."""
    tokens: tuple[str, ...] = ()
    """What may be special tokens in a model's vocabulary, which are text here all the same."""
    begins_answer: bool = False
    """The answer may begin with a call, without a marker."""
    is_list: bool = False
    """Calls may stand in brackets."""
    has_names_outside: bool = False
    """A function's name may stand before its arguments instead of beside them."""


MARKERS = {
    CallFormat.HERMES: Markers(opens="<tool_call>", closes="</tool_call>", tokens=("<tool_call>", "</tool_call>")),
    CallFormat.LLAMA: Markers(opens="<|python_tag|>", begins_answer=True, is_list=True, tokens=("<|python_tag|>",)),
    CallFormat.MISTRAL: Markers(
        opens="[TOOL_CALLS]",
        is_list=True,
        has_names_outside=True,
        tokens=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    ),
    CallFormat.BARE: Markers(opens=None, begins_answer=True, is_list=True),
}


def format_of(template: str) -> CallFormat | None:
    """How a model with this chat template writes calls; None: the template has no place for tools, or another way."""
    if "tools" not in template:
        return None
    if "[TOOL_CALLS]" in template:
        return CallFormat.MISTRAL
    if "<tool_call>" in template:  # Qwen3-Coder writes its calls in tags of its own between these
        return None if "<function=" in template else CallFormat.HERMES
    if "<|python_tag|>" in template or "<|start_header_id|>" in template:
        return CallFormat.LLAMA
    return None
