"""How long cycles really are, next to what was predicted for their count of micro-batches.

A prediction knows no waiting: neither that of tokens for the head, nor what prompts, links and chance put in between.
So what is measured over what was predicted is learnt, as a ratio in two parts:

    log(measured / predicted) = common + own(count of micro-batches)

While a count runs, a surprise counts half as its own fault and half as everybody's. A count that disappoints is left,
and one that was not run gets its chance; but a prompt or a link that makes a while slower makes it so for all, and
sends nobody to and fro.

Predictions stand on what stages took lately, and where stages share cores that depends on the count that runs: few
micro-batches leave a stage the cores alone. So the seconds themselves that each count showed are remembered too, and
after a change of count every ratio is taken afresh, remembered seconds over what is predicted now. What was shown is
forgotten in a minute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import exp, log
from statistics import fmean

_SETTLING_CYCLES = 2.0
"""After a change: steps of the former size are still under way."""
_WINDOW_S = 1.0
_WINDOW_CYCLES = 10.0
"""Tokens come a micro-batch at a time: fewer cycles would be counted too coarsely."""
_GAIN = 0.25
_COMMON = 0.5
_TRUST = 0.8
"""In remembered seconds: chance is in them too."""
_FORGET_S = 60.0
_ANOTHER_DEMAND = 1.5
_ANOTHER_WORLD = 0.3
"""What was shown is forgotten at once if the prediction differs by more, as a log: not because of shared cores then."""
_LEAST, _MOST = log(0.7), log(2.0)


@dataclass(frozen=True, slots=True)
class _Part:
    value: float
    at_s: float


@dataclass(frozen=True, slots=True)
class _Shown:
    """Cycles of a count of micro-batches that ran, as logs of seconds."""

    measured: float
    predicted: float
    at_s: float


@dataclass(slots=True)
class CycleMeter:
    """No clock: the time is an argument, in seconds."""

    _common: _Part | None = None
    _own: dict[int, _Part] = field(default_factory=dict)
    """By count of micro-batches that was run: its part of the log ratio, and when it was settled."""
    _shown: dict[int, _Shown] = field(default_factory=dict)
    _micro_batches: int = 0
    _settled_at_s: float = 0.0
    """Before that, steps of the former count are still under way."""
    _has_changed: bool = True
    """No window has ended since another count ran."""
    _reference: int = 0
    """How many decoded when the present parts began."""
    _first_s: float | None = None
    """When the step came back whose tokens are the last that the present window does not count."""
    _last_s: float = 0.0
    _tokens: int = 0
    _decoding: list[int] = field(default_factory=list)

    def on_tokens(self, count: int, now_s: float) -> None:
        """A decode step came back with so many tokens."""
        if count < 1 or now_s < self._settled_at_s:
            return
        if self._first_s is None:
            self._begin(now_s)
        else:
            self._tokens += count
            self._last_s = now_s

    def on_plan(self, micro_batches: int, decoding: int, now_s: float, predict_s: Callable[[int, int], float]) -> None:
        """This count is in use from now on, for so many that decode.

        `predict_s` gives the seconds of a cycle, without any correction, for a count and for how many decode.
        """
        is_another_demand = not self._reference / _ANOTHER_DEMAND < decoding < self._reference * _ANOTHER_DEMAND
        if is_another_demand:
            self._common = None  # what was shown for another demand says nothing
            self._own.clear()
            self._shown.clear()
            self._reference = decoding
        if is_another_demand or micro_batches != self._micro_batches:
            self._micro_batches = micro_batches
            self._settled_at_s = now_s + _SETTLING_CYCLES * predict_s(micro_batches, decoding)
            self._has_changed = True
            self._first_s = None
        if self._first_s is None:
            return
        self._decoding.append(decoding)
        elapsed_s = self._last_s - self._first_s
        if elapsed_s < max(_WINDOW_S, _WINDOW_CYCLES * predict_s(micro_batches, decoding)):
            return
        mean = fmean(self._decoding)
        self._learn(mean * elapsed_s / self._tokens, now_s, lambda count: predict_s(count, round(mean)))
        self._begin(self._last_s)

    def measured_at_s(self, micro_batches: int) -> float | None:
        """When cycles of this count were last measured. None: never with about as many that decode."""
        shown = self._shown.get(micro_batches)
        return None if shown is None else shown.at_s

    def factor(self, micro_batches: int, now_s: float) -> float:
        """What to multiply a prediction with."""
        return exp(_present(self._common, now_s) + _present(self._own.get(micro_batches), now_s))

    def _learn(self, measured_s: float, now_s: float, predict_s: Callable[[int], float]) -> None:
        present = self._micro_batches
        measured = log(measured_s)
        predicted = log(predict_s(present))
        common = _present(self._common, now_s)
        if self._has_changed and self._common is not None:
            self._shown[present] = _Shown(measured, predicted, now_s)
            self._forget_another_world(predict_s)
            for count, shown in self._shown.items():
                remembered = _TRUST * exp(min(shown.at_s - now_s, 0.0) / _FORGET_S)
                ratio = _bounded(shown.measured - log(predict_s(count)))
                self._own[count] = _Part(remembered * (ratio - common), now_s)
        else:
            own = _present(self._own.get(present), now_s)
            surprise = _GAIN * (_bounded(measured - predicted) - common - own)
            self._common = _Part(common + _COMMON * surprise, now_s)
            self._own[present] = _Part(own + (1.0 - _COMMON) * surprise, now_s)
            for count, shown in self._shown.items():
                self._shown[count] = replace(shown, measured=shown.measured + _COMMON * surprise)
            before = self._shown[present].measured if present in self._shown else measured
            self._shown[present] = _Shown(before + _GAIN * (measured - before), predicted, now_s)
        self._has_changed = False

    def _forget_another_world(self, predict_s: Callable[[int], float]) -> None:
        for count, shown in list(self._shown.items()):
            if abs(log(predict_s(count)) - shown.predicted) > _ANOTHER_WORLD:
                del self._shown[count]
                self._own.pop(count, None)

    def _begin(self, now_s: float) -> None:
        self._first_s = self._last_s = now_s
        self._tokens = 0
        self._decoding.clear()


def _bounded(log_ratio: float) -> float:
    return min(max(log_ratio, _LEAST), _MOST)


def _present(part: _Part | None, now_s: float) -> float:
    """What is left of it."""
    return 0.0 if part is None else part.value * exp(min(part.at_s - now_s, 0.0) / _FORGET_S)
