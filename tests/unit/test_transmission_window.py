"""The window where a loop's clock does not move between a piece and its acknowledgement."""

from __future__ import annotations

from molink_stage_worker.transmission.link_estimator import LeastDelay
from molink_stage_worker.transmission.under_way import InFlight
from molink_stage_worker.transmission.values import SenderSettings
from molink_stage_worker.transmission.window import AdaptiveWindow


def test_a_way_round_that_seems_to_take_no_time_is_no_fault() -> None:
    settings = SenderSettings()
    window = AdaptiveWindow(settings)
    at_once = LeastDelay(seconds=0.0, size_bytes=1, rate_bytes_per_s=None)

    def acknowledge(round_trip_s: float, now_s: float) -> None:
        piece = InFlight(1, 1, 16384, now_s - round_trip_s, window.size_bytes, 1)
        window.on_full()
        window.on_ack(
            piece=piece, now_s=now_s, base=at_once, rate_bytes_per_s=None, is_rate_certain=False, delivered_bytes=0
        )

    for index in range(20):  # a queue stands: slow start ends
        acknowledge(0.2, 1.0 + 0.01 * index)
    assert not window.in_slow_start
    for index in range(20):
        acknowledge(0.0, 2.0 + 0.1 * index)
    assert window.size_bytes > 0
