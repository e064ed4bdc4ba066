"""Beginning a term, keeping it, losing it: against the store in memory, with short times."""

from __future__ import annotations

import asyncio

import pytest

from molink_scheduler import lease
from molink_scheduler.lease import Tenure, wait_for_term
from molink_scheduler.memory_store import MemoryStore
from molink_scheduler.store import LeaseLost, LeaseState, StoreForgetful, StoreUnavailable, Term


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RENEWAL_S": 0.01, "_LOOK_S": 0.005, "_PATIENCE_S": 0.1, "_ANSWER_S": 0.05}.items():
        monkeypatch.setattr(lease, name, value)


async def begin(store: MemoryStore, owner: str, **given: int) -> Term | None:
    async with asyncio.timeout(5):
        return await wait_for_term(store, owner, asyncio.Event(), connect_timeout_s=1, **given)


async def until_looked(store: MemoryStore) -> None:
    before = store.round_trips
    async with asyncio.timeout(5):
        while store.round_trips == before:  # noqa: ASYNC110  a store tells nobody
            await asyncio.sleep(0)


async def test_the_first_one_is_active_at_once_and_the_next_when_it_lets_go() -> None:
    store = MemoryStore()
    first = await begin(store, "a")
    assert first == Term(1, "a")
    waiting = asyncio.create_task(begin(store, "b"))
    await until_looked(store)
    assert not waiting.done()
    await Tenure(store, first).release()
    assert await waiting == Term(2, "b")


async def test_a_standby_that_is_stopped_ends() -> None:
    store, stop = MemoryStore(), asyncio.Event()
    await begin(store, "a")
    waiting = asyncio.create_task(wait_for_term(store, "b", stop, connect_timeout_s=1))
    stop.set()
    assert await asyncio.wait_for(waiting, 5) is None


async def test_a_store_that_never_answers_is_named() -> None:
    store = MemoryStore()
    store.is_down = True
    with pytest.raises(StoreUnavailable, match="--redis-url"):
        await wait_for_term(store, "a", asyncio.Event(), connect_timeout_s=0.02)


async def test_a_store_that_has_forgotten_is_left_to_the_active_one_for_a_while() -> None:
    store = MemoryStore()
    first = await begin(store, "a")
    assert first is not None
    waiting = asyncio.create_task(begin(store, "b"))
    await until_looked(store)
    store.forget()
    keeping = asyncio.create_task(Tenure(store, first).keep(lambda: None))
    async with asyncio.timeout(5):
        while (await store.lease_state()).newest_term == 0:  # noqa: ASYNC110  a store tells nobody
            await asyncio.sleep(0.001)
    assert await store.lease_state() == await held_in(store, 2)
    keeping.cancel()
    assert not waiting.done()
    waiting.cancel()


async def held_in(store: MemoryStore, term: int) -> LeaseState:
    """The lease as the first owner has it again."""
    assert await store.take_lease("b", expiry_s=1, above=0) is None
    return LeaseState(is_held=True, newest_term=term)


async def test_when_the_active_one_has_died_too_a_standby_begins_above_what_it_has_seen() -> None:
    assert await begin(MemoryStore(), "b", above=7) == Term(8, "b")


async def test_whoever_is_active_says_so_again_to_a_store_that_has_forgotten() -> None:
    store = MemoryStore()
    term = await begin(store, "a")
    assert term is not None
    tenure, told = Tenure(store, term), asyncio.Event()
    store.forget()
    with pytest.raises(StoreForgetful):
        await tenure.write([])
    with pytest.raises(StoreForgetful):
        await tenure.next_epoch(0)
    keeping = asyncio.create_task(tenure.keep(told.set))
    await asyncio.wait_for(told.wait(), 5)
    assert tenure.term == Term(2, "a")
    await tenure.write([])
    assert await tenure.next_epoch(5) == 6
    keeping.cancel()


async def test_a_term_that_is_over_ends_the_keeping() -> None:
    store = MemoryStore()
    term = await begin(store, "a")
    assert term is not None
    tenure = Tenure(store, term)
    store.expire_lease()
    await begin(store, "b")
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(tenure.keep(lambda: None), 5)


async def test_forgotten_and_then_taken_by_a_faster_one() -> None:
    store = MemoryStore()
    term = await begin(store, "a")
    assert term is not None
    store.forget()
    await begin(store, "b")
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(Tenure(store, term).keep(lambda: None), 5)


async def test_after_a_freeze_it_is_sure_only_when_the_store_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEWAL_S", 100.0)
    store = MemoryStore()
    term = await begin(store, "a")
    assert term is not None
    tenure = Tenure(store, term)
    assert tenure.is_sure
    monkeypatch.setattr(lease, "_SURE_S", 0.0)
    assert not tenure.is_sure
    monkeypatch.undo()
    tenure._asked_s -= 10
    keeping = asyncio.create_task(tenure.keep(lambda: pytest.fail("nothing was forgotten")))
    await asyncio.wait_for(tenure.sure(), 5)
    assert tenure.is_sure
    keeping.cancel()


async def test_while_the_store_is_away_the_active_one_goes_on() -> None:
    store = MemoryStore()
    term = await begin(store, "a")
    assert term is not None
    tenure = Tenure(store, term)
    store.is_down = True
    tenure._asked_s -= 10
    keeping = asyncio.create_task(tenure.keep(lambda: pytest.fail("nothing was forgotten")))
    await asyncio.wait_for(tenure.sure(), 5)
    await tenure.release()
    keeping.cancel()
