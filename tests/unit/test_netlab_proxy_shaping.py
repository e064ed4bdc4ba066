"""When bytes arrive that go through the proxy: decisions, with a clock made of numbers."""

from __future__ import annotations

import pytest

from bench.netlab.proxy import Transmitter, transmitter


def link(**changes: float) -> Transmitter:
    return Transmitter(**{"rate_bytes_per_s": 1000.0, "delay_s": 0.5, "queue_bytes": 300, **changes})  # type: ignore[arg-type]


def test_bytes_arrive_when_they_have_been_sent_and_have_travelled() -> None:
    assert link().take(100, now_s=10.0) == pytest.approx(10.0 + 0.1 + 0.5)


def test_bytes_wait_for_those_before_them() -> None:
    one = link()
    assert [one.take(100, now_s=10.0) for _ in range(3)] == pytest.approx([10.6, 10.7, 10.8])


def test_an_idle_link_saves_nothing_up() -> None:
    one = link()
    one.take(100, now_s=0.0)
    assert one.take(100, now_s=50.0) == pytest.approx(50.6)


def test_a_late_shell_does_not_slow_the_link_down() -> None:
    one = link(queue_bytes=1000)
    arrivals = []
    now_s = 0.0
    for _ in range(1000):
        now_s += one.room_in_s(100, now_s=now_s) + 0.007  # each wake-up is seven milliseconds late
        arrivals.append(one.take(100, now_s=now_s))
    # 100 kB at 1 kB/s: late as it is, the shell loses nothing but its first pause
    assert arrivals[-1] == pytest.approx(100.0 + 0.5 + 0.007)


def test_a_full_queue_has_room_when_enough_has_been_sent() -> None:
    one = link()
    for _ in range(3):
        assert one.room_in_s(100, now_s=0.0) == 0.0
        one.take(100, now_s=0.0)
    assert one.room_in_s(100, now_s=0.0) == pytest.approx(0.1)
    assert one.room_in_s(100, now_s=0.1) == pytest.approx(0.0)
    assert one.room_in_s(5000, now_s=0.0) == pytest.approx(0.3)


def test_what_is_taken_never_exceeds_the_queue() -> None:
    one = link()
    now_s = taken = 0.0
    for size in (300, 20, 250, 1, 299, 300, 7):
        now_s += one.room_in_s(size, now_s=now_s)
        one.take(size, now_s=now_s)
        taken += size
        sent = taken - (one.free_at_s - now_s) * 1000.0
        assert taken - sent <= 300 + 1e-6


def test_an_unlimited_link_only_delays() -> None:
    one = link(rate_bytes_per_s=None)  # type: ignore[arg-type]
    assert [one.take(10**9, now_s=1.0) for _ in range(2)] == [1.5, 1.5]
    assert one.room_in_s(10**9, now_s=1.0) == 0.0


def test_the_queue_and_the_chunks_follow_the_rate() -> None:
    one = transmitter(rate_bit_per_s=100e6, round_trip_s=0.03)
    assert (one.rate_bytes_per_s, one.delay_s, one.queue_bytes) == (12.5e6, 0.015, 1_250_000)
    assert one.chunk_bytes == 12_500
    assert transmitter(rate_bit_per_s=1e6, round_trip_s=0.4).queue_bytes == 50_000
    assert transmitter(rate_bit_per_s=1e6, round_trip_s=0.0).chunk_bytes == 1448
    assert transmitter(rate_bit_per_s=1e10, round_trip_s=0.0).chunk_bytes == 65_536
