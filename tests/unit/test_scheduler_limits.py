"""What a key allows, in a time of the test's own."""

from __future__ import annotations

import pytest

from molink_common.messages import KeyLimits, RefusalCode
from molink_scheduler.limits import DAY_S, Account, Limited, why_limited

NOON_S = 20_000 * DAY_S + DAY_S / 2


def look(
    limits: KeyLimits,
    account: Account,
    *,
    now_s: float = 100.0,
    utc_s: float = NOON_S,
    num_running: int = 0,
    is_request: bool = True,
) -> Limited | None:
    return why_limited(limits, account, is_request=is_request, num_running=num_running, now_s=now_s, utc_s=utc_s)


def test_without_limits_there_is_no_end() -> None:
    account = Account()
    account.charge(10**9, 20_000)
    assert look(KeyLimits(), account, num_running=10**6) is None


@pytest.mark.parametrize("per_minute", [1, 3, 7, 60, 1000])
def test_a_minutes_requests_may_come_at_once_and_then_one_at_a_time(per_minute: int) -> None:
    limits, account, now_s = KeyLimits(requests_per_minute=per_minute), Account(), 1e6
    for _ in range(per_minute):
        assert look(limits, account, now_s=now_s) is None
        account.take_request(per_minute, now_s)
    for _ in range(2 * per_minute):
        limited = look(limits, account, now_s=now_s)
        assert limited is not None
        assert limited.code is RefusalCode.RATE_LIMITED
        assert limited.retry_after_s == pytest.approx(60 / per_minute)
        early_s = now_s + limited.retry_after_s * 0.99
        assert look(limits, account, now_s=early_s) is not None
        now_s += limited.retry_after_s
        assert look(limits, account, now_s=now_s) is None, "the time that was told is the time"
        account.take_request(per_minute, now_s)


def test_in_any_minute_no_more_than_twice_the_rate_and_in_the_long_run_the_rate() -> None:
    limits, account, taken_s = KeyLimits(requests_per_minute=10), Account(), []
    for tick in range(6000):
        now_s = tick * 0.1
        if look(limits, account, now_s=now_s) is None:
            account.take_request(10, now_s)
            taken_s.append(now_s)
    assert 108 <= len(taken_s) <= 110, "ten minutes, and the bucket that was full at the beginning"
    assert all(sum(start <= one < start + 60 for one in taken_s) <= 20 for start in range(540))


def test_further_answers_of_a_request_are_no_further_requests() -> None:
    limits, account = KeyLimits(requests_per_minute=1), Account()
    account.take_request(1, 100.0)
    assert look(limits, account) is not None
    assert look(limits, account, is_request=False) is None


def test_only_so_many_at_a_time() -> None:
    limits = KeyLimits(concurrent=2)
    assert look(limits, Account(), num_running=1) is None
    limited = look(limits, Account(), num_running=2, is_request=False)
    assert limited is not None
    assert limited.code is RefusalCode.RATE_LIMITED
    assert limited.retry_after_s == 1


def test_a_days_tokens_are_back_at_midnight_utc() -> None:
    limits, account = KeyLimits(tokens_per_day=100), Account()
    account.charge(99, 20_000)
    assert look(limits, account) is None, "what has begun may end"
    account.charge(30, 20_000)
    limited = look(limits, account, utc_s=NOON_S + 0.25)
    assert limited is not None
    assert (limited.code, limited.retry_after_s) == (RefusalCode.QUOTA, DAY_S / 2 - 0.25)
    assert look(limits, account, utc_s=NOON_S + 0.25 + limited.retry_after_s) is None
    account.charge(5, 20_001)
    assert (account.tokens_on(20_001), account.tokens_on(20_000)) == (5, 0)


def test_a_clock_that_is_put_back_forgets_nothing() -> None:
    account = Account()
    account.charge(7, 20_001)
    account.charge(3, 20_000)
    assert account.tokens_on(20_001) == 10
