"""How a stream is told, event by event. Chat and completions tell chunks; other kinds of streams bring a script."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from molink_gateway.api_errors import ApiError
from molink_gateway.choice import Delta
from molink_gateway.replies import DONE, Chunk, server_sent_event
from molink_gateway.stream_place import Part

if TYPE_CHECKING:
    from molink_gateway.preparation import Prepared
    from molink_gateway.run import Run


class Script(Protocol):
    """What a stream says, as bytes. Called in this order: `begin`, `grow` again and again, then `end` or `fail`."""

    def begin(self) -> bytes:
        """What comes before the first token."""

    def grow(self, choice: int, delta: Delta) -> bytes:
        """What is said of a choice that grew."""

    def end(self) -> bytes:
        """What comes after the last token."""

    def fail(self, error: ApiError, *, runs_on: bool) -> bytes:
        """The last words when the stream breaks off; with `runs_on` somebody may take it up."""


class ChunkScript:
    """OpenAI's chunks, with the ids by which a stream is taken up again."""

    def __init__(self, prepared: Prepared, run: Run) -> None:
        self._prepared = prepared
        self._run = run
        self._unopened = set(range(len(prepared.prompts)))
        """Choices that begin with log probabilities of their prompts, which come with the first token."""

    def begin(self) -> bytes:
        """See `Script.begin`."""
        if self._prepared.told is not None:
            return b""
        reply = self._prepared.reply
        choices = [choice for choice in range(len(self._prepared.choices)) if choice not in self._unopened]
        return self._events([chunk for choice in choices for chunk in reply.opening(choice)])

    def grow(self, choice: int, delta: Delta) -> bytes:
        """See `Script.grow`."""
        reply = self._prepared.reply
        opening = reply.opening(choice) if choice in self._unopened else []
        self._unopened.discard(choice)
        return self._events([*opening, *reply.chunks(choice, delta)])

    def end(self) -> bytes:
        """See `Script.end`: the usage, if it is wanted."""
        prepared, told = self._prepared, self._prepared.told
        if not prepared.has_usage or (told is not None and told.part is Part.USAGE):
            return DONE
        usage = {**prepared.reply.last(), "usage": self._run.usage()}
        return server_sent_event(usage, self._run.place(Part.USAGE)) + DONE

    def fail(self, error: ApiError, *, runs_on: bool) -> bytes:
        """See `Script.fail`."""
        return server_sent_event(error.body()) + (b"" if runs_on else DONE)

    def _events(self, chunks: list[Chunk]) -> bytes:
        data = b""
        for chunk in chunks:
            if self._prepared.has_usage:
                chunk["usage"] = self._run.usage() if self._prepared.has_continuous_usage else None
            is_end = chunk["choices"][0]["finish_reason"] is not None
            data += server_sent_event(chunk, self._run.place(Part.END if is_end else Part.TEXT))
        return data
