"""`Store` in memory, for tests and simulations: the same contract, and switches to make it fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from molink_common.messages import ApiKey, Heartbeat
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
from molink_scheduler.records import KeyUsage, PipelineRecord, SequenceRecord, Snapshot, StoredSequence
from molink_scheduler.store import LeaseLost, LeaseState, StoreForgetful, StoreUnavailable, Term


class MemoryStore:
    """Knows no time: nothing expires unless `forget` or `expire_lease` is called."""

    def __init__(self) -> None:
        self.is_down = False
        self.round_trips = 0
        self.forget()

    def forget(self) -> None:
        """As a server that was restarted without its data."""
        self._holder: str | None = None
        self._term: Term | None = None
        self._epoch = 0
        self._sequences: dict[str, SequenceRecord] = {}
        self._tokens: dict[str, list[int]] = {}
        self._pipelines: dict[int, PipelineRecord] = {}
        self._workers: dict[str, Heartbeat] = {}
        self._keys: dict[str, ApiKey] = {}
        self._usage: dict[str, KeyUsage] = {}

    def expire_lease(self) -> None:
        """As if nobody had renewed it."""
        self._holder = None

    def _use(self, term: Term | None = None) -> None:
        if self.is_down:
            raise StoreUnavailable("the store is down")
        self.round_trips += 1
        if term is None or term == self._term:
            return
        if self._term is None or self._term.number < term.number:
            raise StoreForgetful("the store does not know of this term")
        raise LeaseLost("a newer term has begun")

    async def lease_state(self) -> LeaseState:
        """See `Store.lease_state`."""
        self._use()
        return LeaseState(is_held=self._holder is not None, newest_term=0 if self._term is None else self._term.number)

    async def take_lease(self, owner: str, *, expiry_s: float, above: int) -> Term | None:
        """See `Store.take_lease`; never expires."""
        self._use()
        if self._holder not in (None, owner):
            return None
        self._holder = owner
        self._term = Term(max(above, 0 if self._term is None else self._term.number) + 1, owner)
        return self._term

    async def renew_lease(self, term: Term, *, expiry_s: float) -> None:
        """See `Store.renew_lease`."""
        self._use(term)
        self._holder = term.owner

    async def release_lease(self, term: Term) -> None:
        """See `Store.release_lease`."""
        self._use()
        if term == self._term:
            self._holder = None

    async def next_epoch(self, above: int, *, term: Term) -> int:
        """See `Store.next_epoch`."""
        self._use(term)
        self._epoch = max(self._epoch, above) + 1
        return self._epoch

    async def write(self, writes: Sequence[Write], *, term: Term) -> None:
        """See `Store.write`."""
        self._use(term)
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
                case SaveKey(key):
                    self._keys[key.id] = key
                case DeleteKey(name):
                    self._keys.pop(name, None)
                    self._usage.pop(name, None)
                case SaveUsage(usage):
                    self._usage[usage.key] = usage
                case _:
                    assert_never(write)

    async def load(self, *, term: Term) -> Snapshot:
        """See `Store.load`."""
        self._use(term)
        return Snapshot(
            epoch=self._epoch,
            pipelines=tuple(self._pipelines[key] for key in sorted(self._pipelines)),
            sequences=tuple(
                StoredSequence(record=self._sequences[name], tokens=tuple(self._tokens.get(name, ())))
                for name in sorted(self._sequences)
            ),
            workers=tuple(self._workers[key] for key in sorted(self._workers)),
            keys=tuple(self._keys[key] for key in sorted(self._keys)),
            usage=tuple(self._usage[key] for key in sorted(self._usage)),
        )
