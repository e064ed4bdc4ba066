"""When to ask the scheduler for tokens that may have been lost on their way. Pure.

A hole that stays is asked for soon. A silence may be a long queue, a long computation, or a lost last token: it is
asked about, but seldom. Both less and less often.
"""

from __future__ import annotations

HOLE_S = 1.0
SILENCE_S = 10.0
_SLOWER = 2.0


class Questions:
    """The times of the questions about one request."""

    def __init__(self, now_s: float, *, hole_s: float = HOLE_S, silence_s: float = SILENCE_S) -> None:
        self._hole_s = hole_s
        self._silence_s = silence_s
        self._wait_s = silence_s
        self._since_s = now_s
        self._has_hole = False

    @property
    def due_s(self) -> float:
        """When the next one is to be asked."""
        return self._since_s + self._wait_s

    def heard(self, now_s: float) -> None:
        """Tokens came in their turn."""
        if not self._has_hole:
            self._since_s, self._wait_s = now_s, self._silence_s

    def holes(self, now_s: float, *, has_hole: bool) -> None:
        """A hole came up, or the last one was filled."""
        if has_hole != self._has_hole:
            self._has_hole = has_hole
            self._since_s, self._wait_s = now_s, self._hole_s if has_hole else self._silence_s

    def asked(self, now_s: float) -> None:
        """One was asked."""
        self._since_s = now_s
        self._wait_s *= _SLOWER
