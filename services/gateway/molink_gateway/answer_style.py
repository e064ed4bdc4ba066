"""How a sequence's tokens become an answer: values that another gateway can go on with. Pure."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from molink_gateway.call_formats import CallFormat


class ExpectedCalls(BaseModel):
    """Calls of tools that the text may hold."""

    model_config = ConfigDict(frozen=True)
    form: CallFormat
    functions: tuple[str, ...]
    is_parallel: bool = True
    has_short_ids: bool = False
    """The model's chat template takes no others."""


class AnswerStyle(BaseModel):
    """What is read out of the tokens, and what is left out."""

    model_config = ConfigDict(frozen=True)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    keeps_stop: bool = False
    """The stop string, or the stop token's text, ends the answer instead of standing behind it."""
    shows_special: bool = False
    """Special tokens are text."""
    calls: ExpectedCalls | None = None
    """None: all is text."""
