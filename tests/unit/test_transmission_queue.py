"""The model of what stands on a link, message by message."""

from __future__ import annotations

import pytest

from molink_stage_worker.transmission.link_queue import LinkQueue
from molink_stage_worker.transmission.under_way import InFlight

RATE = 1e6
WAY_S = 0.030
PIECE = 4000


def ack(queue: LinkQueue, *, sent_s: float, foreseen_s: float, took_s: float) -> None:
    """A piece of bulk was acknowledged, so long after it was sent."""
    piece = InFlight(1, 1, PIECE, sent_s, has_more=True, foreseen_s=foreseen_s, number=1)
    now_s = sent_s + took_s
    queue.on_ack(piece, way_s=WAY_S, rate_bytes_per_s=RATE, is_guess=False, is_bulk=True, now_s=now_s)


def send_for_a_while(queue: LinkQueue, from_s: float, seconds: float, *, later_s: float) -> None:
    """A piece every 10 ms; each takes so much longer than its bytes and the way."""
    for index in range(round(seconds / 0.010)):
        sent_s = from_s + 0.010 * index
        foreseen_s = queue.on_send(PIECE, RATE, sent_s)
        ack(queue, sent_s=sent_s, foreseen_s=foreseen_s, took_s=WAY_S + PIECE / RATE + later_s)


def settled_queue() -> LinkQueue:
    """It has seen that the link is as fast as measured, and the way without a queue."""
    queue = LinkQueue(0.006)
    send_for_a_while(queue, 0.0, 0.5, later_s=0.030)
    send_for_a_while(queue, 0.6, 0.2, later_s=0.0)
    assert queue.pace == 1.0
    return queue


def test_what_was_sent_waits_for_what_was_sent_before() -> None:
    queue = settled_queue()
    assert queue.wait_s(5.0) == 0.0
    first_s, second_s = queue.on_send(10_000, RATE, 5.0), queue.on_send(10_000, RATE, 5.0)
    assert second_s - first_s == pytest.approx(0.010)
    assert queue.wait_s(5.0) == pytest.approx(0.020)
    assert queue.wait_s(5.012) == pytest.approx(0.008)
    assert queue.wait_s(5.1) == 0.0


def test_a_queue_that_others_make_counts_and_one_that_is_gone_does_not() -> None:
    queue = settled_queue()
    send_for_a_while(queue, 5.0, 0.2, later_s=0.040)
    assert queue.standing_delay_s == pytest.approx(0.040, abs=0.001)
    assert queue.wait_s(5.2) > 0.015
    send_for_a_while(queue, 6.0, 0.3, later_s=0.0)
    assert queue.standing_delay_s == pytest.approx(0.0, abs=0.001)
    assert queue.wait_s(6.3) <= 0.006


def test_a_link_is_taken_for_faster_until_a_queue_shows_and_again_when_everything_comes_early() -> None:
    queue = LinkQueue(0.006)
    send_for_a_while(queue, 0.0, 0.5, later_s=0.0)
    assert queue.pace > 1.0
    send_for_a_while(queue, 0.5, 0.5, later_s=0.040)
    assert queue.pace == 1.0
    for index in range(60):  # two pieces at once, and the second does not wait for the first
        sent_s = 5.0 + 0.010 * index
        for _ in range(2):
            foreseen_s = queue.on_send(2 * PIECE, RATE, sent_s)
            ack(queue, sent_s=sent_s, foreseen_s=foreseen_s, took_s=WAY_S + 0.001)
    assert queue.pace > 1.0


def test_bulk_that_never_pauses_lets_the_link_run_dry_after_ten_seconds() -> None:
    queue = settled_queue()
    longest_s = 0.0
    for index in range(1200):
        sent_s = 5.0 + 0.010 * index
        foreseen_s = queue.on_send(PIECE, RATE, sent_s)
        ack(queue, sent_s=sent_s, foreseen_s=foreseen_s, took_s=WAY_S + PIECE / RATE + 0.005)
        longest_s = max(longest_s, queue.wait_s(sent_s + WAY_S + 0.009))
    assert longest_s >= 0.010


def test_a_way_round_that_seems_to_take_no_time_is_no_fault() -> None:
    queue = LinkQueue(0.006)
    for index in range(40):
        foreseen_s = queue.on_send(PIECE, RATE, 0.1 * index)
        ack(queue, sent_s=0.1 * index, foreseen_s=foreseen_s, took_s=0.0)
    assert queue.wait_s(4.0) == 0.0


def test_what_was_sent_before_a_restart_is_still_understood() -> None:
    queue = settled_queue()
    send_for_a_while(queue, 5.0, 0.5, later_s=0.040)
    foreseen_s = [queue.on_send(PIECE, RATE, sent_s) for sent_s in (7.0, 7.2)]
    queue.restart()
    for sent_s, one_s in zip((7.0, 7.2), foreseen_s, strict=True):
        ack(queue, sent_s=sent_s, foreseen_s=one_s, took_s=WAY_S + PIECE / RATE + 0.040)
    assert queue.wait_s(7.28) > 0.020, "they were late, and are seen to be"
