"""The links as the head sees them: what a step's way round took beyond computing and waiting.

    ring − Σ over stages (compute + waited) = latency + payload × seconds a byte + queueing

Queueing on a link is no property of the link, and more micro-batches would only lengthen it; so the latency is a low
quantile of the recent steps' remainders, and it does not rise while the link is busy enough to explain the rise.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import exp

from molink_stage_worker.planning.observation import StepObservation

_RECENT_STEPS = 48
_RECENT_S = 8.0
_LEAST_STEPS = 6
_QUANTILE = 0.25
_SPREAD = 1.5
_SLOPE_GAIN = 0.1
_BUSY = 0.65
_BUSY_OVER_S = 1.0
_LEAST_RATE_BYTES_PER_S = 1.0
"""A slower link is believed to be this fast: a share of a byte in a second is no rate, and its inverse overflows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """All links of a pipeline together, and the tokens' way back, at one moment."""

    latency_s: float
    s_per_byte: float | None
    """None: unknown, because no link was measured and all payloads were alike."""
    seen_bytes: float
    """The payload that `latency_s` was measured with, where `s_per_byte` is unknown."""
    rate_bytes_per_s: float | None
    """Of the slowest link."""

    def time_s(self, payload_bytes: float) -> float:
        """What a step of this payload spends on the links, without queueing.

        Where the part that grows is unknown, no change is believed to pay: a smaller payload gains nothing, a
        larger one takes longer in proportion.
        """
        if self.s_per_byte is not None:
            return self.latency_s + payload_bytes * self.s_per_byte
        return self.latency_s * max(payload_bytes / max(self.seen_bytes, 1.0), 1.0)


NO_LINKS = Links(latency_s=0.0, s_per_byte=0.0, seen_bytes=0.0, rate_bytes_per_s=None)
"""Of a pipeline with one stage."""


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
        self._round_trip_s = round_trip_s
        self._rate_bytes_per_s = max(rate_bytes_per_s, _LEAST_RATE_BYTES_PER_S) if rate_bytes_per_s else None

    def on_step(self, step: StepObservation, now_s: float, *, is_decode: bool) -> None:
        """A step came back. Only decode steps tell the latency: bulk frames wait for their window."""
        if self._last_s is not None and now_s > self._last_s:
            self._bytes *= exp((self._last_s - now_s) / _BUSY_OVER_S)
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

    def links(self) -> Links | None:
        """What is known now. None: too little."""
        latency_s = self._latency_s
        if latency_s is None and self._round_trip_s is not None:
            latency_s = self._links * self._round_trip_s  # nobody has decoded yet: as if all links were like the head's
        if latency_s is None:
            return None
        return Links(
            latency_s=latency_s,
            s_per_byte=self._s_per_byte(),
            seen_bytes=self._mean_bytes(),
            rate_bytes_per_s=self._rate(),
        )

    def _mean_bytes(self) -> float:
        return sum(one.payload_bytes for one in self._recent) / len(self._recent) if self._recent else 0.0

    def _s_per_byte(self) -> float | None:
        """Measured, or else as if all links were like the head's own; as far as the recent remainders allow that.

        A slope measured while the links changed may be anything, and payloads that are all alike never mend it.
        """
        own_s = None if self._rate_bytes_per_s is None else 1.0 / self._rate_bytes_per_s
        if self._slope_s is not None:
            believed_s = max(self._slope_s, own_s or 0.0)
        elif own_s is not None:
            believed_s = self._links * own_s
        else:
            return None
        mean_bytes = self._mean_bytes()
        if mean_bytes <= 0:
            return believed_s
        return min(believed_s, _low([one.links_s for one in self._recent]) / mean_bytes)

    def _rate(self) -> float | None:
        """Of the slowest link. Where only the sum over the links is known, they are taken for equal."""
        if self._rate_bytes_per_s is not None:
            return self._rate_bytes_per_s
        return self._links / self._slope_s if self._slope_s else None

    def _is_busy(self) -> bool:
        """Whether the recent payloads took most of the slowest link's time."""
        rate = self._rate()
        return rate is not None and self._bytes > _BUSY * rate * _BUSY_OVER_S

    def _learn_slope(self) -> None:
        """From the remainders of small and of large payloads, where the recent steps had both."""
        if self._is_busy():
            return  # the remainders are queueing
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
        known_s = self._s_per_byte()
        known_s = slope_s if known_s is None else known_s
        self._slope_s = known_s + _SLOPE_GAIN * (slope_s - known_s)

    def _learn_latency(self) -> None:
        if len(self._recent) < _LEAST_STEPS:
            return
        slope_s = self._s_per_byte() or 0.0
        latency_s = _low([max(one.links_s - slope_s * one.payload_bytes, 0.0) for one in self._recent])
        if self._latency_s is None or latency_s < self._latency_s or not self._is_busy():
            self._latency_s = latency_s


def _low(values: list[float]) -> float:
    return sorted(values)[int(_QUANTILE * (len(values) - 1))]
