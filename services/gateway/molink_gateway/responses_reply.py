"""Answers to ``/v1/responses``, told by what a chat answers. Pure.

The chat's reply knows about text, tools and log probabilities; `ResponseTeller` reads its chunks and tells the same as
items and events of Responses. Whoever wants the whole answer only feeds it one chunk and drops the events.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from molink_gateway.api_errors import ApiError
from molink_gateway.choice import Delta
from molink_gateway.replies import Answer, Chunk, Reply
from molink_gateway.responses_items import Item
from molink_gateway.responses_request import ResponsesRequest

_FIRST_OUTPUT = 0x8000
"""Items of a response count from here, for ids: those of its input count from 0."""
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseHead:
    """What is known of a response before its first token."""

    stem: str
    """Of the ids: the response's is ``resp_<stem>``."""
    created_s: int
    request: ResponsesRequest

    @property
    def id(self) -> str:
        """Of the response."""
        return "resp_" + self.stem

    def response(self, status: str, output: list[Item]) -> dict[str, Any]:
        """The response without its end."""
        request = self.request
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_s,
            "status": status,
            "background": False,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": None,
            "metadata": request.metadata,
            "model": request.model,
            "output": output,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": request.reasoning and request.reasoning.effort, "summary": None},
            "service_tier": "default",
            "store": request.is_kept,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": request.wanted_format},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.told_tools,
            "top_logprobs": request.top_logprobs or 0,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": request.user,
        }


class ResponseTeller:
    """Grows a response from a chat's chunks: `begin`, `take` each chunk, then `end` or `fail`."""

    def __init__(self, head: ResponseHead, now_s: Callable[[], int]) -> None:
        self._head = head
        self._now_s = now_s
        self._output: list[Item] = []
        self._logprobs: list[dict[str, Any]] = []
        self._call_place: int | None = None
        self._is_open = False
        self._finish: str | None = None
        self._num_events = 0
        self.response: dict[str, Any] = head.response("in_progress", [])
        """Whole once it has ended."""

    def begin(self) -> list[Chunk]:
        """Before the first token."""
        return [
            self._event("response.created", response=self.response),
            self._event("response.in_progress", response=self.response),
        ]

    def take(self, chunk: Chunk) -> list[Chunk]:
        """A chunk of a chat, or a whole answer in the place of a chunk's delta."""
        events: list[Chunk] = []
        for choice in chunk["choices"]:
            delta = choice.get("delta") or choice.get("message") or {}
            logprobs = (choice.get("logprobs") or {}).get("content") or []
            if delta.get("content") or logprobs:
                events += self._text(delta.get("content") or "", logprobs)
            for place, call in enumerate(delta.get("tool_calls") or ()):
                events += self._call(call.get("index", place), call)
            self._finish = choice.get("finish_reason") or self._finish
        return events

    def end(self, usage: Chunk) -> list[Chunk]:
        """After the last token."""
        reason = _INCOMPLETE.get(self._finish or "")
        status = "completed" if reason is None else "incomplete"
        events = [] if self._output else self._text("", [])  # an answer of nothing is an empty message
        events += self._close(status)
        self.response = self._head.response(status, self._output)
        self.response["completed_at"] = self._now_s()
        self.response["usage"] = _usage(usage)
        if reason is not None:
            self.response["incomplete_details"] = {"reason": reason}
        return [*events, self._event(f"response.{status}", response=self.response)]

    def fail(self, error: ApiError) -> list[Chunk]:
        """The answer broke off."""
        if self._output and self._is_open:
            self._output[-1]["status"] = "incomplete"
        self.response = self._head.response("failed", self._output)
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self.response["error"] = {"code": code, "message": error.message}
        return [self._event("response.failed", response=self.response)]

    def _text(self, text: str, logprobs: list[dict[str, Any]]) -> list[Chunk]:
        events: list[Chunk] = []
        if not self._is_open or self._output[-1]["type"] != "message":
            events += self._close("completed")
            item = {"type": "message", "role": "assistant", "status": "in_progress", "content": []}
            events += self._open("msg_", item)
            self._logprobs = []
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": self._logprobs}
            events.append(self._part_event("response.content_part.added", part={**part, "logprobs": []}))
            self._output[-1]["content"].append(part)
        self._output[-1]["content"][0]["text"] += text
        self._logprobs += logprobs
        if text or logprobs:
            events.append(self._part_event("response.output_text.delta", delta=text, logprobs=logprobs))
        return events

    def _call(self, place: int, call: dict[str, Any]) -> list[Chunk]:
        events: list[Chunk] = []
        function = call.get("function") or {}
        if not self._is_open or self._call_place != place:
            events += self._close("completed")
            name, call_id = function.get("name") or "", call.get("id") or f"call_{self._head.stem}{place:04x}"
            item = {
                "type": "function_call",
                "status": "in_progress",
                "call_id": call_id,
                "name": name,
                "arguments": "",
            }
            events += self._open("fc_", item)
            self._call_place = place
        arguments = function.get("arguments") or ""
        if arguments:
            self._output[-1]["arguments"] += arguments
            events.append(self._item_event("response.function_call_arguments.delta", delta=arguments))
        return events

    def _open(self, prefix: str, item: Item) -> list[Chunk]:
        identified = {"id": f"{prefix}{self._head.stem}{_FIRST_OUTPUT + len(self._output):04x}", **item}
        self._output.append(identified)
        self._is_open = True
        shown = {**identified, "content": []} if "content" in identified else dict(identified)
        return [self._event("response.output_item.added", output_index=len(self._output) - 1, item=shown)]

    def _close(self, status: str) -> list[Chunk]:
        """End the item that is open, if one is."""
        if not self._is_open:
            return []
        self._is_open = False
        self._call_place = None
        item = self._output[-1]
        item["status"] = status
        events: list[Chunk] = []
        if item["type"] == "message":
            part = item["content"][0]
            done = self._part_event("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
            events += [done, self._part_event("response.content_part.done", part=part)]
        else:
            arguments, name = item["arguments"], item["name"]
            events.append(self._item_event("response.function_call_arguments.done", name=name, arguments=arguments))
        return [*events, self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)]

    def _part_event(self, kind: str, **facts: Any) -> Chunk:
        return self._item_event(kind, content_index=0, **facts)

    def _item_event(self, kind: str, **facts: Any) -> Chunk:
        return self._event(kind, item_id=self._output[-1]["id"], output_index=len(self._output) - 1, **facts)

    def _event(self, kind: str, **facts: Any) -> Chunk:
        number = self._num_events
        self._num_events += 1
        return {"type": kind, "sequence_number": number, **facts}


