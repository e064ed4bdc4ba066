"""The same cases against the store in memory and against a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from molink.embedded import EmbeddedServer, free_port
from molink_common.messages import Dtype
from molink_scheduler.instructions import AppendTokens, DeleteSequence, SavePipeline, SaveSequence, SaveWorker, Write
from molink_scheduler.memory_store import MemoryStore
from molink_scheduler.records import PipelineRecord, SequenceRecord, Snapshot, StageRecord, StoredSequence
from molink_scheduler.store import Lease, Store, StoreUnavailable, open_store
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


async def test_an_empty_store_is_an_empty_snapshot(store: Store) -> None:
    assert await store.load() == Snapshot()


async def test_what_was_written_is_loaded(store: Store) -> None:
    await store.write(
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
    assert await store.load() == Snapshot(
        pipelines=(layout_of(2),),
        sequences=(
            StoredSequence(record=record_of(S1), tokens=(1, 2**32 - 1, 3)),
            StoredSequence(record=record_of(S2), tokens=()),
        ),
        workers=(make_heartbeat("w1"),),
    )


async def test_writing_again_changes_nothing(store: Store) -> None:
    writes: list[Write] = [SaveSequence(record_of(S1)), AppendTokens(S1, 0, (1, 2)), AppendTokens(S1, 2, (3,))]
    await store.write(writes)
    await store.write(writes)
    assert (await store.load()).sequences == (StoredSequence(record=record_of(S1), tokens=(1, 2, 3)),)


async def test_a_deleted_sequence_leaves_nothing(store: Store) -> None:
    await store.write([SaveSequence(record_of(S1)), AppendTokens(S1, 0, (1,)), DeleteSequence(S1), DeleteSequence(S2)])
    assert await store.load() == Snapshot()
    await store.write([SaveSequence(record_of(S1))])
    assert (await store.load()).sequences == (StoredSequence(record=record_of(S1), tokens=()),)


async def test_epochs_only_rise(store: Store) -> None:
    drawn = [await store.next_epoch(above) for above in (0, 0, 7, 3)]
    assert drawn == [1, 2, 8, 9]
    assert (await store.load()).epoch == 9


async def test_one_holds_the_lease(store: Store) -> None:
    assert await store.take_lease("a", expiry_s=10) is Lease.TAKEN
    assert await store.take_lease("b", expiry_s=10) is Lease.ANOTHERS
    assert await store.take_lease("a", expiry_s=10) is Lease.RENEWED
    await store.release_lease("b")
    assert await store.take_lease("b", expiry_s=10) is Lease.ANOTHERS
    await store.release_lease("a")
    assert await store.take_lease("b", expiry_s=10) is Lease.TAKEN


# --- Redis alone ---


async def test_every_key_is_documented_and_expires_as_it_should(redis_server: EmbeddedServer) -> None:
    client = Redis.from_url(redis_server.url)
    await client.flushdb()
    async with open_store(redis_server.url) as store:
        await store.take_lease("a", expiry_s=4)
        await store.next_epoch(0)
        await store.write(
            [
                SaveSequence(record_of(S1)),
                AppendTokens(S1, 0, (1,)),
                SavePipeline(layout_of(1)),
                SaveWorker(make_heartbeat("w1")),
            ]
        )
    expiry = {bytes(key).decode(): await client.ttl(key) for key in await client.keys("*")}  # type: ignore[arg-type]
    await client.aclose()
    assert expiry.pop("molink:v1:lease") in (3, 4)
    assert expiry.pop("molink:v1:worker:w1") in (14, 15)
    assert expiry.pop(f"molink:v1:sequence:{S1}") in (3599, 3600)
    assert expiry.pop(f"molink:v1:tokens:{S1}") in (3599, 3600)
    assert expiry == {"molink:v1:epoch": -1, "molink:v1:pipeline:1": -1, "molink:v1:sequences": -1}


async def test_values_that_do_not_parse_are_left_out_and_cleaned_up(redis_server: EmbeddedServer) -> None:
    client = Redis.from_url(redis_server.url)
    await client.flushdb()
    await client.sadd("molink:v1:sequences", S1, S2)
    await client.set(f"molink:v1:sequence:{S1}", b'{"request": 1}')
    await client.set("molink:v1:pipeline:1", b"\xff")
    await client.set("molink:v1:worker:w", b"[]")
    async with open_store(redis_server.url) as store:
        assert await store.load() == Snapshot()
    assert await client.keys("molink:v1:sequence*") == []
    await client.aclose()


async def test_no_server_is_an_error_within_seconds() -> None:
    async with open_store(f"redis://127.0.0.1:{free_port()}/0") as store:
        with pytest.raises(StoreUnavailable, match="Redis"):
            await store.load()
    with pytest.raises(StoreUnavailable, match="--redis-url"):
        async with open_store("nonsense"):
            pass
