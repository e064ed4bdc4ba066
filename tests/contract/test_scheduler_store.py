"""The same cases against the store in memory and against a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from molink.embedded import EmbeddedServer, free_port
from molink_common.messages import ApiKey, Dtype, KeyLimits, hash_of_secret
from molink_scheduler.instructions import (
    AppendTokens,
    DeleteKey,
    DeleteSequence,
    SaveKey,
    SavePipeline,
    SaveSequence,
    SaveUsage,
    SaveWorker,
    Write,
)
from molink_scheduler.lease import Tenure
from molink_scheduler.memory_store import MemoryStore
from molink_scheduler.records import KeyUsage, PipelineRecord, SequenceRecord, Snapshot, StageRecord, StoredSequence
from molink_scheduler.store import LeaseLost, LeaseState, Store, StoreForgetful, StoreUnavailable, Term, open_store
from tests.scheduler_builders import make_card, make_heartbeat, make_request

S1, S2 = "00000000000000a1", "00000000000000a2"


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest, redis_server: EmbeddedServer) -> AsyncIterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
        return
    client = Redis.from_url(redis_server.url)
    await client.flushdb()
    await client.aclose()
    async with open_store(redis_server.url) as opened:
        yield opened


@pytest.fixture
async def active(store: Store) -> Tenure:
    """The store as the active scheduler has it."""
    return await tenure_of(store)


async def tenure_of(store: Store) -> Tenure:
    term = await store.take_lease("a", expiry_s=10, above=0)
    assert term is not None
    return Tenure(store, term)


def record_of(sequence: str) -> SequenceRecord:
    request = make_request(sequence)
    options = request.options.model_copy(update={"logit_bias": {5: -1.5}, "stop_token_ids": (7,)})
    return SequenceRecord(request=request.model_copy(update={"options": options}), fingerprint="f", started_epoch=3)


def layout_of(epoch: int) -> PipelineRecord:
    return PipelineRecord(
        pipeline=1,
        epoch=epoch,
        card=make_card(),
        dtype=Dtype.BFLOAT16,
        num_blocks=10,
        block_size=16,
        stages=(StageRecord(worker="w1", first_layer=0, last_layer=4),),
    )


def key_of(name: str, **changes: int) -> ApiKey:
    limits = KeyLimits(requests_per_minute=3, tokens_per_day=10**9)
    return ApiKey(
        id=f"key-{name}", name=name, secret_sha256=hash_of_secret(name), created_s=5, limits=limits
    ).model_copy(update=changes)


async def test_an_empty_store_is_an_empty_snapshot(active: Tenure) -> None:
    assert await active.load() == Snapshot()


async def test_what_was_written_is_loaded(active: Tenure) -> None:
    await active.write(
        [
            SaveSequence(record_of(S2)),
            SaveSequence(record_of(S1)),
            AppendTokens(S1, 0, (1, 2**32 - 1)),
            AppendTokens(S1, 2, (3,)),
            SavePipeline(layout_of(1)),
            SavePipeline(layout_of(2)),
            SaveWorker(make_heartbeat("w1")),
        ]
    )
    assert await active.load() == Snapshot(
        pipelines=(layout_of(2),),
        sequences=(
            StoredSequence(record=record_of(S1), tokens=(1, 2**32 - 1, 3)),
            StoredSequence(record=record_of(S2), tokens=()),
        ),
        workers=(make_heartbeat("w1"),),
    )


async def test_writing_again_changes_nothing(active: Tenure) -> None:
    writes: list[Write] = [SaveSequence(record_of(S1)), AppendTokens(S1, 0, (1, 2)), AppendTokens(S1, 2, (3,))]
    await active.write(writes)
    await active.write(writes)
    assert (await active.load()).sequences == (StoredSequence(record=record_of(S1), tokens=(1, 2, 3)),)


async def test_a_deleted_sequence_leaves_nothing(active: Tenure) -> None:
    await active.write([SaveSequence(record_of(S1)), AppendTokens(S1, 0, (1,)), DeleteSequence(S1), DeleteSequence(S2)])
    assert await active.load() == Snapshot()
    await active.write([SaveSequence(record_of(S1))])
    assert (await active.load()).sequences == (StoredSequence(record=record_of(S1), tokens=()),)


async def test_keys_and_what_they_have_used_are_kept_and_forgotten_together(active: Tenure) -> None:
    used = [KeyUsage(key="key-a", day=1, tokens=5), KeyUsage(key="key-b", day=1, tokens=6)]
    await active.write([SaveKey(key_of("b")), SaveKey(key_of("a")), *(SaveUsage(one) for one in used)])
    assert await active.load() == Snapshot(keys=(key_of("a"), key_of("b")), usage=tuple(used))
    again = KeyUsage(key="key-b", day=2, tokens=1)
    await active.write([SaveKey(key_of("b", revoked_s=9)), SaveUsage(again), DeleteKey("key-a"), DeleteKey("key-c")])
    assert await active.load() == Snapshot(keys=(key_of("b", revoked_s=9),), usage=(again,))


async def test_epochs_only_rise(active: Tenure) -> None:
    drawn = [await active.next_epoch(above) for above in (0, 0, 7, 3)]
    assert drawn == [1, 2, 8, 9]
    assert (await active.load()).epoch == 9


async def test_one_holds_the_lease_and_terms_rise(store: Store) -> None:
    assert await store.lease_state() == LeaseState(is_held=False, newest_term=0)
    first = await store.take_lease("a", expiry_s=10, above=0)
    assert first == Term(1, "a")
    assert await store.take_lease("b", expiry_s=10, above=0) is None
    await store.renew_lease(first, expiry_s=10)
    assert await store.lease_state() == LeaseState(is_held=True, newest_term=1)
    await store.release_lease(Term(1, "b"))
    assert await store.take_lease("b", expiry_s=10, above=0) is None
    await store.release_lease(first)
    assert await store.lease_state() == LeaseState(is_held=False, newest_term=1)
    assert await store.take_lease("b", expiry_s=10, above=0) == Term(2, "b")
    await store.release_lease(first)
    assert (await store.lease_state()).is_held, "a term that is over gives nothing back"


async def test_a_lease_that_nobody_took_is_held_again(store: Store) -> None:
    active = await tenure_of(store)
    await store.release_lease(active.term)
    await store.renew_lease(active.term, expiry_s=10)
    assert await store.take_lease("b", expiry_s=10, above=0) is None


async def test_in_a_newer_term_nothing_of_the_old_one_gets_in(store: Store) -> None:
    old = await tenure_of(store)
    await old.write([SaveSequence(record_of(S1)), AppendTokens(S1, 0, (1,))])
    assert await old.next_epoch(0) == 1
    await store.release_lease(old.term)
    term = await store.take_lease("b", expiry_s=10, above=0)
    assert term is not None
    before = await store.load(term=term)
    for write in (
        SaveSequence(record_of(S2)), AppendTokens(S1, 1, (2,)), DeleteSequence(S1),
        SavePipeline(layout_of(1)), SaveWorker(make_heartbeat("w1")), SaveKey(key_of("a")), DeleteKey("key-a"),
        SaveUsage(KeyUsage(key="key-a", day=1, tokens=1)),
    ):  # fmt: skip
        with pytest.raises(LeaseLost):
            await old.write([write])
    with pytest.raises(LeaseLost):
        await old.next_epoch(10)
    with pytest.raises(LeaseLost):
        await store.renew_lease(old.term, expiry_s=10)
    assert await store.load(term=term) == before
    assert await store.next_epoch(0, term=term) == 2


async def test_the_same_scheduler_in_a_later_term_is_another(store: Store) -> None:
    old = await tenure_of(store)
    assert await store.take_lease("a", expiry_s=10, above=0) == Term(2, "a")
    with pytest.raises(LeaseLost):
        await old.write([SaveSequence(record_of(S1))])


async def test_a_store_that_knows_of_no_such_term_says_so_and_takes_nothing(store: Store) -> None:
    for later in (Term(4, "a"), Term(9, "a")):
        for refused in (
            store.write([SaveSequence(record_of(S1))], term=later),
            store.next_epoch(3, term=later),
            store.renew_lease(later, expiry_s=10),
        ):
            with pytest.raises(StoreForgetful):
                await refused
        assert await store.take_lease("b", expiry_s=10, above=0) in (Term(1, "b"), Term(2, "b"))
    assert await store.take_lease("b", expiry_s=10, above=9) == Term(10, "b")
    assert await store.load(term=Term(10, "b")) == Snapshot()


# --- Redis alone ---


async def test_every_key_is_documented_and_expires_as_it_should(redis_server: EmbeddedServer) -> None:
    client = Redis.from_url(redis_server.url)
    await client.flushdb()
    async with open_store(redis_server.url) as store:
        term = await store.take_lease("a", expiry_s=1.5, above=0)
        assert term is not None
        await store.next_epoch(0, term=term)
        await store.write(
            [
                SaveSequence(record_of(S1)),
                AppendTokens(S1, 0, (1,)),
                SavePipeline(layout_of(1)),
                SaveWorker(make_heartbeat("w1")),
                SaveKey(key_of("a")),
                SaveUsage(KeyUsage(key="key-a", day=1, tokens=5)),
            ],
            term=term,
        )
    expiry = {bytes(key).decode(): await client.ttl(key) for key in await client.keys("*")}  # type: ignore[arg-type]
    await client.aclose()
    assert expiry.pop("molink:v1:lease") in (1, 2)
    assert expiry.pop("molink:v1:worker:w1") in (14, 15)
    assert expiry.pop(f"molink:v1:sequence:{S1}") in (3599, 3600)
    assert expiry.pop(f"molink:v1:tokens:{S1}") in (3599, 3600)
    assert expiry == {
        "molink:v1:epoch": -1,
        "molink:v1:keys": -1,
        "molink:v1:pipeline:1": -1,
        "molink:v1:sequences": -1,
        "molink:v1:term": -1,
        "molink:v1:usage": -1,
    }


async def test_values_that_do_not_parse_are_left_out_and_cleaned_up(redis_server: EmbeddedServer) -> None:
    client = Redis.from_url(redis_server.url)
    await client.flushdb()
    await client.sadd("molink:v1:sequences", S1, S2)
    await client.set(f"molink:v1:sequence:{S1}", b'{"request": 1}')
    await client.set("molink:v1:pipeline:1", b"\xff")
    await client.set("molink:v1:worker:w", b"[]")
    await client.hset("molink:v1:keys", "k", b'{"id": "k"}')  # type: ignore[misc]
    async with open_store(redis_server.url) as store:
        assert await (await tenure_of(store)).load() == Snapshot()
    assert await client.keys("molink:v1:sequence*") == []
    await client.aclose()


async def test_no_server_is_an_error_within_seconds() -> None:
    async with open_store(f"redis://127.0.0.1:{free_port()}/0") as store:
        with pytest.raises(StoreUnavailable, match="Redis"):
            await store.load(term=Term(1, "a"))
    with pytest.raises(StoreUnavailable, match="--redis-url"):
        async with open_store("nonsense"):
            pass


async def test_a_thousand_sequences_come_back_in_order(redis_server: EmbeddedServer) -> None:
    client = Redis.from_url(redis_server.url)
    await client.flushdb()
    await client.aclose()
    names = [f"{number:016x}" for number in range(1001)]
    async with open_store(redis_server.url) as store:
        active = await tenure_of(store)
        await active.write([SaveSequence(record_of(name)) for name in names])
        await active.write([AppendTokens(name, 0, (number,)) for number, name in enumerate(names)])
        loaded = await active.load()
    assert [stored.record.request.sequence for stored in loaded.sequences] == names
    assert [stored.tokens for stored in loaded.sequences] == [(number,) for number in range(1001)]


async def test_a_script_that_the_server_has_forgotten_is_sent_again(redis_server: EmbeddedServer) -> None:
    client = Redis.from_url(redis_server.url)
    await client.flushdb()
    async with open_store(redis_server.url) as store:
        active = await tenure_of(store)
        await active.write([SaveSequence(record_of(S1))])
        await client.script_flush()
        await active.write([AppendTokens(S1, 0, (1,))])
        assert (await active.load()).sequences[0].tokens == (1,)
    await client.aclose()
