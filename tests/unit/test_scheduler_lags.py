"""How late heartbeats come, and what follows."""

from __future__ import annotations

import pytest

from molink_scheduler.instructions import TakeEpoch
from molink_scheduler.lags import MOST_EXTRA_S, Lag
from tests.scheduler_builders import Driver, beats_of, make_heartbeat, running_driver

CLOCKS_APART_S = 5000.0


def heard_on_time(lag: Lag, from_s: float, until_s: float) -> None:
    now_s = from_s
    while now_s < until_s:
        lag.heard(now_s - CLOCKS_APART_S - 0.02, now_s)
        now_s += 0.5


def queued(lag: Lag, at_s: float, late_s: float) -> None:
    """What was sent in `late_s` before that moment comes at once."""
    for number in range(int(late_s / 0.5), -1, -1):
        lag.heard(at_s - CLOCKS_APART_S - 0.5 * number, at_s)


def test_one_occasion_is_none_and_the_second_counts_for_a_while() -> None:
    lag = Lag()
    heard_on_time(lag, 0, 20)
    assert lag.extra_s(20) == 0
    queued(lag, 22, 2.0)
    heard_on_time(lag, 22.5, 30)
    assert lag.extra_s(30) == 0
    queued(lag, 33, 3.0)
    assert lag.extra_s(33) == pytest.approx(1.5 * 2.0, abs=0.1)
    heard_on_time(lag, 33.5, 145)
    assert lag.extra_s(145) == 0


def test_a_frozen_worker_is_not_late() -> None:
    lag = Lag()
    for number in range(4):
        heard_on_time(lag, number * 20, number * 20 + 10)  # and then nothing was sent for ten seconds
    assert lag.extra_s(80) == 0


def test_another_process_and_another_machine_begin_anew() -> None:
    lag = Lag()
    heard_on_time(lag, 0, 10)
    for number, clock_s in enumerate((3.0, 90_000.0, -70_000.0)):
        for beat in range(20):
            lag.heard(clock_s + 0.5 * beat, 20 + 10 * number + 0.5 * beat)
    assert lag.extra_s(50) == 0


def test_however_late_there_is_an_end() -> None:
    lag = Lag()
    heard_on_time(lag, 0, 10)
    queued(lag, 40, 29)
    heard_on_time(lag, 41, 45)
    queued(lag, 80, 34)
    assert lag.extra_s(81) == MOST_EXTRA_S


def test_a_worker_behind_a_busy_link_is_given_longer() -> None:
    driver = running_driver("w3")
    w1, w2 = beats_of(1, "w1", "w2")
    w3 = make_heartbeat("w3")

    def beat_late(late_s: float) -> None:
        sent = w2.model_copy(update={"sent_s": driver.now_s - late_s})
        driver.beat(w1, w3, sent)

    def is_lost_after(seconds: float) -> bool:
        done = driver.wait(seconds, beats=(w1, w3), tick_s=0.25)
        return any(isinstance(one, TakeEpoch) for one in done)

    on_time = [(0.6, 0.0)] * 6
    for after_s, late_s in (*on_time, (1.7, 1.1), *on_time, (1.7, 1.1), *on_time):
        driver.now_s += after_s
        beat_late(late_s)
    assert not is_lost_after(2.25), "others would be, after 1.75 s"
    assert is_lost_after(2.0)


def test_without_the_time_of_sending_nothing_changes() -> None:
    driver: Driver = running_driver("w3")
    w1, _ = beats_of(1, "w1", "w2")
    assert driver.wait(1.5, beats=(w1, make_heartbeat("w3")), tick_s=0.25) == []
    assert driver.wait(0.25, beats=(w1, make_heartbeat("w3")), tick_s=0.25) != []
