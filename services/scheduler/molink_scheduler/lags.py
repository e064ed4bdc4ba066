"""How late a worker's heartbeats come over its link.

On a slow link a heartbeat waits behind activations, for seconds on 1 Mbit/s. It names the time at which it was sent, by
the worker's own clock: what comes late, and was sent on time, says that the link is busy and not that the worker is
frozen. Once that has happened again, the worker is given so much longer before it counts as lost; otherwise each loss
that is none would bring the very traffic that makes the next one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

_LATE_S = 0.5
_SAME_TIME_S = 3.0
"""Late heartbeats this close to each other are one occasion."""
_REMEMBERED_S = 120.0
_MOST_REMEMBERED = 8
_DRIFT = 0.001
"""Of two clocks, with much room; a link that has become longer is believed as slowly."""
_OTHER_CLOCK_S = 60.0
_LENIENCE = 1.5
MOST_EXTRA_S = 8.0


@dataclass(slots=True)
class Lag:
    """Of one worker. No clock: times are arguments, in seconds."""

    _least_s: float | None = None
    """Of the differences between the two clocks, as heartbeats show it: one that met no queue."""
    _heard_s: float = 0.0
    _sent_s: float = 0.0
    _occasions: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_MOST_REMEMBERED))
    """When heartbeats came late, and how late at most."""

    def heard(self, sent_s: float, now_s: float) -> None:
        """A heartbeat came."""
        difference_s = now_s - sent_s
        least_s = self._least_s
        if least_s is None or sent_s < self._sent_s or abs(difference_s - least_s) > _OTHER_CLOCK_S:
            least_s = difference_s  # another process, maybe on another machine
        else:
            least_s = min(difference_s, least_s + _DRIFT * (now_s - self._heard_s))
        self._least_s, self._heard_s, self._sent_s = least_s, now_s, sent_s
        late_s = difference_s - least_s
        if late_s < _LATE_S:
            return
        if self._occasions and now_s - self._occasions[-1][0] < _SAME_TIME_S:
            late_s = max(late_s, self._occasions.pop()[1])
        self._occasions.append((now_s, late_s))

    def extra_s(self, now_s: float) -> float:
        """How much longer than others the worker may be silent."""
        late = sorted((late_s for at_s, late_s in self._occasions if now_s - at_s < _REMEMBERED_S), reverse=True)
        return min(_LENIENCE * late[1], MOST_EXTRA_S) if len(late) > 1 else 0.0
