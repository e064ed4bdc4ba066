"""An answer that tells log probabilities of its prompt, around the reply that tells the answer itself. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from molink_common.identity import SequenceId
from molink_gateway.choice import Delta
from molink_gateway.generation_fields import GenerationFields
from molink_gateway.prompt_logprobs import PromptInbox, TextOf, joined, shifted
from molink_gateway.replies import Answer, Chunk, Reply, ReplyHead

if TYPE_CHECKING:
    from molink_gateway.preparation import Prepared


@dataclass(frozen=True, slots=True, kw_only=True)
class Echo:
    """A prompt that stands before the answer, with its log probabilities."""

    text: str
    offsets: Sequence[int]
    """Where each of its tokens begins in the text."""
    likeliest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTold:
    """What a choice tells of its prompt. `inbox` is complete before the choice says anything."""

    inbox: PromptInbox
    text_of: TextOf
    echo: Echo | None = None
    """As OpenAI's `echo` with `logprobs`."""
    likeliest: int | None = None
    """As vLLM's `prompt_logprobs`; None: not at all."""

    def as_openai(self, echo: Echo) -> Chunk:
        """The prompt's part of the object `logprobs`."""
        return self.inbox.as_openai(likeliest=echo.likeliest, offsets=echo.offsets, text_of=self.text_of)


class PromptReply:
    """See `Reply`. `told` has a value for each choice; `is_chat`: all have the same prompt, which is told once."""

    def __init__(self, answer: Reply, head: ReplyHead, told: Sequence[PromptTold], *, is_chat: bool) -> None:
        self._answer = answer
        self._head = head
        self._told = told
        self._is_chat = is_chat

    def opening(self, choice: int) -> list[Chunk]:
        """See `Reply.opening`: the prompt with its log probabilities."""
        chunks = self._answer.opening(choice)
        told = self._told[choice]
        if told.echo is None:
            return chunks
        if not chunks:  # a prompt of special tokens alone has no text
            empty = {"index": choice, "text": "", "logprobs": None, "finish_reason": None}
            chunks = [self._head.chunk("text_completion", [empty])]
        chunks[0]["choices"][0]["logprobs"] = told.as_openai(told.echo)
        return chunks

    def chunks(self, choice: int, delta: Delta) -> list[Chunk]:
        """See `Reply.chunks`."""
        chunks = self._answer.chunks(choice, delta)
        echo = self._told[choice].echo
        if echo is not None:
            for chunk in chunks:
                own = chunk["choices"][0]
                own["logprobs"] = own["logprobs"] and shifted(own["logprobs"], len(echo.text))
        return chunks

    def last(self) -> Chunk:
        """See `Reply.last`."""
        return self._answer.last()

    def whole(self, answers: Sequence[Answer], usage: Chunk) -> Chunk:
        """See `Reply.whole`."""
        reply = self._answer.whole(answers, usage)
        for choice, told in zip(reply["choices"], self._told, strict=True):
            if told.echo is not None:
                prompt = told.as_openai(told.echo)
                choice["logprobs"] = joined(prompt, choice["logprobs"], num_echoed=len(told.echo.text))
            if told.likeliest is not None and not self._is_chat:
                choice["prompt_logprobs"] = told.inbox.as_vllm(likeliest=told.likeliest, text_of=told.text_of)
        first = self._told[0]
        if first.likeliest is not None and self._is_chat:
            reply["prompt_logprobs"] = first.inbox.as_vllm(likeliest=first.likeliest, text_of=first.text_of)
        return reply


def with_prompts(
    prepared: Prepared,
    request: GenerationFields,
    head: ReplyHead,
    text_of: TextOf,
    *,
    echoes: Sequence[Echo | None] | None,
) -> Prepared:
    """The same, but with the log probabilities of its prompts where the request asks for them.

    The first of the choices of a prompt has the pipeline tell them, for all. `echoes` is None for a chat.
    """
    if request.likeliest_of_prompt is None:
        return prepared
    inboxes: dict[SequenceId, PromptInbox] = {}
    told: list[PromptTold] = []
    for choice, echo in zip(prepared.choices, echoes or (), strict=False):
        choice.tells_end = echo is not None  # who counts from the end counts every token
    sequences = prepared.submission.sequences
    for sequence, echo in zip(sequences, echoes or [None] * len(sequences), strict=True):
        if sequence.options.prompt_logprobs is not None:
            inbox = inboxes[sequence.sequence] = PromptInbox(sequence.prompt)
        told.append(PromptTold(inbox=inbox, text_of=text_of, echo=echo, likeliest=request.prompt_logprobs))
    return replace(
        prepared,
        submission=replace(prepared.submission, prompts=inboxes),
        reply=PromptReply(prepared.reply, head, told, is_chat=echoes is None),
        prompts=tuple(one.inbox for one in told),
    )
