"""How long cycles really are, next to what was predicted for their count of micro-batches.

A prediction knows no waiting: neither that of tokens for the head, nor what prompts, links and chance put in between.
So what is measured over what was predicted is learnt, as a ratio in two parts:

    log(measured / predicted) = common + own(count of micro-batches)

Every surprise counts half as the count's own fault and half as everybody's. A count that disappoints is left, and
one that was not run gets its chance; but a prompt or a link that makes a while slower makes it so for all, and sends
nobody to and fro. What was shown is forgotten in a minute.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp, log
from statistics import fmean

_SETTLING_CYCLES = 2.0
"""After a change: steps of the former size are still under way."""
_WINDOW_S = 1.5
_WINDOW_CYCLES = 6.0
"""Tokens come a micro-batch at a time: fewer cycles would be counted too coarsely."""
_GAIN = 0.3
_COMMON = 0.5
_FORGET_S = 60.0
_ANOTHER_DEMAND = 1.5
_LEAST, _MOST = log(0.7), log(2.0)


@dataclass(frozen=True, slots=True)
class _Part:
    log_ratio: float
    at_s: float


@dataclass(slots=True)
class CycleMeter:
    """No clock: the time is an argument, in seconds."""

    _common: _Part | None = None
    _own: dict[int, _Part] = field(default_factory=dict)
    """By count of micro-batches that was run."""
    _micro_batches: int = 0
    _settled_at_s: float = 0.0
    _began_s: float | None = None
    """When tokens began to be counted. None: steps of the former count are still under way."""
    _reference: int = 0
    """How many decoded when the present parts began."""
    _tokens: int = 0
    _predicted_s: list[float] = field(default_factory=list)
    _decoding: list[int] = field(default_factory=list)

    def on_tokens(self, count: int) -> None:
        """Decode steps came back with so many tokens."""
        self._tokens += count

    def on_plan(self, micro_batches: int, predicted_s: float, decoding: int, now_s: float) -> None:
        """This count is in use from now on; a cycle is predicted to take `predicted_s`, without any correction."""
        is_another_demand = not self._reference / _ANOTHER_DEMAND < decoding < self._reference * _ANOTHER_DEMAND
        if is_another_demand:
            self._common = None  # what was shown for another demand says nothing
            self._own.clear()
            self._reference = decoding
        if is_another_demand or micro_batches != self._micro_batches:
            self._micro_batches = micro_batches
            self._settled_at_s = now_s + _SETTLING_CYCLES * predicted_s
            self._began_s = None
        if self._began_s is None:
            if now_s >= self._settled_at_s:
                self._begin(now_s)
            return
        self._predicted_s.append(predicted_s)
        self._decoding.append(decoding)
        elapsed_s = now_s - self._began_s
        if elapsed_s < max(_WINDOW_S, _WINDOW_CYCLES * predicted_s):
            return
        if self._tokens:
            measured_s = fmean(self._decoding) * elapsed_s / self._tokens
            self._learn(measured_s / fmean(self._predicted_s), now_s)
        self._begin(now_s)

    def factor(self, micro_batches: int, now_s: float) -> float:
        """What to multiply a prediction with."""
        return exp(_present(self._common, now_s) + _present(self._own.get(micro_batches), now_s))

    def _learn(self, ratio: float, now_s: float) -> None:
        common = _present(self._common, now_s)
        own = _present(self._own.get(self._micro_batches), now_s)
        surprise = _GAIN * (min(max(log(ratio), _LEAST), _MOST) - common - own)
        self._common = _Part(common + _COMMON * surprise, now_s)
        self._own[self._micro_batches] = _Part(own + (1.0 - _COMMON) * surprise, now_s)

    def _begin(self, now_s: float) -> None:
        self._began_s = now_s
        self._tokens = 0
        self._predicted_s.clear()
        self._decoding.clear()


def _present(part: _Part | None, now_s: float) -> float:
    """What is left of it."""
    return 0.0 if part is None else part.log_ratio * exp(min(part.at_s - now_s, 0.0) / _FORGET_S)
