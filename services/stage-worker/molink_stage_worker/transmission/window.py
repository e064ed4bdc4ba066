"""How much of class bulk may be under way: enough to keep the link busy, not so much that a queue stands on it.

The window is adapted to the measured delay, as TCP Vegas and FAST TCP do (Wei, Jin, Low, Hegde, "FAST TCP:
Motivation, Architecture, Algorithms, Performance", 2006) and with a fixed target for the queue as in LEDBAT
(RFC 6817): once a round, the window moves towards ``under_way * (base + target) / (base + standing)``, where
`under_way` is what was on the link when the delay was met. The *standing* queue is the least delay of a while, as in
CoDel (RFC 8289): what other traffic puts on the link in bursts does not stand. Where the link is known to carry more
than it carries now, what is missing is added.

It begins as slow start does, and ends that once delay shows (HyStart, RFC 9406). The base delay is the least of the
last seconds. Bulk that never pauses hides it, so every ten seconds the window is halved for one round, until the
delay without a queue shows (as BBR's ProbeRTT).
"""

from __future__ import annotations

from dataclasses import dataclass

from molink_stage_worker.transmission.link_estimator import LeastDelay
from molink_stage_worker.transmission.under_way import InFlight
from molink_stage_worker.transmission.values import SenderSettings

_LEAST_ROUND_S = 0.050
_LEAST_WAY_S = 1e-6
_STANDING_S = 0.100
"""The standing queue is the least delay of so long, and of a round at least."""
_GAIN = 0.5
_SPARE_SHARE = 0.1
"""Of the rate: less than that unused is within the noise."""
_HIGH_SAMPLES = 8
"""So many high delays one after the other, for a quarter of a round trip, end slow start."""
_HIGH_SHARE, _MOST_HIGH_S = 1 / 8, 0.016
"""What is high: half the target, or on long ways this share of the way, if that is more (RFC 9406, 4.2)."""
_KNOWN_RATE_GROWTH = 3.0
"""Slow start below what the measured rate fills: four times a round instead of twice."""
_MOST_STANDING_S = 0.25
"""So much of a queue that decode makes is made up for, so that bulk keeps its share."""
_BASE_AGE_S = 10.0
_BASE_TOLERANCE = 1.02
_BASE_TOLERANCE_S = 0.0005


@dataclass(slots=True)
class _Round:
    """What was seen since the window was last changed."""

    began_s: float
    delivered_bytes: int
    least_delay_s: float = float("inf")
    under_way_bytes: int = 0
    """On the link when the piece with the least delay was sent."""


