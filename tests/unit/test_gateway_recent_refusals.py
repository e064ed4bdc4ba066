"""How long a gateway repeats a refusal."""

from __future__ import annotations

import pytest

from molink_common.messages import RefusalCode, Refused
from molink_gateway.api_errors import ApiError
from molink_gateway.recent_refusals import RecentRefusals


def refused(holds_s: float | None) -> Refused:
    return Refused(
        sequence="0" * 16, code=RefusalCode.OVERLOADED, message="too late", retry_after_s=7.0, holds_s=holds_s
    )


def test_it_holds_for_its_tenant_and_for_its_time() -> None:
    recent = RecentRefusals()
    recent.remember("a", refused(0.25), 100.0)
    recent.check("b", 100.0)
    with pytest.raises(ApiError) as raised:
        recent.check("a", 100.2)
    assert (raised.value.status, raised.value.code, raised.value.retry_after_s) == (429, "overloaded", 7.0)
    recent.check("a", 100.25)
    recent.check("a", 100.2)


def test_one_that_does_not_hold_is_not_remembered() -> None:
    recent = RecentRefusals()
    recent.remember("a", refused(None), 100.0)
    recent.check("a", 100.0)


def test_many_tenants_take_no_more_memory_than_some() -> None:
    recent = RecentRefusals()
    for number in range(5000):
        recent.remember(f"t{number}", refused(10.0), 100.0)
    assert len(recent._held) <= 1024
    recent.remember("late", refused(10.0), 200.0)
    with pytest.raises(ApiError):
        recent.check("late", 201.0)
