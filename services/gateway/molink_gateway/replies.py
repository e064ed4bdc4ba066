"""Answers in OpenAI's shapes, as plain dictionaries for orjson. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from molink_common.messages import FinishReason
from molink_gateway.call_chunks import CALLED, call_chunks, whole_calls
from molink_gateway.choice import Delta, LogprobEntry
from molink_gateway.prompt_logprobs import by_text
from molink_gateway.tokenizer import TokenText
from molink_gateway.tool_calls import CallDelta

Chunk = dict[str, Any]

DONE = b"data: [DONE]\n\n"
WAITING = b": waiting\n"
"""A comment: keeps the connections on the way open, and no client shows it. Without an empty line, which ends an
event: openai's parser takes it for an event without data once it has read an `id`, and fails."""


@dataclass(slots=True)
class Answer:
    """A whole answer as it has grown so far."""

    text: str = ""
    logprobs: list[LogprobEntry] = field(default_factory=list)
    finish: FinishReason | None = None
    tokens: list[int] = field(default_factory=list)
    calls: list[CallDelta] = field(default_factory=list)
    """In the pieces that came."""
    has_called: bool = False

    def add(self, delta: Delta) -> None:
        """Append what came."""
        self.text += delta.text
        self.logprobs += delta.logprobs
        self.finish = delta.finish or self.finish
        self.tokens += delta.tokens
        self.calls += delta.calls
        self.has_called = self.has_called or delta.has_called


def usage_of(num_prompt_tokens: int, num_completion_tokens: int, num_cached_tokens: int = 0) -> Chunk:
    """Token counts. Cached: of the prompt's tokens, those that needed no computing."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def server_sent_event(chunk: Chunk, event_id: str | None = None) -> bytes:
    """One event of a stream; its id comes back as `Last-Event-ID`."""
    head = b"" if event_id is None else b"id: " + event_id.encode() + b"\n"
    return head + b"data: " + orjson.dumps(chunk) + b"\n\n"


class Reply(Protocol):
    """How one kind of request is answered."""

    def opening(self, choice: int) -> list[Chunk]:
        """The chunks before a choice's first text."""

    def chunks(self, choice: int, delta: Delta) -> list[Chunk]:
        """The chunks for what a choice grew by: its text, then its end."""

    def last(self) -> Chunk:
        """The chunk without choices that carries the usage."""

    def whole(self, answers: Sequence[Answer], usage: Chunk) -> Chunk:
        """The answer to a request without `stream`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyHead:
    """What every chunk of an answer repeats."""

    id: str
    created: int
    model: str
    fingerprint: str

    def chunk(self, kind: str, choices: list[Chunk]) -> Chunk:
        """An envelope of `kind` around `choices`."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


class ChatReply:
    """Answers to ``/v1/chat/completions``."""

    def __init__(
        self, head: ReplyHead, *, told_prompt: Sequence[int] | None = None, has_short_call_ids: bool = False
    ) -> None:
        self._head = head
        self._told_prompt = told_prompt
        self._has_short_call_ids = has_short_call_ids

    def opening(self, choice: int) -> list[Chunk]:
        """See `Reply.opening`: the role."""
        chunk = self._chunk(choice, {"role": "assistant", "content": ""})
        if self._told_prompt is not None:
            chunk["prompt_token_ids"] = self._told_prompt
        return [chunk]

    def chunks(self, choice: int, delta: Delta) -> list[Chunk]:
        """See `Reply.chunks`."""
        chunks: list[Chunk] = []
        tells_tokens = self._told_prompt is not None
        if delta.text or delta.calls or delta.logprobs or (tells_tokens and delta.tokens):
            # text and calls in one chunk: a stream is taken up again behind a token, not within what it adds
            grown: Chunk = {"content": delta.text} if delta.text or not delta.calls else {}
            if delta.calls:
                grown["tool_calls"] = call_chunks(delta.calls, self._head.id, choice, is_short=self._has_short_call_ids)
            chunk = self._chunk(choice, grown, logprobs=_chat_logprobs(delta.logprobs))
            if tells_tokens:
                chunk["choices"][0]["token_ids"] = delta.tokens
            chunks.append(chunk)
        if delta.finish is not None:
            chunks.append(self._chunk(choice, {}, finish=_chat_finish(delta)))
        return chunks

    def last(self) -> Chunk:
        """See `Reply.last`."""
        return self._head.chunk("chat.completion.chunk", [])

    def whole(self, answers: Sequence[Answer], usage: Chunk) -> Chunk:
        """See `Reply.whole`."""
        choices: list[Chunk] = [
            {
                "index": index,
                "message": self._message(index, answer),
                "logprobs": _chat_logprobs(answer.logprobs),
                "finish_reason": _chat_finish(answer),
            }
            for index, answer in enumerate(answers)
        ]
        reply = {**self._head.chunk("chat.completion", choices), "usage": usage}
        if self._told_prompt is not None:
            reply["prompt_token_ids"] = self._told_prompt
            for choice, answer in zip(choices, answers, strict=True):
                choice["token_ids"] = answer.tokens
        return reply

    def _message(self, choice: int, answer: Answer) -> Chunk:
        message: Chunk = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.calls:
            message["content"] = answer.text or None
            message["tool_calls"] = whole_calls(answer.calls, self._head.id, choice, is_short=self._has_short_call_ids)
        return message

    def _chunk(self, choice: int, delta: Chunk, *, logprobs: Chunk | None = None, finish: str | None = None) -> Chunk:
        return self._head.chunk(
            "chat.completion.chunk",
            [{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}],
        )


