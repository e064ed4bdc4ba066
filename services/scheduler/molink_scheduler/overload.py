"""When a newcomer would get its first token, and whether that is too late to let it in.

Whoever waits for a first token stands in a line. While the line is not empty, first tokens come out of the pipelines
as fast as these can let sequences in: as places become free, or as prompts are computed, whichever is scarcer. So the
speed of the line is measured, not modelled, and a newcomer's wait is what stands before it in the line over that
speed. It is measured apart for times in which sequences wait for places: while an empty pool fills, first tokens come
much faster than places become free later. Heads serve tenants by turns (fair shares), so before a newcomer stand its
own tenant's sequences, and of every other tenant's no more than as many again.

Pure but for what it remembers: no IO, and the time is an argument, in seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

LEAST_LINE = 3
"""A line so short is never turned away from, and says nothing of the speed at which a longer one would move."""
_LEAST_FIRST_TOKENS = 8
"""What a speed is measured from, at least."""
_WINDOW_S = 30.0
_WINDOW_FIRST_TOKENS = 16
"""Older ones than `_WINDOW_S` count while there are no more than these."""
_MOST_FIRST_TOKENS = 512
RESUME_AT = 0.9
"""Who was turned away is let in again once its wait is below this part of the target, so that the answer does not
change with every token."""
HOLD_S = 0.25
"""How long a gateway may repeat a refusal without asking again."""
_LEAST_RETRY_S = 1.0
_MOST_RETRY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Who waits for a first token."""

    sequences: Mapping[str, int]
    """By tenant."""
    prompt_tokens: Mapping[str, int]
    """By tenant."""
    awaits_places: bool
    """Whether sequences wait for places or KV blocks; else what they wait for is that prompts are computed."""

    @property
    def length(self) -> int:
        """Of all tenants."""
        return sum(self.sequences.values())


class Speed(NamedTuple):
    """How fast the line moves."""

    sequences_per_s: float
    prompt_tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TooLate:
    """A refusal."""

    predicted_s: float
    retry_after_s: float
    holds_s: float | None
    """For how long any request of this tenant would be answered so. None: a shorter prompt might be let in."""


@dataclass(slots=True)
class LineMeter:
    """Measures the line's speed, on a clock that stands still while the line is short."""

    _clock_s: float = 0.0
    _looked_s: float | None = None
    _length: int = 0
    _first_tokens: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_MOST_FIRST_TOKENS))
    """When they came, by that clock, and the tokens of their prompts."""
    _since_s: float = 0.0
    """By that clock: from when on first tokens are counted."""

    def look(self, length: int, now_s: float) -> None:
        """The line has this length from now on."""
        if self._looked_s is not None and self._length >= LEAST_LINE:
            self._clock_s += max(now_s - self._looked_s, 0.0)
        self._looked_s, self._length = now_s, length

    def first_token(self, prompt_tokens: int) -> None:
        """One left the line, which was looked at a moment ago."""
        if self._length < LEAST_LINE:
            return
        if len(self._first_tokens) == _MOST_FIRST_TOKENS:
            self._since_s = self._first_tokens[0][0]
        self._first_tokens.append((self._clock_s, prompt_tokens))
        while len(self._first_tokens) > _WINDOW_FIRST_TOKENS and self._clock_s - self._first_tokens[0][0] > _WINDOW_S:
            self._since_s = self._first_tokens.popleft()[0]

    def speed(self) -> Speed | None:
        """None: too little was seen."""
        elapsed_s = self._clock_s - self._since_s
        if len(self._first_tokens) < _LEAST_FIRST_TOKENS or elapsed_s <= 0:
            return None
        return Speed(len(self._first_tokens) / elapsed_s, sum(tokens for _, tokens in self._first_tokens) / elapsed_s)


def predicted_ttft_s(line: Line, speed: Speed, *, tenant: str, prompt_tokens: int) -> float:
    """When a newcomer with such a prompt would get its first token, from now."""
    if line.awaits_places or speed.prompt_tokens_per_s <= 0:
        return _with_its_turns(line.sequences, tenant, 1) / speed.sequences_per_s
    return _with_its_turns(line.prompt_tokens, tenant, prompt_tokens) / speed.prompt_tokens_per_s


def _with_its_turns(waiting: Mapping[str, int], tenant: str, own: int) -> int:
    """What comes out of the line until the newcomer has: its tenant's, and as much of each other's."""
    until = waiting.get(tenant, 0) + own
    return until + sum(min(count, until) for other, count in waiting.items() if other != tenant)


class Overload:
    """Turns newcomers away whose first token would come later than `target_s`. 0: nobody."""

    def __init__(self, target_s: float) -> None:
        self._target_s = target_s
        self._turned_away: set[str] = set()
        """Tenants whose last request was."""
        self.meters = {True: LineMeter(), False: LineMeter()}
        """For times in which sequences wait for places, and for others."""

    def look(self, length: int, now_s: float, *, awaits_places: bool) -> None:
        """The line is this long from now on, and this is what it waits for."""
        for is_for, meter in self.meters.items():
            meter.look(length if is_for is awaits_places else 0, now_s)

    def first_token(self, prompt_tokens: int) -> None:
        """One left the line, which was looked at a moment ago."""
        for meter in self.meters.values():
            meter.first_token(prompt_tokens)

    def why_not(self, line: Line, *, tenant: str, prompt_tokens: int) -> TooLate | None:
        """None: let it in."""
        if line.length < LEAST_LINE:
            self._turned_away.clear()
        speed = self.meters[line.awaits_places].speed() or self.meters[not line.awaits_places].speed()
        if not self._target_s or speed is None or _with_its_turns(line.sequences, tenant, 0) < LEAST_LINE:
            self._turned_away.discard(tenant)
            return None
        predicted_s = predicted_ttft_s(line, speed, tenant=tenant, prompt_tokens=prompt_tokens)
        limit_s = self._target_s * (RESUME_AT if tenant in self._turned_away else 1.0)
        if predicted_s <= limit_s:
            self._turned_away.discard(tenant)
            return None
        self._turned_away.add(tenant)
        resumes_at_s = self._target_s * RESUME_AT
        of_shortest_s = predicted_ttft_s(line, speed, tenant=tenant, prompt_tokens=1)
        return TooLate(
            predicted_s=predicted_s,
            retry_after_s=round(min(max(predicted_s - resumes_at_s, _LEAST_RETRY_S), _MOST_RETRY_S), 1),
            holds_s=min(HOLD_S, of_shortest_s - resumes_at_s) if of_shortest_s > resumes_at_s else None,
        )
