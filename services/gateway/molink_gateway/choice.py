"""One answer, growing token by token. Pure.

Ties together detokenizer, stop strings and log probabilities: what a token adds to the answer is a `Delta`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from molink_common.messages import FinishReason, TokenEvent
from molink_gateway.detokenizer import Detokenizer
from molink_gateway.stop_strings import StopStrings
from molink_gateway.tokenizer import TokenText
from molink_gateway.tool_calls import CallDelta, CallReader

SMALLEST_LOGPROB = -9999.0
"""What OpenAI writes for a token that is as good as impossible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobEntry:
    """One token with its log probability and the likeliest beside it."""

    token: TokenText
    logprob: float
    likeliest: tuple[tuple[TokenText, float], ...]
    offset: int
    """Where its text begins in the answer, in characters."""


@dataclass(slots=True)
class Delta:
    """What a token (or several) adds to the answer."""

    text: str = ""
    logprobs: tuple[LogprobEntry, ...] = ()
    finish: FinishReason | None = None
    tokens: tuple[int, ...] = ()
    """All that were generated, also those without text."""
    calls: tuple[CallDelta, ...] = ()
    """What calls of tools grew by."""
    has_called: bool = False
    """With `finish`: the answer has called tools."""

    def joined(self, later: Delta) -> Delta:
        """This and what came after it."""
        return Delta(
            self.text + later.text,
            self.logprobs + later.logprobs,
            later.finish or self.finish,
            self.tokens + later.tokens,
            self.calls + later.calls,
            later.has_called or self.has_called,
        )


class Choice:
    """The answer of one sequence. `feed` its tokens in order until `finish` is set."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: StopStrings,
        *,
        text_of: Callable[[int], TokenText],
        eos_token_ids: frozenset[int],
        has_logprobs: bool,
        calls: CallReader | None = None,
    ) -> None:
        """`eos_token_ids` end the answer without being part of it; with `calls` the text may hold calls of tools."""
        self._detokenizer = detokenizer
        self._stops = stops
        self._text_of = text_of
        self._eos_token_ids = eos_token_ids
        self._has_logprobs = has_logprobs
        self._calls = calls
        self._waiting: deque[LogprobEntry] = deque()
        self._num_decoded = 0
        self._num_told = 0
        self.num_tokens = 0
        self.tells_end = False
        """Whether an end-of-text token has its log probability told, though it has no text."""
        self.finish: FinishReason | None = None
        self.is_cut_short = False
        """A stop string was met before the pipeline knew of an end: the sequence must be cancelled."""

    @property
    def met(self) -> str | None:
        """The stop string that ended the answer, if one did."""
        return self._stops.met

    def feed(self, event: TokenEvent) -> Delta:
        """What the next token adds. After the end, nothing."""
        if self.finish is not None:
            return Delta()
        self.num_tokens += 1
        is_end_of_text = event.finish is FinishReason.STOP and event.token in self._eos_token_ids
        new = ""
        if self._has_logprobs and event.logprob is not None and (self.tells_end or not is_end_of_text):
            self._waiting.append(self._entry(event, event.logprob))
        if not is_end_of_text:
            new = self._detokenizer.feed(event.token)
        if event.finish is not None:
            new += self._detokenizer.flush()
        self._num_decoded += len(new)
        text = self._stops.feed(new)
        if self._stops.is_met:
            self.finish = FinishReason.STOP
            self.is_cut_short = event.finish is None
        elif event.finish is not None:
            text += self._stops.flush()
            self.finish = event.finish
        self._num_told += len(text)
        logprobs = self._entries_told()
        if self._calls is None:
            return Delta(text, logprobs, self.finish, (event.token,))
        return self._read(self._calls, text, Delta(logprobs=logprobs, tokens=(event.token,)))

    def _read(self, reader: CallReader, text: str, delta: Delta) -> Delta:
        """`delta` with what is said and called in `text`."""
        said = [reader.feed(text)]
        if reader.is_done and self.finish is None:  # as if a stop string were met
            self.finish, self.is_cut_short = FinishReason.STOP, True
        if self.finish is not None:
            said.append(reader.flush())
        delta.text = "".join(one.text for one in said)
        delta.calls = tuple(call for one in said for call in one.calls)
        delta.finish = self.finish
        delta.has_called = self.finish is not None and reader.has_calls
        return delta

    def _entry(self, event: TokenEvent, logprob: float) -> LogprobEntry:
        return LogprobEntry(
            token=self._text_of(event.token),
            logprob=max(logprob, SMALLEST_LOGPROB),
            likeliest=tuple(
                (self._text_of(one.token), max(one.logprob, SMALLEST_LOGPROB)) for one in event.top_logprobs
            ),
            offset=self._num_decoded,
        )

    def _entries_told(self) -> tuple[LogprobEntry, ...]:
        """Those whose text is told. Once a stop string is met, those behind the cut are never told."""
        if not self._waiting:
            return ()
        if not self._stops.is_met and not self._stops.held:
            told = tuple(self._waiting)
            self._waiting.clear()
            return told
        entries: list[LogprobEntry] = []
        while self._waiting and self._waiting[0].offset < self._num_told:
            entries.append(self._waiting.popleft())
        return tuple(entries)