class ResponseScript:
    """A stream of `ResponseTeller`'s events; see `Script`."""

    def __init__(self, teller: ResponseTeller, chat: Reply, usage: Callable[[], Chunk]) -> None:
        self._teller = teller
        self._chat = chat
        self._usage = usage

    def begin(self) -> bytes:
        """See `Script.begin`."""
        return _written(self._teller.begin())

    def grow(self, choice: int, delta: Delta) -> bytes:
        """See `Script.grow`."""
        return b"".join(_written(self._teller.take(chunk)) for chunk in self._chat.chunks(choice, delta))

    def end(self) -> bytes:
        """See `Script.end`."""
        return _written(self._teller.end(self._usage()))

    def fail(self, error: ApiError, *, runs_on: bool) -> bytes:
        """See `Script.fail`."""
        return _written(self._teller.fail(error))


class ResponseReply:
    """The whole answer, as the chat's `Reply` is wrapped."""

    def __init__(self, teller: ResponseTeller, chat: Reply) -> None:
        self._teller = teller
        self._chat = chat

    def opening(self, choice: int) -> list[Chunk]:
        """Nothing: a stream is told by `ResponseScript`."""
        return []

    def chunks(self, choice: int, delta: Delta) -> list[Chunk]:
        """Nothing, likewise."""
        return []

    def last(self) -> Chunk:
        """Nothing, likewise."""
        return {}

    def whole(self, answers: Sequence[Answer], usage: Chunk) -> Chunk:
        """The response."""
        self._teller.take(self._chat.whole(answers, usage))
        self._teller.end(usage)
        return self._teller.response


def _usage(usage: Chunk) -> Chunk:
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }


def _written(events: list[Chunk]) -> bytes:
    return b"".join(
        b"event: " + event["type"].encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n" for event in events
    )
