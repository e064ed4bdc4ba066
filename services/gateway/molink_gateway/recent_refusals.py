"""Refusals that the scheduler has said will hold for a moment: nobody need read, tokenize and ask meanwhile.

So a flood far beyond the pool's capacity costs a gateway little more than reading the requests' first lines.
"""

from __future__ import annotations

from molink_common.messages import Refused
from molink_gateway.api_errors import busy

_MOST_TENANTS = 1024


class RecentRefusals:
    """No IO; the time is an argument, in seconds."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[float, Refused]] = {}
        """By tenant: until when, and what."""

    def remember(self, tenant: str, refused: Refused, now_s: float) -> None:
        """The scheduler has refused this tenant."""
        if not refused.holds_s:
            return
        if len(self._held) >= _MOST_TENANTS:
            self._held = {name: held for name, held in self._held.items() if held[0] > now_s}
        if len(self._held) < _MOST_TENANTS:
            self._held[tenant] = (now_s + refused.holds_s, refused)

    def check(self, tenant: str, now_s: float) -> None:
        """Let a request of this tenant pass.

        Raises:
            ApiError: 429, it would be refused.
        """
        held = self._held.get(tenant)
        if held is None:
            return
        until_s, refused = held
        if now_s >= until_s:
            del self._held[tenant]
            return
        raise busy(refused.message, code=refused.code.value, retry_after_s=refused.retry_after_s or 1.0)
