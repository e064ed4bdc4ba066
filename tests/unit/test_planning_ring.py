"""What the planner learns of the links from the way round."""

from __future__ import annotations

import random
from math import isfinite

import pytest

from molink_common.wire import Traffic
from molink_stage_worker.planning import StepObservation
from molink_stage_worker.planning.ring import Links, RingEstimator


def observe(payload_bytes: int, links_s: float) -> StepObservation:
    return StepObservation(
        traffic=Traffic.DECODE, tokens=8, sequences=8, context_tokens=400, decode_tokens=8,
        payload_bytes=payload_bytes, compute_s=(0.02, 0.03), waited_s=(0.001, 0.004), ring_s=0.055 + links_s,
    )  # fmt: skip


def learn(ring: RingEstimator, *, latency_s: float, s_per_byte: float, payloads: list[int], since_s: float) -> Links:
    dice = random.Random(4)
    for index in range(80):
        payload_bytes = payloads[index % len(payloads)]
        links_s = latency_s * dice.gauss(1.0, 0.1) + payload_bytes * s_per_byte
        ring.on_step(observe(payload_bytes, links_s), since_s + 0.1 * index, is_decode=True)
    links = ring.links()
    assert links is not None
    return links


def test_latency_and_the_part_that_grows_are_told_apart() -> None:
    links = learn(
        RingEstimator(links=1), latency_s=0.03, s_per_byte=8e-8, payloads=[65_536, 262_144, 524_288], since_s=0.0
    )
    assert links.latency_s == pytest.approx(0.03, rel=0.25)
    assert links.s_per_byte == pytest.approx(8e-8, rel=0.2)
    assert links.rate_bytes_per_s == pytest.approx(12.5e6, rel=0.2)


def test_the_own_links_rate_stands_for_all_until_payloads_differ() -> None:
    ring = RingEstimator(links=2)
    ring.on_link(12.5e6, None)
    links = learn(ring, latency_s=0.06, s_per_byte=16e-8, payloads=[131_072], since_s=0.0)
    assert links.s_per_byte == pytest.approx(16e-8)
    assert links.latency_s == pytest.approx(0.06, rel=0.2)


@pytest.mark.parametrize("rate_bytes_per_s", [5e-324, 2.3e-308, 1e-9])
def test_a_link_that_has_hardly_moved_a_byte_leaves_times_finite(rate_bytes_per_s: float) -> None:
    ring = RingEstimator(links=2)
    ring.on_link(rate_bytes_per_s, 0.0)
    links = ring.links()
    assert links is not None
    assert isfinite(links.time_s(10**9))
    assert links.rate_bytes_per_s is not None
    assert isfinite(10**9 / links.rate_bytes_per_s)


def test_where_nothing_tells_them_apart_no_other_payload_is_believed_to_pay() -> None:
    links = learn(RingEstimator(links=1), latency_s=0.06, s_per_byte=0.0, payloads=[100_000], since_s=0.0)
    assert links.s_per_byte is None
    assert links.time_s(50_000) == links.time_s(100_000)
    assert links.time_s(200_000) == pytest.approx(2 * links.time_s(100_000))


def test_a_change_is_followed_in_seconds() -> None:
    ring = RingEstimator(links=1)
    learn(ring, latency_s=0.03, s_per_byte=0.0, payloads=[1152], since_s=0.0)
    assert learn(ring, latency_s=0.1, s_per_byte=0.0, payloads=[1152], since_s=8.0).latency_s == pytest.approx(
        0.1, rel=0.2
    )
    assert learn(ring, latency_s=0.03, s_per_byte=0.0, payloads=[1152], since_s=16.0).latency_s == pytest.approx(
        0.03, rel=0.2
    )


def test_a_slope_learnt_while_the_link_changed_is_bounded_by_what_steps_take_now() -> None:
    """Large payloads were slow before, small ones are fast now, and from then on all are alike."""
    ring = RingEstimator(links=1)
    ring.on_link(125e6, None)
    for index in range(40):
        ring.on_step(observe(8192, 0.1), 0.1 * index, is_decode=True)
    links = learn(ring, latency_s=0.001, s_per_byte=8e-9, payloads=[4096], since_s=4.0)
    assert links.time_s(65_536) < 0.03


def test_queueing_on_a_full_link_is_not_taken_for_latency() -> None:
    ring = RingEstimator(links=1)
    ring.on_link(1.25e6, None)
    for index in range(20):
        ring.on_step(observe(12_500, 0.04), 0.1 * index, is_decode=True)
    for index in range(100):
        ring.on_step(observe(62_500, 0.08 + min(0.02 * index, 0.4)), 2.0 + 0.05 * index, is_decode=True)
    links = ring.links()
    assert links is not None
    assert links.latency_s < 0.045


def test_a_bulk_step_says_nothing_about_latency() -> None:
    ring = RingEstimator(links=1)
    for index in range(50):
        ring.on_step(observe(1152, 5.0), 0.1 * index, is_decode=False)
    assert ring.links() is None


def test_before_anybody_decodes_the_round_trip_of_the_own_link_stands_for_all() -> None:
    ring = RingEstimator(links=2)
    assert ring.links() is None
    ring.on_link(12.5e6, 0.1)
    links = ring.links()
    assert links is not None
    assert links.latency_s == pytest.approx(0.2)
    assert links.rate_bytes_per_s == 12.5e6
