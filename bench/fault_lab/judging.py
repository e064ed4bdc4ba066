"""What a stream lost, what it saw twice, and how long it stood still. Decisions only."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

LONGEST_GAP_S = 60.0
"""A stream that is silent for longer counts as cut."""

_SAME_TEXT_SHARE = 0.8
"""Of what is left beside the common beginning and end: with less in common the answer has become another one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """One answer, as its client saw it. Times are seconds on the driver's monotonic clock."""

    prompt: int
    client: int
    started_s: float
    accepted_s: float | None
    """When the answer's headers came; None: it was never accepted."""
    ended_s: float
    arrivals: tuple[float, ...]
    """When chunks with tokens came."""
    tokens: tuple[int, ...]
    told_tokens: int | None
    """What the answer's usage says."""
    problem: str | None
    """Why it is cut; None: it went on to its end."""
    refusals: dict[str, int] = field(default_factory=dict)
    """What the client was told before it was accepted, and how often."""
    resumed: int = 0

    def was_running(self, at_s: float) -> bool:
        """Whether it had been accepted and had not ended."""
        return self.accepted_s is not None and self.accepted_s < at_s < self.ended_s

    def tokens_at(self, at_s: float) -> int:
        """How many chunks with tokens, nearly always of one token each, had come by then."""
        return bisect.bisect(self.arrivals, at_s)

    def pause_s(self, since_s: float, until_s: float) -> float | None:
        """The longest gap between two of its chunks that overlaps the time given; None if none does."""
        assert self.accepted_s is not None, "only of a stream that ran"
        gaps = (
            after - before
            for before, after in itertools.pairwise((self.accepted_s, *self.arrivals))
            if after > since_s and before < until_s
        )
        return max(gaps, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How an answer differs from what it should be, in tokens."""

    lost: int = 0
    repeated: int = 0
    other: int = 0
    """Of an answer that went another way: neither lost nor repeated, but different tokens."""
    first: int | None = None
    """The place of the first token that is not as it should be; None: they are the same."""

    @property
    def is_none(self) -> bool:
        """Whether they are the same."""
        return self.first is None


def difference(expected: Sequence[int], seen: Sequence[int]) -> Difference:
    """What is missing from `seen`, what is too much in it, and what is another text altogether."""
    start = _common(expected, seen)
    end = _common(expected[start:][::-1], seen[start:][::-1])
    wanted = list(expected[start : len(expected) - end])
    got = list(seen[start : len(seen) - end])
    if not wanted and not got:
        return Difference()
    if not wanted or not got:
        return Difference(lost=len(wanted), repeated=len(got), first=start)
    matcher = SequenceMatcher(None, wanted, got, autojunk=False)
    matched = sum(block.size for block in matcher.get_matching_blocks())
    if matched < _SAME_TEXT_SHARE * min(len(wanted), len(got)):
        return Difference(lost=max(0, len(wanted) - len(got)), other=len(got), first=start)
    lost = repeated = other = 0
    for kind, wanted_from, wanted_to, got_from, got_to in matcher.get_opcodes():
        if kind == "delete":
            lost += wanted_to - wanted_from
        elif kind == "insert":
            repeated += got_to - got_from
        elif kind == "replace":
            other += max(wanted_to - wanted_from, got_to - got_from)
    return Difference(lost=lost, repeated=repeated, other=other, first=start)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def percentile(values: Sequence[float], share: float) -> float | None:
    """The least value that at least `share` of the values do not exceed; None of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None