class CompletionReply:
    """Answers to ``/v1/completions``; `echoes` stand before the choices' own text."""

    def __init__(
        self, head: ReplyHead, echoes: Sequence[str], *, told_prompts: Sequence[Sequence[int]] | None = None
    ) -> None:
        self._head = head
        self._echoes = echoes
        self._told_prompts = told_prompts

    def opening(self, choice: int) -> list[Chunk]:
        """See `Reply.opening`: the prompt, if it is to be echoed."""
        if self._told_prompts is not None:
            chunk = self._chunk(choice, self._echoes[choice])
            chunk["choices"][0]["prompt_token_ids"] = self._told_prompts[choice]
            return [chunk]
        return [self._chunk(choice, self._echoes[choice])] if self._echoes[choice] else []

    def chunks(self, choice: int, delta: Delta) -> list[Chunk]:
        """See `Reply.chunks`."""
        chunks: list[Chunk] = []
        tells_tokens = self._told_prompts is not None
        if delta.text or delta.logprobs or (tells_tokens and delta.tokens):
            chunk = self._chunk(choice, delta.text, logprobs=_completion_logprobs(delta.logprobs))
            if tells_tokens:
                chunk["choices"][0]["token_ids"] = delta.tokens
            chunks.append(chunk)
        if delta.finish is not None:
            chunks.append(self._chunk(choice, "", finish=delta.finish.value))
        return chunks

    def last(self) -> Chunk:
        """See `Reply.last`."""
        return self._head.chunk("text_completion", [])

    def whole(self, answers: Sequence[Answer], usage: Chunk) -> Chunk:
        """See `Reply.whole`."""
        choices: list[Chunk] = [
            {
                "index": index,
                "text": self._echoes[index] + answer.text,
                "logprobs": _completion_logprobs(answer.logprobs),
                "finish_reason": answer.finish.value if answer.finish else None,
            }
            for index, answer in enumerate(answers)
        ]
        if self._told_prompts is not None:
            for choice, answer, prompt in zip(choices, answers, self._told_prompts, strict=True):
                choice["prompt_token_ids"] = prompt
                choice["token_ids"] = answer.tokens
        return {**self._head.chunk("text_completion", choices), "usage": usage}

    def _chunk(self, choice: int, text: str, *, logprobs: Chunk | None = None, finish: str | None = None) -> Chunk:
        return self._head.chunk(
            "text_completion", [{"index": choice, "text": text, "logprobs": logprobs, "finish_reason": finish}]
        )


def _chat_finish(grown: Delta | Answer) -> str | None:
    """An answer that was cut off in a call says so."""
    if grown.finish is FinishReason.STOP and grown.has_called:
        return CALLED
    return None if grown.finish is None else grown.finish.value


def _chat_logprobs(entries: Sequence[LogprobEntry]) -> Chunk | None:
    if not entries:
        return None
    content = [
        {
            **_chat_token(entry.token, entry.logprob),
            "top_logprobs": [_chat_token(token, logprob) for token, logprob in entry.likeliest],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _chat_token(token: TokenText, logprob: float) -> Chunk:
    return {"token": token.text, "logprob": logprob, "bytes": list(token.data)}


def _completion_logprobs(entries: Sequence[LogprobEntry]) -> Chunk | None:
    if not entries:
        return None
    return {
        "tokens": [entry.token.text for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [by_text((entry.token, entry.logprob), entry.likeliest) for entry in entries],
        "text_offset": [entry.offset for entry in entries],
    }
