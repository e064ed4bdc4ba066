"""How much of class bulk may be under way at most: a bound on what `link_queue` may get wrong.

What fills the way there and back, and twice the queue that is allowed: bulk is sent so that one such queue stands, and
the rest is what a rate that was taken for too high may cost before it shows. Where a longer queue stands all the same,
less, by as much as it is longer (as FAST TCP has it: Wei, Jin, Low, Hegde, "FAST TCP: Motivation, Architecture,
Algorithms, Performance", 2006). As long as no rate is known, the window grows with every acknowledgement, as in TCP's
slow start.
"""

from __future__ import annotations

from molink_stage_worker.transmission.link_queue import LinkQueue
from molink_stage_worker.transmission.values import KIB, SenderSettings

_LEAST_BYTES = 32 * KIB
_LEAST_WAY_S = 1e-6
"""A loop's clock stands still while it works, so that a way round may seem to take no time."""
_MOST_STANDING_S = 0.25
"""So much of a queue that decode makes is made up for, so that bulk keeps its share."""


class AdaptiveWindow:
    """The window of one link."""

    def __init__(self, settings: SenderSettings) -> None:
        self._settings = settings
        self.size_bytes = settings.start_window_bytes

    def restart(self) -> None:
        """As at the beginning: what was known does not hold."""
        self.size_bytes = self._settings.start_window_bytes

    def on_ack(self, size_bytes: int, way_s: float, rate_bytes_per_s: float | None, queue: LinkQueue) -> None:
        """So much of bulk was acknowledged. `way_s`: there and back, without a queue."""
        settings = self._settings
        if rate_bytes_per_s is None:
            wanted = self.size_bytes + size_bytes
        else:
            target_s, standing_s = settings.decode_delay_s, queue.standing_delay_s or 0.0
            fills = rate_bytes_per_s * queue.pace * (way_s + queue.noise_s + 2 * target_s)
            fits = min(1.0, (way_s + 2 * target_s) / max(way_s + standing_s, _LEAST_WAY_S))
            share = settings.bulk_share * rate_bytes_per_s * (way_s + min(standing_s, _MOST_STANDING_S))
            wanted = int(max(fills * fits, share, _LEAST_BYTES, 2 * piece_bytes(rate_bytes_per_s, settings)))
        self.size_bytes = min(wanted, settings.max_window_bytes)


def piece_bytes(rate_bytes_per_s: float | None, settings: SenderSettings) -> int:
    """A piece that takes half of the allowed delay, within bounds."""
    if rate_bytes_per_s is None:
        return settings.first_piece_bytes
    wanted = int(rate_bytes_per_s * settings.decode_delay_s / 2)
    return max(settings.min_piece_bytes, min(settings.max_piece_bytes, wanted))
