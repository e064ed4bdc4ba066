"""Single fields of a request, checked with words that say what would be right.

Where OpenAI takes several shapes (a stop string or a list of them) a validator here brings them to one, because
pydantic's own unions answer with one complaint for each member.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from molink_common.sampling import MAX_LOGIT_BIAS, MAX_STOP_TOKENS

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARACTERS = 1024
MAX_PROMPTS = 128


class Fields(BaseModel):
    """Base of everything a client sends: exact types, what is not known is left out."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


def wrong(message: str) -> PydanticCustomError:
    """A value that does not fit; `message` is the whole sentence behind the field's name."""
    return PydanticCustomError("wrong", "{message}", {"message": message})


def not_supported(message: str) -> PydanticCustomError:
    """A value that OpenAI knows and this version does not."""
    return PydanticCustomError("unsupported", "{message}", {"message": message})


def _stop_strings(value: Any) -> Any:
    if value is None:
        return []
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(one, str) for one in strings):
        raise wrong("must be a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise wrong(f"must hold at most {MAX_STOP_STRINGS} strings, but holds {len(strings)}")
    if any(not one for one in strings):
        raise wrong("must not hold an empty string")
    if any(len(one) > MAX_STOP_STRING_CHARACTERS for one in strings):
        raise wrong(f"must hold strings of at most {MAX_STOP_STRING_CHARACTERS} characters")
    return strings


def _token_ids(value: Any) -> Any:
    if value is None:
        return []
    if not isinstance(value, list) or not all(_is_token_id(one) for one in value):
        raise wrong("must be a list of token ids (integers from 0)")
    if len(value) > MAX_STOP_TOKENS:
        raise wrong(f"must hold at most {MAX_STOP_TOKENS} token ids, but holds {len(value)}")
    return value


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _logit_bias(value: Any) -> Any:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong("must be an object that maps token ids to numbers from -100 to 100")
    if len(value) > MAX_LOGIT_BIAS:
        raise wrong(f"must hold at most {MAX_LOGIT_BIAS} tokens, but holds {len(value)}")
    bias: dict[int, float] = {}
    for key, number in value.items():
        if not key.isascii() or not key.isdigit() or len(key) > 12:
            raise wrong(f"has the key {key[:40]!r}, which is not a token id")
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not -100 <= number <= 100:
            raise wrong(f"must map to numbers from -100 to 100, but token {key} maps to {str(number)[:40]!r}")
        bias[int(key)] = float(number)
    return bias


_TEXT_OF_PART = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Which key of a content part of this type holds its text."""


def _content(value: Any) -> Any:
    """Text, or a list of text parts, as one text. None stays None: only an assistant may have it."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong("must be a string or a list of text parts")
    texts: list[str] = []
    for place, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in _TEXT_OF_PART:
            raise not_supported(f"holds a part of type {kind[:40]!r} at {place}; only 'text' is supported")
        text = part.get(_TEXT_OF_PART[kind]) if isinstance(kind, str) else None
        if not isinstance(text, str):
            raise wrong(f'must hold parts like {{"type": "text", "text": "…"}}, but part {place} is none')
        texts.append(text)
    return "".join(texts)


def _prompts(value: Any) -> Any:
    """A text, texts, token ids or lists of token ids, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(_is_token_id(one) for one in value):
            return [value]
        if all(isinstance(one, str) for one in value) or all(_is_list_of_ids(one) for one in value):
            if len(value) > MAX_PROMPTS:
                raise wrong(f"must hold at most {MAX_PROMPTS} prompts, but holds {len(value)}")
            return value
    raise wrong("must be a text, a list of texts, a list of token ids or a list of those, and not empty")


def _is_list_of_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_token_id(one) for one in value)


StopStrings = Annotated[list[str], BeforeValidator(_stop_strings)]
StopTokenIds = Annotated[list[int], BeforeValidator(_token_ids)]
LogitBias = Annotated[dict[int, float], BeforeValidator(_logit_bias)]
Content = Annotated[str | None, BeforeValidator(_content)]
Prompts = Annotated[list[Any], BeforeValidator(_prompts)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
