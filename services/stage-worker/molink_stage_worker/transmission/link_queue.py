"""How long what was sent to a link takes to get through: by the measured rate, put right by what comes back.

Both classes count, each by its bytes. An acknowledgement shows how long its message really took. What the *least* of
the latest messages took longer than foreseen is somebody else's queue or a rate that was taken for too high, and what
it took less is a link that is faster than it was taken for: the queue is moved by that. Noise only makes messages
later, so the least is the one to go by (as in CoDel, RFC 8289).

It begins with the link taken for faster than it was measured, until a queue shows (as TCP's slow start does: HyStart,
RFC 9406).

Bulk that never pauses hides the way without a queue. Where that has not been seen for ten seconds, the queue counts
as longer once, so that the link runs dry for a moment (as BBR's ProbeRTT does).
"""

from __future__ import annotations

from molink_stage_worker.transmission.under_way import InFlight

_ROUND_S = 0.050
_MESSAGES, _LONGEST_ROUND_S = 6, 0.150
"""With fewer messages a round is longer, up to this: the least of few is noise."""
_ROUNDS_ALIKE = 4
"""So many rounds in a row that found the link faster, or slower, than it was taken for are no coincidence."""
_PROBING_PACE = 2.0
_GAIN = 0.25
_NOISE_SHARE, _MOST_NOISE_S = 1 / 8, 0.016
"""On long ways so much of the way, at most, is no queue (RFC 9406, 4.2)."""
_MOST_LATER_S = 0.25
"""More in one round is a receiver that did not look, not a queue."""
_WAY_AGE_S = 10.0
_WAY_TOLERANCE = 0.02
_WAY_TOLERANCE_S = 0.0005


class LinkQueue:
    """What stands on one link now."""

    def __init__(self, target_s: float) -> None:
        self.standing_delay_s: float | None = None
        """The least queue that messages lately met, as measured."""
        self.pace = _PROBING_PACE
        """What the link is taken for, times the measured rate."""
        self.noise_s = 0.0
        """What messages lately took longer, in the middle, than the quickest of the same while."""
        self._target_s = target_s
        self._clear_at_s = float("-inf")
        self._moved_s = 0.0
        self._rounds_alike = 0
        self._way_seen_s: float | None = None
        self._round_began_s: float | None = None
        self._least_error_s = self._least_delay_s = float("inf")
        self._varied: list[float] = []
        self._messages = 0

    @property
    def shows_slower_link(self) -> bool:
        """Whether messages came later than foreseen, round after round."""
        return self._rounds_alike >= _ROUNDS_ALIKE

    def wait_s(self, now_s: float) -> float:
        """How long a message that is sent now waits before its first byte leaves."""
        return max(0.0, self._clear_at_s - now_s)

    def on_send(self, size_bytes: int, rate_bytes_per_s: float, now_s: float) -> float:
        """A message goes. When it will be through, seconds from now; for `on_ack`, free of what moved so far."""
        self._clear_at_s = max(self._clear_at_s, now_s) + size_bytes / (rate_bytes_per_s * self.pace)
        return self._clear_at_s - now_s - self._moved_s

    def on_ack(self, message: InFlight, way_s: float, rate_bytes_per_s: float, now_s: float) -> None:
        """It was acknowledged. `way_s`: there and back, without a queue."""
        through_s = now_s - message.sent_s - way_s
        delay_s = through_s - message.size_bytes / rate_bytes_per_s
        if self._way_seen_s is None or delay_s <= way_s * _WAY_TOLERANCE + _WAY_TOLERANCE_S:
            self._way_seen_s = now_s
        if message.foreseen_s is None:  # the rate was not known yet
            return
        self.on_other_ack(message, way_s, now_s)
        error_s = self._error_s(message, way_s, now_s)
        self._least_error_s = min(self._least_error_s, error_s)
        self._messages += 1
        self._least_delay_s = min(self._least_delay_s, delay_s)
        if self._round_began_s is None:
            self._round_began_s = now_s
        elif now_s - self._round_began_s >= (_ROUND_S if self._messages >= _MESSAGES else _LONGEST_ROUND_S):
            self._end_round(way_s, now_s)

    def on_other_ack(self, message: InFlight, way_s: float, now_s: float) -> None:
        """As `on_ack`, of a message that says nothing about what bulk meets: only how much ways vary."""
        if message.foreseen_s is None:
            return
        error_s = self._error_s(message, way_s, now_s)
        self._varied.append(error_s)
        if len(self._varied) == _MESSAGES:
            self.noise_s += _GAIN * (sum(self._varied) / _MESSAGES - min(self._varied) - self.noise_s)
            self._varied.clear()

    def _error_s(self, message, way_s, now_s):
        return now_s - message.sent_s - way_s - message.foreseen_s - self._moved_s

    def restart(self) -> None:
        """As at the beginning: what was known does not hold."""
        self.__init__(self._target_s)

    def _end_round(self, way_s: float, now_s: float) -> None:
        error_s = min(self._least_error_s, _MOST_LATER_S)
        noise_s = max(self.noise_s, min(way_s * _NOISE_SHARE, _MOST_NOISE_S))
        if error_s > max(self._target_s / 2, noise_s):
            self._rounds_alike = max(self._rounds_alike, 0) + 1
        elif error_s < -self._target_s / 4:
            self._rounds_alike = min(self._rounds_alike, 0) - 1
        else:
            self._rounds_alike = 0
        if self._rounds_alike > 0 or self._least_delay_s > self._target_s + noise_s:
            self.pace = 1.0
        elif self._rounds_alike <= -_ROUNDS_ALIKE:
            self.pace = _PROBING_PACE
        self._clear_at_s = max(self._clear_at_s, now_s) + error_s
        self._moved_s += error_s
        self.standing_delay_s = max(0.0, self._least_delay_s)
        self._round_began_s, self._least_error_s, self._least_delay_s = now_s, float("inf"), float("inf")
        self._messages = 0
        if self._way_seen_s is not None and now_s - self._way_seen_s > _WAY_AGE_S:
            self._way_seen_s = now_s
            self._clear_at_s = max(self._clear_at_s, now_s) + 2 * self._target_s
