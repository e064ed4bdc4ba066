"""Writing behind the decisions: merged, in order, and again until it is in."""

from __future__ import annotations

import asyncio

import pytest

from molink_scheduler.events import Event, SequenceSaved, StoreChanged
from molink_scheduler.instructions import AppendTokens, DeleteSequence, SaveSequence, SaveWorker, Write
from molink_scheduler.lease import Tenure
from molink_scheduler.memory_store import MemoryStore
from molink_scheduler.records import SequenceRecord
from molink_scheduler.store import LeaseLost
from molink_scheduler.writer import PendingWrites, WriteBehind
from tests.scheduler_builders import make_heartbeat, make_request

S1, S2 = "00000000000000a1", "00000000000000a2"


async def tenure_of(store: MemoryStore) -> Tenure:
    term = await store.take_lease("a", expiry_s=10, above=0)
    assert term is not None
    return Tenure(store, term)


def record_of(sequence: str) -> SequenceRecord:
    return SequenceRecord(request=make_request(sequence), fingerprint="f")


def merged(*writes: Write) -> list[Write]:
    pending = PendingWrites()
    for write in writes:
        pending.add(write)
    taken = pending.take()
    assert not pending
    return taken


def test_tokens_of_a_sequence_become_one_write() -> None:
    assert merged(AppendTokens(S1, 3, (1,)), AppendTokens(S2, 0, (7,)), AppendTokens(S1, 4, (2, 3))) == [
        AppendTokens(S1, 3, (1, 2, 3)),
        AppendTokens(S2, 0, (7,)),
    ]
    assert merged(AppendTokens(S1, 3, (1, 2)), AppendTokens(S1, 0, (9, 8, 7, 6, 5))) == [
        AppendTokens(S1, 0, (9, 8, 7, 6, 5))
    ]
    assert merged(AppendTokens(S1, 0, (1, 2, 3)), AppendTokens(S1, 1, (4,))) == [AppendTokens(S1, 0, (1, 4))]


def test_a_deletion_stands_for_all_that_came_before_it() -> None:
    assert merged(SaveSequence(record_of(S1)), AppendTokens(S1, 0, (1,)), DeleteSequence(S1)) == [DeleteSequence(S1)]
    assert merged(DeleteSequence(S1), SaveSequence(record_of(S1))) == [DeleteSequence(S1), SaveSequence(record_of(S1))]


def test_the_newest_heartbeat_is_enough() -> None:
    newest = make_heartbeat("w", problem="x")
    assert merged(SaveWorker(make_heartbeat("w")), SaveWorker(newest)) == [SaveWorker(newest)]


def test_a_batch_is_bounded_and_nothing_is_lost() -> None:
    pending = PendingWrites()
    for number in range(3000):
        pending.add(DeleteSequence(f"{number:016x}"))
    sizes = []
    while pending:
        sizes.append(len(pending.take()))
    assert sizes == [1024, 1024, 952]


async def test_an_outage_is_reported_and_everything_is_written_after_it() -> None:
    store, events, saved = MemoryStore(), list[Event](), asyncio.Event()

    def report(event: Event) -> None:
        events.append(event)
        if isinstance(event, SequenceSaved):
            saved.set()
        if event == StoreChanged(False):
            store.is_down = False

    active = await tenure_of(store)
    store.is_down = True
    writer = WriteBehind(active, report)
    writer.put(SaveSequence(record_of(S1)))
    task = asyncio.create_task(writer.run())
    async with asyncio.timeout(5):
        await saved.wait()
    writer.put(AppendTokens(S1, 0, (4, 5)))
    task.cancel()
    await asyncio.wait([task])
    await writer.drain(timeout_s=1)
    assert events == [StoreChanged(False), StoreChanged(True), SequenceSaved(S1)]
    (stored,) = (await active.load()).sequences
    assert stored.tokens == (4, 5)


async def test_draining_into_a_store_that_is_down_ends() -> None:
    store = MemoryStore()
    writer = WriteBehind(await tenure_of(store), lambda _: None)
    store.is_down = True
    writer.put(DeleteSequence(S1))
    async with asyncio.timeout(5):
        await writer.drain(timeout_s=1)


async def test_the_tokens_of_a_step_are_one_round_trip() -> None:
    store = MemoryStore()
    writer = WriteBehind(await tenure_of(store), lambda _: None)
    before = store.round_trips
    for number in range(200):
        writer.put(AppendTokens(f"{number:016x}", 0, (number,)))
    await writer.drain(timeout_s=1)
    assert store.round_trips - before == 1


async def test_nothing_is_tried_again_in_a_term_that_is_over() -> None:
    store, events = MemoryStore(), list[Event]()
    writer = WriteBehind(await tenure_of(store), events.append)
    await tenure_of(store)
    writer.put(SaveSequence(record_of(S1)))
    with pytest.raises(LeaseLost):
        async with asyncio.timeout(5):
            await writer.run()
    await writer.drain(timeout_s=1)
    assert events == []
