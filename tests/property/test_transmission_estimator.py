"""The link estimator against links that are known: noise, outliers, changes, another clock."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molink_stage_worker.transmission import LinkEstimator


def deliver(
    estimator: LinkEstimator,
    *,
    rate: float,
    way_s: float,
    seconds: float,
    gap_s: float = 0.0,
    size: int = 32768,
    noise: float = 0.0,
    outliers: float = 0.0,
    drift: float = 0.0,
    from_s: float = 0.0,
    seed: int = 0,
    has_more: bool = True,
) -> None:
    """Frames one after the other; with `gap_s` the link is idle between them. Three are under way at any time."""
    dice = random.Random(seed)
    free_s, last_s, now_s = from_s, 0.0, from_s
    departures: list[float] = []
    while free_s < from_s + seconds:
        sent_s = max(from_s, departures[-3] if len(departures) >= 3 and not gap_s else free_s + gap_s)
        free_s = max(free_s, sent_s) + size / rate
        departures.append(free_s)
        arrived_s = max(last_s, free_s + way_s * (1 + noise * dice.random()))
        last_s = arrived_s
        received_s = arrived_s * (1 + drift) + 777 + (dice.uniform(1, 5) if dice.random() < outliers else 0.0)
        now_s = max(now_s, arrived_s + way_s * (1 + noise * dice.random()))
        estimator.on_delivery(
            size_bytes=size, sent_s=sent_s, received_us=round(received_s * 1e6), now_s=now_s, has_more=has_more
        )


@settings(max_examples=40, deadline=None)
@given(
    rate=st.floats(5e5, 1.2e8),
    way_s=st.floats(0.0005, 0.06),
    drift=st.sampled_from([0.0, 1e-4, -1e-4]),
    seed=st.integers(0, 1 << 16),
)
def test_a_busy_link_is_measured_through_noise(rate: float, way_s: float, drift: float, seed: int) -> None:
    estimator = LinkEstimator()
    deliver(estimator, rate=rate, way_s=way_s, seconds=min(4.0, 6e8 / rate), noise=0.2, drift=drift, seed=seed)
    assert estimator.rate_bytes_per_s == pytest.approx(rate, rel=0.15)
    assert estimator.round_trip_s == pytest.approx(2 * way_s + 32768 / rate, rel=0.25)


@pytest.mark.parametrize("seed", range(5))
def test_single_outliers_of_seconds_change_little(seed: int) -> None:
    estimator = LinkEstimator()
    deliver(estimator, rate=12.5e6, way_s=0.015, seconds=4, noise=0.2, outliers=0.005, seed=seed)
    assert estimator.rate_bytes_per_s == pytest.approx(12.5e6, rel=0.25)
    assert estimator.round_trip_s == pytest.approx(0.033, rel=0.1)


def test_a_thin_stream_only_raises_the_estimate() -> None:
    estimator = LinkEstimator()
    deliver(estimator, rate=12.5e6, way_s=0.015, seconds=1)
    deliver(estimator, rate=12.5e6, way_s=0.015, seconds=20, gap_s=0.030, size=4096, from_s=2.0)
    assert estimator.rate_bytes_per_s == pytest.approx(12.5e6, rel=0.05)
    deliver(estimator, rate=125e6, way_s=0.015, seconds=2, gap_s=0.0005, size=32768, from_s=30.0)
    rate = estimator.rate_bytes_per_s
    assert rate is not None
    assert rate > 30e6


@pytest.mark.parametrize(("before", "after"), [(12.5e6, 1.25e6), (1.25e6, 12.5e6), (12.5e6, 9e6)])
def test_a_changed_link_is_noticed_within_seconds(before: float, after: float) -> None:
    estimator = LinkEstimator()
    deliver(estimator, rate=before, way_s=0.015, seconds=10)
    deliver(estimator, rate=after, way_s=0.015, seconds=3, from_s=10.2)
    assert estimator.rate_bytes_per_s == pytest.approx(after, rel=0.1)


def test_nothing_is_known_before_anything_arrived() -> None:
    estimator = LinkEstimator()
    assert estimator.rate_bytes_per_s is None
    assert estimator.round_trip_s is None


def test_a_nonsensical_time_of_arrival_is_got_over() -> None:
    estimator = LinkEstimator()
    deliver(estimator, rate=12.5e6, way_s=0.015, seconds=2)
    estimator.on_delivery(size_bytes=9, sent_s=2.1, received_us=(1 << 64) - 1, now_s=2.2, has_more=True)
    deliver(estimator, rate=1.25e6, way_s=0.015, seconds=3, from_s=2.3)
    assert estimator.rate_bytes_per_s == pytest.approx(1.25e6, rel=0.1)


def test_another_receivers_clock_does_not_matter_after_forgetting() -> None:
    estimator = LinkEstimator()
    deliver(estimator, rate=12.5e6, way_s=0.015, seconds=2)
    estimator.forget_clock()
    deliver(estimator, rate=12.5e6, way_s=0.015, seconds=2, from_s=-1000.0)
    assert estimator.rate_bytes_per_s == pytest.approx(12.5e6, rel=0.05)


def test_what_a_thin_stream_used_does_not_replace_what_the_link_was_seen_to_carry() -> None:
    estimator = LinkEstimator()
    deliver(estimator, rate=1e6, way_s=0.015, seconds=2, has_more=False)
    assert estimator.is_app_limited
    deliver(estimator, rate=12.5e6, way_s=0.015, seconds=2, from_s=10)
    assert not estimator.is_app_limited
    deliver(estimator, rate=1e6, way_s=0.015, seconds=2, from_s=20, has_more=False)
    assert estimator.rate_bytes_per_s == pytest.approx(12.5e6, rel=0.05)
    deliver(estimator, rate=1e6, way_s=0.015, seconds=2, from_s=60, has_more=False)
    assert estimator.is_app_limited, "half a minute later it may be another link"
    assert estimator.rate_bytes_per_s == pytest.approx(1e6, rel=0.05)


def test_a_sender_paced_by_a_wrong_rate_finds_out() -> None:
    estimator = LinkEstimator()
    deliver(estimator, rate=0.35e6, way_s=0.05, seconds=3)
    assert estimator.rate_bytes_per_s == pytest.approx(0.35e6, rel=0.1)
    # the link is faster now, but bulk goes on as if it were not: 4 KiB each 24 ms, in between decode frames of 11 KB
    sends = sorted(
        [(5.0 + 0.024 * piece, 4096, True) for piece in range(125)]
        + [(5.001 + 0.063 * frame, 11_000, False) for frame in range(48)]
    )
    for sent_s, size_bytes, has_more in sends:
        arrives_s = sent_s + 0.05 + size_bytes / 12e6
        estimator.on_delivery(
            size_bytes=size_bytes, sent_s=sent_s, received_us=int(arrives_s * 1e6), now_s=arrives_s + 0.05,
            has_more=has_more,
        )  # fmt: skip
    assert not estimator.is_app_limited
    assert estimator.rate_bytes_per_s is not None
    assert estimator.rate_bytes_per_s > 1.5e6
