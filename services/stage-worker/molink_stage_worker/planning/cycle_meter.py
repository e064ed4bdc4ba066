"""How long cycles really are, next to what was predicted for their count of micro-batches.

A prediction knows no waiting: neither that of tokens for the head, nor what prompts, links and chance put in between.
What a count of micro-batches has shown corrects what is predicted for it. Of a count that was not run, half of that
is believed to be its own fault, so that it gets its chance. What was shown is forgotten in a minute.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp

_WINDOW_S = 1.5
_GAIN = 0.3
_COMMON = 0.5
_FORGET_S = 60.0
_ANOTHER_DEMAND = 1.5
_LEAST, _MOST = 0.7, 2.0


@dataclass(slots=True)
class CycleMeter:
    """No clock: the time is an argument, in seconds."""

    _factors: dict[int, tuple[float, float]] = field(default_factory=dict)
    """By count of micro-batches: measured over predicted, and when."""
    _began_s: float | None = None
    _micro_batches: int = 0
    _reference: int = 0
    """How many decoded when the present factors began."""
    _tokens: int = 0
    _predicted_s: list[float] = field(default_factory=list)
    _decoding: list[int] = field(default_factory=list)

    def on_tokens(self, count: int) -> None:
        """Decode steps came back with so many tokens."""
        self._tokens += count

    def on_plan(self, micro_batches: int, predicted_s: float, decoding: int, now_s: float) -> None:
        """This count is in use from now on; a cycle is predicted to take `predicted_s`, without any correction."""
        if not self._reference / _ANOTHER_DEMAND < decoding < self._reference * _ANOTHER_DEMAND:
            self._factors.clear()  # what was shown for another demand says nothing
            self._reference = decoding
            self._began_s = None
        if micro_batches != self._micro_batches or self._began_s is None:
            self._restart(micro_batches, now_s)
        self._predicted_s.append(predicted_s)
        self._decoding.append(decoding)
        elapsed_s = now_s - (self._began_s or now_s)
        if elapsed_s < _WINDOW_S:
            return
        if self._tokens:
            measured_s = sum(self._decoding) / len(self._decoding) * elapsed_s / self._tokens
            factor = measured_s / (sum(self._predicted_s) / len(self._predicted_s))
            before = self.factor(micro_batches, now_s)
            known = before + _GAIN * (min(max(factor, _LEAST), _MOST) - before)
            self._factors[micro_batches] = (known, now_s)
        self._restart(micro_batches, now_s)

    def factor(self, micro_batches: int, now_s: float) -> float:
        """What to multiply a prediction with."""
        known = self._factors.get(micro_batches)
        if known is None:
            present = self._factors.get(self._micro_batches)
            return 1.0 if present is None else 1.0 + _COMMON * (present[0] - 1.0)
        factor, at_s = known
        return 1.0 + (factor - 1.0) * exp(min(at_s - now_s, 0.0) / _FORGET_S)

    def _restart(self, micro_batches: int, now_s: float) -> None:
        self._began_s = now_s
        self._micro_batches = micro_batches
        self._tokens = 0
        self._predicted_s.clear()
        self._decoding.clear()
