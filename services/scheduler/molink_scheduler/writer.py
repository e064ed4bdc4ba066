"""Writing behind: decisions hand their writes over and never wait; one task carries them to the store.

What waits is merged per key (the newest record, the joined tokens, a deletion instead of everything before
it), so the memory for an outage is bounded by what is alive, and a step's tokens are one round trip.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol, assert_never

from molink_common.logs import get_logger
from molink_scheduler.events import Event, KeySaved, SequenceSaved, StoreChanged
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
from molink_scheduler.store import LeaseLost, StoreUnavailable

log = get_logger("scheduler.writer")

MOST_DELETIONS = 100_000
"""Deletions kept for a store that does not answer; beyond, the expiry of the keys has to do."""
MOST_WRITES_AT_ONCE = 1024
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 0.2
"""A server that is away refuses a connection for less than a millisecond's work."""


class Ledger(Protocol):
    """Where writes go."""

    async def write(self, writes: Sequence[Write]) -> None:
        """Carry out in order.

        Raises:
            StoreUnavailable: not now; try again.
            LeaseLost: never again.
        """


class PendingWrites:
    """Writes that wait, merged. No IO."""

    def __init__(self) -> None:
        self._records: dict[str, Write] = {}
        self._tokens: dict[str, AppendTokens] = {}
        self._deleted: dict[str, DeleteSequence | DeleteKey] = {}

    def __bool__(self) -> bool:
        return bool(self._records or self._tokens or self._deleted)

    def add(self, write: Write) -> None:
        """Merge with what waits."""
        match write:
            case SaveSequence(record):
                self._records[f"sequence {record.request.sequence}"] = write
            case AppendTokens(sequence):
                self._tokens[sequence] = _joined(self._tokens.get(sequence), write)
            case DeleteSequence(sequence):
                self._records.pop(f"sequence {sequence}", None)
                self._tokens.pop(sequence, None)
                if len(self._deleted) < MOST_DELETIONS:
                    self._deleted[sequence] = write
            case SavePipeline(layout):
                self._records[f"pipeline {layout.pipeline}"] = write
            case SaveWorker(heartbeat):
                self._records[f"worker {heartbeat.worker}"] = write
            case SaveKey(key):
                self._records[f"key {key.id}"] = write
            case SaveUsage(usage):
                self._records[f"usage {usage.key}"] = write
            case DeleteKey(name):
                self._records.pop(f"key {name}", None)
                self._records.pop(f"usage {name}", None)
                self._deleted[f"key {name}"] = write
            case _:
                assert_never(write)

    def take(self) -> list[Write]:
        """Some of what waits, in an order that is safe: of a sequence its record, then its tokens."""
        batch: list[Write] = []
        for waiting in (self._deleted, self._records, self._tokens):
            for key in list(waiting)[: MOST_WRITES_AT_ONCE - len(batch)]:
                batch.append(waiting.pop(key))  # type: ignore[arg-type]
        return batch


def _joined(earlier: AppendTokens | None, later: AppendTokens) -> AppendTokens:
    if earlier is None or later.start <= earlier.start:
        return later
    kept = earlier.tokens[: later.start - earlier.start]
    return AppendTokens(earlier.sequence, earlier.start, (*kept, *later.tokens))


class WriteBehind:
    """Hands writes to the store from one task, for ever again until they are in."""

    def __init__(self, ledger: Ledger, report: Callable[[Event], None]) -> None:
        self._ledger = ledger
        self._report = report
        self._pending = PendingWrites()
        self._batch: list[Write] = []
        self._wake = asyncio.Event()
        self._is_up = True

    def put(self, write: Write) -> None:
        """Take a write over. Never waits."""
        self._pending.add(write)
        self._wake.set()

    async def run(self) -> None:
        """Write until cancelled.

        Raises:
            LeaseLost: another scheduler writes now.
        """
        pause_s = _FIRST_PAUSE_S
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._batch or self._pending:
                if await self._write_one_batch():
                    pause_s = _FIRST_PAUSE_S
                else:
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def drain(self, *, timeout_s: float) -> None:
        """Write what is left, after `run` was cancelled. Raises nothing: the restart works from what is there."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._batch or self._pending:
                    if not await self._write_one_batch():
                        return
        except TimeoutError:
            log.warning("writes left undone", waited_s=timeout_s)
        except LeaseLost:
            log.info("another scheduler writes now")

    async def _write_one_batch(self) -> bool:
        # a batch that failed is written again as it was, before anything newer
        self._batch = self._batch or self._pending.take()
        try:
            await self._ledger.write(self._batch)
        except StoreUnavailable as error:
            if self._is_up:
                self._is_up = False
                log.error("the store does not answer; trying again for ever", problem=str(error))
                self._report(StoreChanged(False))
            return False
        batch, self._batch = self._batch, []
        if not self._is_up:
            self._is_up = True
            log.info("the store answers again")
            self._report(StoreChanged(True))
        for write in batch:
            if isinstance(write, SaveSequence):
                self._report(SequenceSaved(write.record.request.sequence))
            elif isinstance(write, SaveKey):
                self._report(KeySaved(write.key.id))
        return True
