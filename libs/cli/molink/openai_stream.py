"""Reads an OpenAI-compatible endpoint's stream, of chat or of completions. No IO here: lines in, text out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from molink_common.errors import MolinkError


class ApiError(MolinkError):
    """The endpoint answered with an error. The message is its own."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        """The machine-readable reason, if it gave one."""


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete, and why it ended."""

    reason: str


def read_event(line: str) -> Delta | Finished | None:
    """What a line of the stream adds; None for a line that adds nothing.

    Raises:
        ApiError: the endpoint reports an error in the middle of the stream, or sends what is no event.
    """
    if not line.startswith("data:"):
        return None
    data = line[len("data:") :].strip()
    if data == "[DONE]" or not data:
        return None
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ApiError(f"the endpoint sent an event that is not JSON: {data[:80]}") from error
    if not isinstance(body, dict):
        return None
    if body.get("error"):
        raise ApiError(error_message(body))
    choices = body.get("choices") or []
    if not choices:
        return None
    choice = choices[0]
    text = (choice.get("delta") or {}).get("content") or choice.get("text")
    if text:
        return Delta(str(text))
    reason = choice.get("finish_reason")
    return Finished(str(reason)) if reason else None


def error_message(body: Any) -> str:
    """The sentence in an error body of OpenAI's form, or the body itself."""
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict) and error.get("message"):
        return str(error["message"])
    return str(error or body)


def response_error(status: int, content: bytes) -> ApiError:
    """The error for an answer whose status is not 200."""
    try:
        body = orjson.loads(content)
    except orjson.JSONDecodeError:
        text = content[:200].decode(errors="replace").strip() or "no explanation"
        return ApiError(f"{text} (HTTP {status})")
    error = body.get("error") if isinstance(body, dict) else None
    return ApiError(f"{error_message(body)} (HTTP {status})", error.get("code") if isinstance(error, dict) else None)
