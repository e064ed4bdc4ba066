"""Calls of tools in OpenAI's shapes. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from molink_gateway.tool_calls import CallDelta

CALLED = "tool_calls"
"""The reason of an answer's end that calls tools."""
_SHORT_CHARACTERS = 9


def call_id(answer: str, choice: int, index: int, *, is_short: bool = False) -> str:
    """The id of a call: the same wherever the answer is told. Short: as Mistral's chat templates want it."""
    digest = hashlib.blake2b(f"{answer}/{choice}/{index}".encode(), digest_size=12).hexdigest()
    return digest[:_SHORT_CHARACTERS] if is_short else f"call_{digest}"


def merged(deltas: Iterable[CallDelta]) -> list[CallDelta]:
    """One for each call."""
    calls: dict[int, CallDelta] = {}
    for delta in deltas:
        known = calls.get(delta.index)
        if known is None:
            calls[delta.index] = delta
        else:
            calls[delta.index] = replace(known, arguments=known.arguments + delta.arguments)
    return list(calls.values())


def call_chunks(deltas: Iterable[CallDelta], answer: str, choice: int, *, is_short: bool) -> list[dict[str, Any]]:
    """What calls grew by, as `delta.tool_calls` of a stream's chunk."""
    chunks: list[dict[str, Any]] = []
    for delta in merged(deltas):
        if delta.name is None:
            chunks.append({"index": delta.index, "function": {"arguments": delta.arguments}})
        else:
            chunks.append({"index": delta.index, **_call(delta, answer, choice, is_short=is_short)})
    return chunks


def whole_calls(deltas: Iterable[CallDelta], answer: str, choice: int, *, is_short: bool) -> list[dict[str, Any]]:
    """An answer's calls, as `message.tool_calls`."""
    return [_call(delta, answer, choice, is_short=is_short) for delta in merged(deltas)]


def _call(delta: CallDelta, answer: str, choice: int, *, is_short: bool) -> dict[str, Any]:
    return {
        "id": call_id(answer, choice, delta.index, is_short=is_short),
        "type": "function",
        "function": {"name": delta.name, "arguments": delta.arguments},
    }
