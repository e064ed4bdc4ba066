"""How long what is sent to a link now takes to get through: by the measured rate, put right by what comes back.

Both classes count, each by its bytes. An acknowledgement shows how long its message really took. What the *least* of
the latest messages took longer than foreseen is somebody else's queue, or a rate that was taken for too high; what it
took less is a link that is faster than it was taken for. The queue is moved by that, once a round. Noise only makes
messages later, so the least is the one to go by (as in CoDel, RFC 8289).

A link is taken for faster than it was measured as long as nothing shows that it is not: at the beginning, until a
queue shows (as TCP's slow start, with HyStart's end, RFC 9406), where bulk met none in round after round though there
was more to send, and where the rate is only what a sender without more to send used.

Bulk that never pauses hides the way without a queue. Where that has not been seen for ten seconds, the queue counts
as longer once, so that the link runs dry for a moment (as BBR's ProbeRTT does).
"""

from __future__ import annotations

from dataclasses import dataclass

from molink_stage_worker.transmission.under_way import InFlight

_ROUND_S = 0.050
_LEAST_MESSAGES, _LONGEST_ROUND_S = 6, 0.150
"""With fewer messages a round is longer, up to this: the least of few is noise."""
_IDLE_ROUNDS = 6
"""So many in a row are no coincidence."""
_PROBING_PACE, _GUESS_PACE = 2.0, 4.0
"""Times the measured rate; the second where it is only what was used."""
_NOISE_GAIN = 0.25
_NOISE_IN_LEAST = 0.4
"""Of the noise: so much later is the least of a round, though nothing stands."""
_WAY_NOISE, _MOST_WAY_NOISE_S = 1 / 8, 0.016
"""On long ways so much of the way, at most, is no queue (RFC 9406, 4.2)."""
_MOST_LATER_S = 0.25
"""More in one round is a receiver that did not look."""
_WAY_AGE_S = 10.0
_WAY_TOLERANCE = 0.02
_WAY_TOLERANCE_S = 0.0005


@dataclass(slots=True)
class _Round:
    """What the messages of bulk showed since `began_s`."""

    began_s: float
    messages: int = 0
    least_error_s: float = float("inf")
    least_delay_s: float = float("inf")
    had_more: bool = True
    """All the time something waited to be sent behind them."""

    def is_over(self, now_s: float) -> bool:
        return now_s - self.began_s >= (_ROUND_S if self.messages >= _LEAST_MESSAGES else _LONGEST_ROUND_S)


class LinkQueue:
    """What stands on one link now. `target_s`: how long a queue bulk may keep there."""

    def __init__(self, target_s: float) -> None:
        self._target_s = target_s
        self._moved_s = 0.0
        """By all rounds so far. Never begun anew: messages sent before a restart may still be acknowledged."""
        self.restart()

    def restart(self) -> None:
        """As at the beginning: what was known does not hold."""
        self.standing_delay_s: float | None = None
        """The least queue that bulk lately met, as measured."""
        self.noise_s = 0.0
        """What messages take longer, in the middle, than the quickest of the same while, and for no reason known."""
        self._clear_at_s = float("-inf")
        self._is_probing = self._is_guess = True
        self._idle_rounds = 0
        """In a row, in which something met no queue though there was more to send."""
        self._way_seen_s: float | None = None
        self._errors_s: list[float] = []
        self._round: _Round | None = None

    @property
    def pace(self) -> float:
        """What the link is taken for, times the measured rate."""
        return _GUESS_PACE if self._is_guess else _PROBING_PACE if self._is_probing else 1.0

    def wait_s(self, now_s: float) -> float:
        """How long a message that is sent now waits before its first byte leaves."""
        return max(0.0, self._clear_at_s - now_s)

    def on_send(self, size_bytes: int, rate_bytes_per_s: float, now_s: float) -> float:
        """A message goes. When it will be through, seconds from now; for `on_ack`, free of what moved so far."""
        self._clear_at_s = max(self._clear_at_s, now_s) + size_bytes / (rate_bytes_per_s * self.pace)
        return self._clear_at_s - now_s - self._moved_s

    def on_ack(
        self, message: InFlight, *, way_s: float, rate_bytes_per_s: float, is_guess: bool, is_bulk: bool, now_s: float
    ) -> None:
        """A message came through.

        `way_s`: there and back, without a queue. `is_guess`: the rate is only what was used.
        """
        self._is_guess = is_guess
        through_s = now_s - message.sent_s - way_s
        delay_s = through_s - message.size_bytes / rate_bytes_per_s
        if self._way_seen_s is None or delay_s <= way_s * _WAY_TOLERANCE + _WAY_TOLERANCE_S:
            self._way_seen_s = now_s
        if message.foreseen_s is None:  # no rate was known then
            return
        error_s = through_s - message.foreseen_s - self._moved_s
        self._learn_noise(error_s)
        if not is_bulk:  # where a link shares itself out evenly, decode does not wait for bulk
            return
        round_ = self._round
        if round_ is None:
            round_ = self._round = _Round(now_s)
        round_.messages += 1
        round_.had_more &= message.has_more
        round_.least_error_s = min(round_.least_error_s, error_s)
        round_.least_delay_s = min(round_.least_delay_s, delay_s)
        if round_.is_over(now_s):
            self._end_round(round_, way_s, now_s)
            self._round = None

    def _learn_noise(self, error_s: float) -> None:
        self._errors_s.append(error_s)
        if len(self._errors_s) == _LEAST_MESSAGES:
            spread_s = sum(self._errors_s) / _LEAST_MESSAGES - min(self._errors_s)
            self.noise_s += _NOISE_GAIN * (spread_s - self.noise_s)
            self._errors_s.clear()

    def _end_round(self, round_: _Round, way_s: float, now_s: float) -> None:
        self.standing_delay_s = max(0.0, round_.least_delay_s)
        noise_s = max(self.noise_s, min(way_s * _WAY_NOISE, _MOST_WAY_NOISE_S))
        error_s = min(round_.least_error_s, _MOST_LATER_S)
        if error_s > 0:
            error_s = max(0.0, error_s - _NOISE_IN_LEAST * self.noise_s)
        is_late = error_s > max(self._target_s / 2, noise_s) or round_.least_delay_s > self._target_s + noise_s
        if is_late:
            self._is_probing, self._idle_rounds = False, 0
        elif round_.had_more:
            self._idle_rounds = self._idle_rounds + 1 if round_.least_delay_s < self._target_s / 6 else 0
            self._is_probing = self._is_probing or self._idle_rounds >= _IDLE_ROUNDS
        self._move(error_s, now_s)
        self._moved_s += error_s
        if self._way_seen_s is not None and now_s - self._way_seen_s > _WAY_AGE_S:
            self._way_seen_s = now_s
            self._move(2 * self._target_s, now_s)

    def _move(self, by_s: float, now_s: float) -> None:
        self._clear_at_s = max(self._clear_at_s, now_s) + by_s
