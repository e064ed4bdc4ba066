"""The links as the head sees them: what a step's way round took beyond computing and waiting.

    ring − Σ over stages (compute + waited) = latency + payload × seconds a byte + queueing

Queueing on a link is no property of the link, and more micro-batches would only lengthen it; so the latency is a low
quantile of the recent steps' remainders, and it does not rise while the link is busy enough to explain the rise.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from molink_stage_worker.planning.observation import StepObservation

_RECENT_STEPS = 48
_RECENT_S = 8.0
_LEAST_STEPS = 6
_QUANTILE = 0.25
_SPREAD = 1.5
_SLOPE_GAIN = 0.1
_BUSY = 0.7
_BUSY_OVER_S = 2.0


@dataclass(frozen=True, slots=True)
class _Remainder:
    at_s: float
    payload_bytes: int
    links_s: float


class RingEstimator:
    """Online. `links` of the pipeline lie between its stages; the tokens' way back to the head comes on top."""

    def __init__(self, links: int) -> None:
        self._links = links
        self._recent: deque[_Remainder] = deque(maxlen=_RECENT_STEPS)
        self._slope_s: float | None = None
        self._latency_s: float | None = None
        self._rate_bytes_per_s: float | None = None
        self._round_trip_s: float | None = None
        self._bytes = 0.0
        self._last_s: float | None = None

    def on_link(self, rate_bytes_per_s: float | None, round_trip_s: float | None) -> None:
        """What the sender of the head's own link has measured."""
        self._rate_bytes_per_s = rate_bytes_per_s if rate_bytes_per_s is None or rate_bytes_per_s > 0 else None
        self._round_trip_s = round_trip_s

    def on_step(self, step: StepObservation, now_s: float, *, is_decode: bool) -> None:
        """A step came back. Only decode steps tell the latency: bulk frames wait for their window."""
        if self._last_s is not None and now_s > self._last_s:
            self._bytes *= max(1.0 - (now_s - self._last_s) / _BUSY_OVER_S, 0.0)
        self._last_s = now_s if self._last_s is None else max(now_s, self._last_s)
        self._bytes += step.payload_bytes
        if not is_decode:
            return
        links_s = max(step.ring_s - sum(step.compute_s) - sum(step.waited_s), 0.0)
        self._recent.append(_Remainder(now_s, step.payload_bytes, links_s))
        while len(self._recent) > _LEAST_STEPS and now_s - self._recent[0].at_s > _RECENT_S:
            self._recent.popleft()
        self._learn_slope()
        self._learn_latency()

    @property
    def s_per_byte(self) -> float:
        """Of all links together; 0 while nothing is known."""
        if self._slope_s is not None:
            return self._slope_s
        return 0.0 if self._rate_bytes_per_s is None else 1.0 / self._rate_bytes_per_s

    @property
    def is_slope_known(self) -> bool:
        """Whether `s_per_byte` was measured at all."""
        return self._slope_s is not None or self._rate_bytes_per_s is not None

    @property
    def latency_s(self) -> float | None:
        """Of all links together and the way back. None: not known yet."""
        return self._latency_s if self._latency_s is not None else self._round_trip_s

    @property
    def rate_bytes_per_s(self) -> float | None:
        """Of the slowest link. Where only the sum over the links is known, they are taken for equal."""
        if self._rate_bytes_per_s is not None:
            return self._rate_bytes_per_s
        return self._links / self._slope_s if self._slope_s else None

    @property
    def busy(self) -> float:
        """The share of the slowest link's time that the recent payloads took."""
        rate = self.rate_bytes_per_s
        return 0.0 if rate is None else self._bytes / (rate * _BUSY_OVER_S)

    def _learn_slope(self) -> None:
        """From the remainders of small and of large payloads, where the recent steps had both."""
        by_size = sorted(self._recent, key=lambda remainder: remainder.payload_bytes)
        third = len(by_size) // 3
        if third < _LEAST_STEPS // 2:
            return
        small, large = by_size[:third], by_size[-third:]
        small_bytes = sum(remainder.payload_bytes for remainder in small) / third
        large_bytes = sum(remainder.payload_bytes for remainder in large) / third
        if large_bytes < _SPREAD * small_bytes or large_bytes <= 0:
            return
        small_s = _low([remainder.links_s for remainder in small])
        large_s = _low([remainder.links_s for remainder in large])
        slope_s = max(large_s - small_s, 0.0) / (large_bytes - small_bytes)
        known_s = self.s_per_byte if self.is_slope_known else slope_s
        self._slope_s = known_s + _SLOPE_GAIN * (slope_s - known_s)

    def _learn_latency(self) -> None:
        if len(self._recent) < _LEAST_STEPS:
            return
        slope_s = self.s_per_byte
        latency_s = _low([max(one.links_s - slope_s * one.payload_bytes, 0.0) for one in self._recent])
        if self._latency_s is None or latency_s < self._latency_s or self.busy < _BUSY:
            self._latency_s = latency_s


def _low(values: list[float]) -> float:
    return sorted(values)[int(_QUANTILE * (len(values) - 1))]
