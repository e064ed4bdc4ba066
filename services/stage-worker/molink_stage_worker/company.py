"""How long a prompt's chunk should wait at a stage for a decode step to be computed along with.

A pass over the layers costs a small machine or a large model almost the same for a few tokens more. So where decode
steps come again and again, a chunk that waits for the next of them costs little, while one that is computed at once
makes the next decode step wait for its end.
"""

from __future__ import annotations

_GAIN = 0.2
_MISSED_BEATS = 2.0
_PATIENCE_BEATS = 1.5
_LONGEST_S = 0.15


class DecodeRhythm:
    """The mean time between decode steps at a stage. No clock: the time is an argument, in seconds."""

    def __init__(self) -> None:
        self._last_s: float | None = None
        self._beat_s: float | None = None

    def on_decode(self, now_s: float) -> None:
        """A decode step has come."""
        if self._last_s is not None:
            beat_s = min(now_s - self._last_s, _LONGEST_S)
            self._beat_s = beat_s if self._beat_s is None else self._beat_s + _GAIN * (beat_s - self._beat_s)
        self._last_s = now_s

    def patience_s(self, now_s: float) -> float:
        """How long to wait for the next one; 0: it is not to be expected any more."""
        if self._last_s is None or self._beat_s is None:
            return 0.0
        expected_for_s = self._last_s + _MISSED_BEATS * self._beat_s - now_s
        return max(min(expected_for_s, _PATIENCE_BEATS * self._beat_s, _LONGEST_S), 0.0)
