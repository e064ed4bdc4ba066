"""What a key allows: requests a minute, sequences at a time, tokens a day. Pure: time is an argument.

Requests go through a token bucket that holds a minute's worth: after a quiet minute all of them may come at once, and
then one after the other as it fills. Tokens are counted as they are made, so that what runs when a day's tokens are
used up still runs to its end.
"""

from __future__ import annotations

from dataclasses import dataclass

from molink_common.messages import KeyLimits, RefusalCode

DAY_S = 86400.0
_MINUTE_S = 60.0
_RETRY_CONCURRENT_S = 1.0
"""When one of its own sequences ends is nothing that a tenant can be told beforehand."""
_HOLDS_AT_MOST_S = 0.5
"""A gateway that answers by itself so long is hardly later than the scheduler would be."""
_ALMOST = 1e-9
"""A bucket that has filled for just as long as was said holds a request, whatever the rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limited:
    """Why a sequence may not come in now."""

    code: RefusalCode
    message: str
    retry_after_s: float
    holds_s: float | None = None
    """For so long nothing that the tenant does changes the answer."""


@dataclass(slots=True)
class Account:
    """What has been used of a key's limits."""

    requests_used: float = 0.0
    """Of the bucket, when it was last looked at."""
    looked_at_s: float = 0.0
    day: int = 0
    """To which `tokens` belong: days since 1970, UTC."""
    tokens: int = 0
    is_saved: bool = True
    """Whether the store has been told of `tokens`."""

    def tokens_on(self, day: int) -> int:
        """Prompt and generated tokens of a day."""
        return self.tokens if day == self.day else 0

    def charge(self, tokens: int, day: int) -> None:
        """Count tokens. A clock that is put back by less than a day loses none."""
        if day > self.day:
            self.day, self.tokens = day, 0
        self.tokens += tokens
        self.is_saved = False

    def requests_left(self, per_minute: int, now_s: float) -> float:
        """How many requests the bucket holds."""
        return per_minute - self._used(per_minute, now_s)

    def take_request(self, per_minute: int, now_s: float) -> None:
        """Count a request."""
        self.requests_used = self._used(per_minute, now_s) + 1
        self.looked_at_s = now_s

    def _used(self, per_minute: int, now_s: float) -> float:
        return max(0.0, self.requests_used - (now_s - self.looked_at_s) * per_minute / _MINUTE_S)


def why_limited(
    limits: KeyLimits, account: Account, *, is_request: bool, num_running: int, now_s: float, utc_s: float
) -> Limited | None:
    """Why a tenant's next sequence may not come in, or None.

    `is_request`: it is the first of its request, and so counts as one.
    """
    quota, day = limits.tokens_per_day, int(utc_s // DAY_S)
    if quota is not None and account.tokens_on(day) >= quota:
        until_midnight_s = DAY_S - utc_s % DAY_S
        return Limited(
            code=RefusalCode.QUOTA,
            message=f"this key's {quota} tokens of today are used up; the next ones come at midnight UTC",
            retry_after_s=until_midnight_s,
            holds_s=min(until_midnight_s, _HOLDS_AT_MOST_S),
        )
    if limits.concurrent is not None and num_running >= limits.concurrent:
        return Limited(
            code=RefusalCode.RATE_LIMITED,
            message=f"this key allows {limits.concurrent} answers at the same time, and has {num_running} under way",
            retry_after_s=_RETRY_CONCURRENT_S,
        )
    rate = limits.requests_per_minute
    if is_request and rate is not None:
        missing = 1 - account.requests_left(rate, now_s)
        if missing > _ALMOST:
            retry_after_s = missing * _MINUTE_S / rate
            return Limited(
                code=RefusalCode.RATE_LIMITED,
                message=f"this key allows {rate} requests a minute; the next one may come in {retry_after_s:.2f} s",
                retry_after_s=retry_after_s,
                holds_s=min(retry_after_s, _HOLDS_AT_MOST_S),
            )
    return None
