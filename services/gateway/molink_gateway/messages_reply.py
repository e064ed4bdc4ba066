"""Answers to ``/v1/messages`` in Anthropic's shape, told by what a chat answers. Pure.

As `responses_reply`: the chat's reply knows about text and tools, `MessageTeller` reads its chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import orjson

from molink_gateway.api_errors import ApiError
from molink_gateway.choice import Delta
from molink_gateway.messages_errors import error_body
from molink_gateway.replies import Answer, Chunk, Reply

_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


class MessageTeller:
    """Grows a message from a chat's chunks: `begin`, `take` each chunk, then `end`.

    `met` tells which stop sequence has ended the answer, if one has.
    """

    def __init__(self, name: str, model: str, met: Callable[[], str | None]) -> None:
        self._met = met
        self._call_place: int | None = None
        self._is_open = False
        self._arguments = ""
        self._finish: str | None = None
        self.message: dict[str, Any] = {
            "id": name,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }
        """Whole once it has ended."""

    def begin(self, usage: Chunk) -> list[Chunk]:
        """Before the first token."""
        message = {**self.message, "content": [], "usage": usage_of(usage)}
        return [{"type": "message_start", "message": message}]

    def take(self, chunk: Chunk) -> list[Chunk]:
        """A chunk of a chat, or a whole answer in the place of a chunk's delta."""
        events: list[Chunk] = []
        for choice in chunk["choices"]:
            delta = choice.get("delta") or choice.get("message") or {}
            if delta.get("content"):
                events += self._text(delta["content"])
            for place, call in enumerate(delta.get("tool_calls") or ()):
                events += self._call(call.get("index", place), call)
            self._finish = choice.get("finish_reason") or self._finish
        return events

    def end(self, usage: Chunk) -> list[Chunk]:
        """After the last token."""
        events = self._close()
        met = self._met() if self._finish == "stop" else None
        reason = _REASONS.get(self._finish or "", "end_turn" if met is None else "stop_sequence")
        ended = {"stop_reason": reason, "stop_sequence": met}
        self.message |= {**ended, "usage": usage_of(usage)}
        return [
            *events,
            {"type": "message_delta", "delta": ended, "usage": usage_of(usage)},
            {"type": "message_stop"},
        ]

    def _text(self, text: str) -> list[Chunk]:
        events: list[Chunk] = []
        if not self._is_open or self._content[-1]["type"] != "text":
            events += [*self._close(), *self._open({"type": "text", "text": ""})]
        self._content[-1]["text"] += text
        return [*events, self._grown({"type": "text_delta", "text": text})]

    def _call(self, place: int, call: dict[str, Any]) -> list[Chunk]:
        events: list[Chunk] = []
        function = call.get("function") or {}
        if not self._is_open or self._call_place != place:
            identity = {"id": call.get("id") or "", "name": function.get("name") or ""}
            events += [*self._close(), *self._open({"type": "tool_use", **identity, "input": {}})]
            self._call_place = place
        arguments = function.get("arguments") or ""
        if not arguments:
            return events
        self._arguments += arguments
        return [*events, self._grown({"type": "input_json_delta", "partial_json": arguments})]

    @property
    def _content(self) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = self.message["content"]
        return content

    def _open(self, block: dict[str, Any]) -> list[Chunk]:
        self._content.append(block)
        self._is_open = True
        self._arguments = ""
        return [{"type": "content_block_start", "index": len(self._content) - 1, "content_block": dict(block)}]

    def _grown(self, delta: Chunk) -> Chunk:
        return {"type": "content_block_delta", "index": len(self._content) - 1, "delta": delta}

    def _close(self) -> list[Chunk]:
        if not self._is_open:
            return []
        self._is_open = False
        self._call_place = None
        if self._content[-1]["type"] == "tool_use":
            self._content[-1]["input"] = _object_in(self._arguments)
        return [{"type": "content_block_stop", "index": len(self._content) - 1}]


class MessageScript:
    """A stream of `MessageTeller`'s events; see `Script`."""

    def __init__(self, teller: MessageTeller, chat: Reply, usage: Callable[[], Chunk]) -> None:
        self._teller = teller
        self._chat = chat
        self._usage = usage

    def begin(self) -> bytes:
        """See `Script.begin`."""
        return _written(self._teller.begin(self._usage()))

    def grow(self, choice: int, delta: Delta) -> bytes:
        """See `Script.grow`."""
        return b"".join(_written(self._teller.take(chunk)) for chunk in self._chat.chunks(choice, delta))

    def end(self) -> bytes:
        """See `Script.end`."""
        return _written(self._teller.end(self._usage()))

    def fail(self, error: ApiError, *, runs_on: bool) -> bytes:
        """See `Script.fail`."""
        return _written([error_body(error.status, error.message)])


class MessageReply:
    """The whole answer, as the chat's `Reply` is wrapped."""

    def __init__(self, teller: MessageTeller, chat: Reply) -> None:
        self._teller = teller
        self._chat = chat

    def opening(self, choice: int) -> list[Chunk]:
        """Nothing: a stream is told by `MessageScript`."""
        return []

    def chunks(self, choice: int, delta: Delta) -> list[Chunk]:
        """Nothing, likewise."""
        return []

    def last(self) -> Chunk:
        """Nothing, likewise."""
        return {}

    def whole(self, answers: Sequence[Answer], usage: Chunk) -> Chunk:
        """The message."""
        self._teller.take(self._chat.whole(answers, usage))
        self._teller.end(usage)
        return self._teller.message


def usage_of(usage: Chunk) -> Chunk:
    """Token counts; of the prompt's tokens those that were not in the cache count as input."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "output_tokens": usage["completion_tokens"],
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
    }


def _object_in(arguments: str) -> Any:
    """What a model has called a tool with; nothing, where it was cut off."""
    try:
        parsed = orjson.loads(arguments or "{}")
    except orjson.JSONDecodeError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _written(events: list[Chunk]) -> bytes:
    return b"".join(
        b"event: " + event["type"].encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n" for event in events
    )
