"""Which count of micro-batches to have, and when to change it: at once when the demand is another, else rarely.

Each change makes the steps uneven for a while, so it has to pay, and a count that goes to and fro has to rest longer
and longer. A count that nobody has seen run for a minute is tried, if it might pay, until its cycles are
measured: a prediction may be wrong for a reason that only running shows, stages that share cores for one,
and a wrong one would otherwise stay. Tries are as rare as they are expensive.
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
_TRY_S = 3.0
_TRY_CYCLES = 18.0
"""The longest that a try lasts: so long if no cycles were measured. `CycleMeter` needs 12 cycles and one way round."""
_MOST_LOSS, _MOST_LOSS_FAR = 0.3, 0.05
"""Of a try: the share by which its cycle may be predicted to be longer, with a count next to the present one or not."""
_TRIES_SHARE = 0.03
"""Of all time, what tries may lose."""
_LEAST_LOSS = 0.05
_KNOWN_FOR_S = 60.0


@dataclass(frozen=True, slots=True)
class _Try:
    micro_batches: int
    since_s: float
    until_s: float
    loss: float
    """The share by which its cycle is predicted to be longer."""


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
        self._no_try_before_s = 0.0

    def choose(
        self,
        *,
        decoding: int,
        now_s: float,
        predict: Callable[[int], Cycle],
        measured_at_s: Callable[[int], float | None],
        may_try: bool = True,
    ) -> Cycle:
        """The cycle to run, for at least one sequence that decodes.

        `predict` gives the cycle of a count of micro-batches, `measured_at_s` when its cycles were last measured.
        No try begins unless it `may_try`.
        """
        if not self._decoding / 2 < decoding < self._decoding * 2:
            self._decoding = decoding
            self._rest_s = _REST_S
            self._went_up = None
            self._try = None
            return self._change(_best(decoding, predict), now_s)
        if self._try is not None:
            measured_s = measured_at_s(self._try.micro_batches)
            is_measured = measured_s is not None and measured_s > self._try.since_s
            if not is_measured and self._try.since_s <= now_s < self._try.until_s:
                return predict(self._try.micro_batches)
            self._no_try_before_s = now_s + (now_s - self._try.since_s) * self._try.loss / _TRIES_SHARE
            self._try = None
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
        present_s = measured_at_s(now.micro_batches)
        if not may_try or now_s < self._no_try_before_s or present_s is None or present_s < self._changed_at_s:
            return now
        return self._start_try(decoding, now, now_s, predict, measured_at_s) or now

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
        measured_at_s: Callable[[int], float | None],
    ) -> Cycle | None:
        counts = distinct_counts(decoding)
        near = [count for count in counts if count < now.micro_batches][-1:]
        near += [count for count in counts if count > now.micro_batches][:1]
        for there in sorted(map(predict, counts), key=lambda cycle: cycle.cycle_s):
            count = there.micro_batches
            loss = there.cycle_s / now.cycle_s - 1.0
            measured_s = measured_at_s(count)
            is_known = measured_s is not None and now_s - measured_s < _KNOWN_FOR_S
            if is_known or count == now.micro_batches or loss > (_MOST_LOSS if count in near else _MOST_LOSS_FAR):
                continue
            length_s = max(_TRY_S, _TRY_CYCLES * max(now.cycle_s, there.cycle_s))
            self._try = _Try(count, now_s, now_s + length_s, max(loss, _LEAST_LOSS))
            return there
        return None


def _best(decoding: int, predict: Callable[[int], Cycle]) -> Cycle:
    return best([predict(count) for count in distinct_counts(decoding)], tie=_TIE)
