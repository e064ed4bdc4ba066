"""Which count of micro-batches to have, and when to change it: at once when the demand is another, else rarely.

Each change makes the steps uneven for a while, so it has to pay, and a count that goes to and fro has to rest longer
and longer. What nobody has tried is tried once, for a moment, if it lies next to the present count and might pay:
a stage's time for sizes that it never ran is a guess, and a wrong guess would otherwise stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from molink_stage_worker.planning.cycle import Cycle, best, distinct_counts

_TIE = 0.02
_LEAST_GAIN = 0.03
_LARGE_GAIN = 0.15
"""Has to rest no longer than any change."""
_REST_S = 1.0
_REST_CYCLES = 3.0
_LONGEST_REST_S = 30.0
_TRIES_EVERY_S = 2.0
_TRY_S = 0.5
_TRY_CYCLES = 2.5
_TRY_WITHIN = 1.3
"""A count is tried if its predicted cycle is at most so many times the present one's."""


@dataclass(frozen=True, slots=True)
class _Try:
    micro_batches: int
    until_s: float


class MicroBatchChoice:
    """The count of micro-batches, changed as predictions change."""

    def __init__(self, micro_batches: int) -> None:
        self._present = micro_batches
        self._decoding = 0
        """How many decoded when the present count was chosen afresh."""
        self._changed_at_s = 0.0
        self._rest_s = _REST_S
        self._went_up: bool | None = None
        self._try: _Try | None = None
        self._tried_at_s = 0.0
        self._tried_sizes: set[int] = set()

    def choose(
        self, *, decoding: int, now_s: float, predict: Callable[[int], Cycle], knows: Callable[[int], bool]
    ) -> Cycle:
        """The cycle to run, for at least one sequence that decodes.

        `predict` gives the cycle of a count of micro-batches, `knows` whether steps of so many sequences were measured.
        """
        if not self._decoding / 2 < decoding < self._decoding * 2:
            self._decoding = decoding
            self._rest_s = _REST_S
            self._went_up = None
            self._try = None
            return self._change(_best(decoding, predict), now_s)
        if self._try is not None:
            if self._tried_at_s <= now_s < self._try.until_s:
                return predict(self._try.micro_batches)
            self._try = None
            self._tried_at_s = now_s
        now = predict(self._present)
        rested_s = now_s - self._changed_at_s
        if rested_s < max(_REST_S, _REST_CYCLES * now.cycle_s):
            return now
        chosen = _best(decoding, predict)
        gain = 1.0 - chosen.cycle_s / now.cycle_s
        if gain > _LARGE_GAIN or (gain > _LEAST_GAIN and rested_s >= self._rest_s):
            goes_up = chosen.micro_batches > self._present
            turns = self._went_up is not None and goes_up != self._went_up
            self._rest_s = min(2.0 * self._rest_s, _LONGEST_REST_S) if turns else self._rest_s
            self._went_up = goes_up
            return self._change(chosen, now_s)
        if now_s - self._tried_at_s < _TRIES_EVERY_S:
            return now
        return self._start_try(decoding, now, now_s, predict, knows) or now

    def _change(self, cycle: Cycle, now_s: float) -> Cycle:
        self._present = cycle.micro_batches
        self._changed_at_s = now_s
        return cycle

    def _start_try(
        self,
        decoding: int,
        now: Cycle,
        now_s: float,
        predict: Callable[[int], Cycle],
        knows: Callable[[int], bool],
    ) -> Cycle | None:
        counts = distinct_counts(decoding)
        above = [count for count in counts if count > now.micro_batches][:1]
        below = [count for count in counts if count < now.micro_batches][-1:]
        for count in above + below:
            there = predict(count)
            if there.size in self._tried_sizes or knows(there.size) or there.cycle_s > _TRY_WITHIN * now.cycle_s:
                continue
            self._tried_sizes.add(there.size)
            length_s = max(_TRY_S, _TRY_CYCLES * max(now.cycle_s, there.cycle_s))
            self._try = _Try(count, now_s + length_s)
            self._tried_at_s = now_s
            return there
        return None


def _best(decoding: int, predict: Callable[[int], Cycle]) -> Cycle:
    return best([predict(count) for count in distinct_counts(decoding)], tie=_TIE)
