"""Following the scheduler's table of API keys: its state says when there is another one, which is then asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from molink_common import subjects
from molink_common.bus import Bus
from molink_common.errors import BusError, ProtocolError
from molink_common.logs import get_logger
from molink_common.messages import AskKeys, ClusterState, Keys

log = get_logger("gateway.keys")

_ANSWER_TIMEOUT_S = 2.0


class KeyTable:
    """Tells `on_keys` of each table. While the scheduler is away, the last one holds."""

    def __init__(self, bus: Bus, on_keys: Callable[[Keys], None]) -> None:
        self._bus = bus
        self._on_keys = on_keys
        self._wanted: str | None = None
        self._known: str | None = None
        self._changed = asyncio.Event()

    def hear_state(self, state: ClusterState) -> None:
        """The scheduler's word, once a second and at each change."""
        self._wanted = state.keys_revision
        if self._wanted != self._known:
            self._changed.set()

    async def follow(self) -> None:
        """Fetch each new table. Runs until cancelled; what fails is tried again at the scheduler's next word."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                keys = await self._fetch()
            except (BusError, ProtocolError) as error:
                log.warning("API keys not fetched", problem=str(error))
                continue
            self._known = keys.revision
            self._on_keys(keys)

    async def _fetch(self) -> Keys:
        if not self._wanted:  # the scheduler has none
            return Keys(revision="")
        return await self._bus.ask(subjects.KEYS, AskKeys(), Keys, timeout_s=_ANSWER_TIMEOUT_S)
