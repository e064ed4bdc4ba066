"""Being the active scheduler: a term begins when nobody holds the lease, and lasts as long as it is renewed.

    standby ─ the lease is free ─▶ active ─ a newer term has begun ─▶ standby
                                     │  stopped in order: the lease is given back, and the next one is active at once

Two things keep a scheduler that was frozen, and has been replaced, from doing harm when it wakes. The store refuses
what it writes, since every write names its term. And it does nothing else before it has asked the store again: by its
own clock, its last renewal is too old to be sure of.

While the store does not answer, an active scheduler goes on. It alone may know what the store will need to be told.
Where it alone is cut off from the store, another one takes over: it hears so on the bus, and stands by.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from molink_common.logs import get_logger
from molink_scheduler.instructions import Write
from molink_scheduler.records import Snapshot
from molink_scheduler.store import LeaseLost, Store, StoreForgetful, StoreUnavailable, Term

log = get_logger("scheduler.lease")

LEASE_EXPIRY_S = 1.5
RENEWAL_S = 0.4
_SURE_S = 1.2
"""How long after a renewal was asked for nobody else can be active yet, with room for slow clocks."""
_ANSWER_S = 0.4
"""How long a renewal may take."""
_LOOK_S = 0.1
"""How often a standby looks: two keys, one round trip."""
_PATIENCE_S = 3.0
"""How long a standby leaves a store that has forgotten everything to the one who was active: it can tell it all."""


async def wait_for_term(
    store: Store, owner: str, stop: asyncio.Event, *, connect_timeout_s: float, above: int = 0
) -> Term | None:
    """Stand by until nobody is active. None: stopped before.

    `above` is the newest term known of: a store that knows of none has lost its memory.

    Raises:
        StoreUnavailable: the store has not answered for `connect_timeout_s`.
    """
    loop = asyncio.get_running_loop()
    answered_s = remembered_s = loop.time()
    is_told = False
    while not stop.is_set():
        try:
            state = await store.lease_state()
            answered_s = loop.time()
            if state.newest_term >= above:
                above, remembered_s = state.newest_term, answered_s
            if not state.is_held and (state.newest_term >= above or answered_s - remembered_s >= _PATIENCE_S):
                term = await store.take_lease(owner, expiry_s=LEASE_EXPIRY_S, above=above)
                if term is not None:
                    return term
            elif not is_told:
                is_told = True
                log.info("another scheduler is active; standing by")
        except StoreUnavailable as error:
            if loop.time() - answered_s >= connect_timeout_s:
                raise StoreUnavailable(
                    f"no Redis answers within {connect_timeout_s:g} s ({error}). Start one, or set --redis-url."
                ) from error
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_S):
                await stop.wait()
    return None


class Tenure:
    """One scheduler's time as the active one, and its way to the store meanwhile. Begins sure."""

    def __init__(self, store: Store, term: Term) -> None:
        self._store = store
        self._term = term
        self._loop = asyncio.get_running_loop()
        self._asked_s = self._loop.time()
        """When the last renewal that came to an end had been asked for."""
        self._asked = asyncio.Event()
        self._hurry = asyncio.Event()

    @property
    def term(self) -> Term:
        """The term: another one after the store has forgotten everything."""
        return self._term

    @property
    def is_sure(self) -> bool:
        """Whether this is the active scheduler beyond doubt. Not so after a freeze: then the store must be asked."""
        is_sure = self._loop.time() - self._asked_s < _SURE_S
        if not is_sure:
            self._hurry.set()
        return is_sure

    async def sure(self) -> None:
        """Wait until it is; `keep` ends instead if it no longer is the active one."""
        while not self.is_sure:
            self._asked.clear()
            await self._asked.wait()

    async def keep(self, forgotten: Callable[[], None]) -> None:
        """Renew until cancelled. `forgotten` is called when the store must be told everything again.

        Raises:
            LeaseLost: another scheduler is active.
        """
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEWAL_S):
                    await self._hurry.wait()
            self._hurry.clear()
            asked_s = self._loop.time()
            # nobody else can take the lease from a store that does not answer; the writer says that it does not
            with contextlib.suppress(StoreUnavailable, TimeoutError):
                async with asyncio.timeout(_ANSWER_S):
                    await self._renew(forgotten)
            self._asked_s = asked_s
            self._asked.set()

    async def _renew(self, forgotten: Callable[[], None]) -> None:
        try:
            await self._store.renew_lease(self._term, expiry_s=LEASE_EXPIRY_S)
        except StoreForgetful:
            owner, number = self._term.owner, self._term.number
            term = await self._store.take_lease(owner, expiry_s=LEASE_EXPIRY_S, above=number)
            if term is None:
                raise LeaseLost("the store has lost its memory, and another scheduler was faster") from None
            log.warning("the store has lost its memory; writing everything again", term=term.number)
            self._term = term
            forgotten()

    async def release(self) -> None:
        """Let a standby take over at once. A store that does not answer lets it a moment later."""
        with contextlib.suppress(StoreUnavailable):
            await self._store.release_lease(self._term)

    # --- the store, in this term ---

    async def load(self) -> Snapshot:
        """See `Store.load`."""
        return await self._store.load(term=self._term)

    async def write(self, writes: Sequence[Write]) -> None:
        """See `Store.write`."""
        try:
            await self._store.write(writes, term=self._term)
        except StoreForgetful:
            self._hurry.set()
            raise

    async def next_epoch(self, above: int) -> int:
        """See `Store.next_epoch`."""
        try:
            return await self._store.next_epoch(above, term=self._term)
        except StoreForgetful:
            self._hurry.set()
            raise
