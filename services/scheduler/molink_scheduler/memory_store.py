"""`Store` in memory, for tests and simulations: the same contract, and switches to make it fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from molink_common.messages import Heartbeat
from molink_scheduler.instructions import (
    AppendTokens,
    DeleteSequence,
    SavePipeline,
    SaveSequence,
    SaveWorker,
    Write,
)
from molink_scheduler.records import PipelineRecord, SequenceRecord, Snapshot, StoredSequence
from molink_scheduler.store import Lease, StoreUnavailable


class MemoryStore:
    """Knows no time: nothing expires unless `forget` is called."""

    def __init__(self) -> None:
        self.is_down = False
        self.round_trips = 0
        self.forget()

    def forget(self) -> None:
        """As a server that was restarted without its data."""
        self._owner: str | None = None
        self._epoch = 0
        self._sequences: dict[str, SequenceRecord] = {}
        self._tokens: dict[str, list[int]] = {}
        self._pipelines: dict[int, PipelineRecord] = {}
        self._workers: dict[str, Heartbeat] = {}

    def _use(self) -> None:
        if self.is_down:
            raise StoreUnavailable("the store is down")
        self.round_trips += 1

    async def take_lease(self, owner: str, *, expiry_s: float) -> Lease:
        """See `Store.take_lease`; never expires."""
        self._use()
        before, self._owner = self._owner, self._owner or owner
        if before is None:
            return Lease.TAKEN
        return Lease.RENEWED if before == owner else Lease.ANOTHERS

    async def release_lease(self, owner: str) -> None:
        """See `Store.release_lease`."""
        self._use()
        if self._owner == owner:
            self._owner = None

    async def next_epoch(self, above: int) -> int:
        """See `Store.next_epoch`."""
        self._use()
        self._epoch = max(self._epoch, above) + 1
        return self._epoch

    async def write(self, writes: Sequence[Write]) -> None:
        """See `Store.write`."""
        self._use()
        for write in writes:
            match write:
                case SaveSequence(record):
                    self._sequences[record.request.sequence] = record
                case AppendTokens(name, start, tokens):
                    kept = self._tokens.setdefault(name, [])
                    kept.extend([0] * (start - len(kept)))
                    kept[start : start + len(tokens)] = tokens
                case DeleteSequence(name):
                    self._sequences.pop(name, None)
                    self._tokens.pop(name, None)
                case SavePipeline(layout):
                    self._pipelines[layout.pipeline] = layout
                case SaveWorker(heartbeat):
                    self._workers[heartbeat.worker] = heartbeat
                case _:
                    assert_never(write)

    async def load(self) -> Snapshot:
        """See `Store.load`."""
        self._use()
        return Snapshot(
            epoch=self._epoch,
            pipelines=tuple(self._pipelines[key] for key in sorted(self._pipelines)),
            sequences=tuple(
                StoredSequence(record=self._sequences[name], tokens=tuple(self._tokens.get(name, ())))
                for name in sorted(self._sequences)
            ),
            workers=tuple(self._workers[key] for key in sorted(self._workers)),
        )