class AdaptiveWindow:
    """The window of one link. `size_bytes` is what may be under way."""

    def __init__(self, settings: SenderSettings) -> None:
        self._settings = settings
        self.standing_delay_s: float | None = None
        self._base_seen_s: float | None = None
        self.restart()

    def restart(self) -> None:
        """As at the beginning: what was known does not hold."""
        self._window = float(self._settings.start_window_bytes)
        self._in_slow_start = True
        self._is_draining = False
        self._high_samples = 0
        self._least_high_s = self._high_since_s = 0.0
        self._was_full = False
        self._round: _Round | None = None
        self._before: _Round | None = None

    @property
    def size_bytes(self) -> int:
        """What may be under way now."""
        return int(self._window / 2 if self._is_draining else self._window)

    @property
    def in_slow_start(self) -> bool:
        """Whether the window still looks for the link's size."""
        return self._in_slow_start

    def on_full(self) -> None:
        """Something waited for the window: only a window that is used may grow."""
        self._was_full = True

    def on_ack(
        self,
        *,
        piece: InFlight,
        now_s: float,
        base: LeastDelay,
        rate_bytes_per_s: float | None,
        is_rate_certain: bool,
        delivered_bytes: int,
    ) -> None:
        """A piece is acknowledged. `delivered_bytes` counts what the link has delivered, of both classes."""
        round_trip_s = now_s - piece.sent_s
        if self._base_seen_s is None or round_trip_s <= base.seconds * _BASE_TOLERANCE + _BASE_TOLERANCE_S:
            self._base_seen_s = now_s
        delay_s = round_trip_s - base.seconds
        if rate_bytes_per_s is not None:
            delay_s += base.transmission_s(rate_bytes_per_s) - piece.size_bytes / rate_bytes_per_s
        delay_s = max(0.0, delay_s)
        if self._in_slow_start:
            self._grow(piece.size_bytes, delay_s, now_s, base, rate_bytes_per_s, is_rate_certain)
        round_ = self._round
        if round_ is None:
            round_ = self._round = _Round(now_s, delivered_bytes)
        # after a pause the first pieces meet no queue: they say nothing about a full window
        if delay_s < round_.least_delay_s and piece.under_way_bytes >= self._window / 2:
            round_.least_delay_s, round_.under_way_bytes = delay_s, piece.under_way_bytes
        if piece.sent_s >= round_.began_s and now_s - round_.began_s >= _LEAST_ROUND_S:
            certain_rate = rate_bytes_per_s if is_rate_certain else None
            self._end_round(round_, now_s, base, certain_rate, delivered_bytes)
            self._before, self._round = round_, _Round(now_s, delivered_bytes)
        self._clamp(base, rate_bytes_per_s)

    def _grow(
        self,
        size_bytes: int,
        delay_s: float,
        now_s: float,
        base: LeastDelay,
        rate_bytes_per_s: float | None,
        is_rate_certain: bool,
    ) -> None:
        target_s = self._settings.decode_delay_s
        if delay_s <= max(target_s / 2, min(base.seconds * _HIGH_SHARE, _MOST_HIGH_S)):
            self._high_samples = 0
            if self._was_full:
                filled = 0.0 if rate_bytes_per_s is None else rate_bytes_per_s * base.seconds
                is_below = self._window < (filled if is_rate_certain else filled / 2)
                self._window += size_bytes * (_KNOWN_RATE_GROWTH if is_below else 1.0)
            return
        if self._high_samples == 0:
            self._high_since_s, self._least_high_s = now_s, delay_s
        self._high_samples += 1
        self._least_high_s = min(self._least_high_s, delay_s)
        if self._high_samples >= _HIGH_SAMPLES and now_s - self._high_since_s >= base.seconds / 4:
            self._in_slow_start = False
            self._high_samples = 0
            self._window *= min(1.0, (base.seconds + target_s) / (base.seconds + self._least_high_s))
            self._round = self._before = None

    def _end_round(
        self, round_: _Round, now_s: float, base: LeastDelay, rate_bytes_per_s: float | None, delivered_bytes: int
    ) -> None:
        was_full, self._was_full = self._was_full, False
        if self._is_draining:
            self._is_draining = False
            self._base_seen_s = now_s
            return
        least = round_
        round_s = now_s - round_.began_s
        before = self._before
        if before is not None and round_s < _STANDING_S and before.least_delay_s < round_.least_delay_s:
            least = before
        if least.least_delay_s == float("inf"):
            return
        self.standing_delay_s = standing_s = least.least_delay_s
        if self._in_slow_start:
            return
        target_s = self._settings.decode_delay_s
        # a loop's clock stands still while it works, so that a way round may seem to take no time
        ratio = (base.seconds + target_s) / max(base.seconds + standing_s, _LEAST_WAY_S)
        if was_full:
            wanted = least.under_way_bytes * max(0.5, min(2.0, ratio))
            if rate_bytes_per_s is not None and standing_s < target_s:
                spare = rate_bytes_per_s * (1 - _SPARE_SHARE) - (delivered_bytes - round_.delivered_bytes) / round_s
                wanted += max(0.0, spare) * base.seconds
            is_far = standing_s > 2 * target_s or (standing_s < target_s / 4 and wanted > self._window)
            gain = 1.0 if is_far else _GAIN
            self._window += gain * (wanted - self._window)
            if self._base_seen_s is not None and now_s - self._base_seen_s > _BASE_AGE_S:
                self._is_draining = True
        elif ratio < 1:
            self._window *= 1 + _GAIN * (max(0.5, ratio) - 1)

    def _clamp(self, base: LeastDelay, rate_bytes_per_s: float | None) -> None:
        settings = self._settings
        piece, least = settings.first_piece_bytes, 0.0
        if rate_bytes_per_s is not None:
            piece = piece_bytes(rate_bytes_per_s, settings)
            standing_s = min(self.standing_delay_s or 0.0, _MOST_STANDING_S)
            least = settings.bulk_share * rate_bytes_per_s * (base.seconds + standing_s)
        self._window = min(max(self._window, least, 2.0 * piece), settings.max_window_bytes)


def piece_bytes(rate_bytes_per_s: float | None, settings: SenderSettings) -> int:
    """A piece that takes half of the allowed delay, within bounds."""
    if rate_bytes_per_s is None:
        return settings.first_piece_bytes
    wanted = int(rate_bytes_per_s * settings.decode_delay_s / 2)
    return max(settings.min_piece_bytes, min(settings.max_piece_bytes, wanted))
