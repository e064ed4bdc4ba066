"""Which activation frames a stage lets in.

A broker may deliver what is stale (an older epoch) or lose something in an outage. A frame counts only if it is
of this pipeline and epoch, is newer than every frame of its class before it, and continues each of its sequences at
or before the position that the sequence has reached here, also where the sequence opens again: computing on after a
hole would give wrong text without an error. Whether the stage computes a step or passes it on makes no difference
here: what is rebuilt elsewhere is in this stage's KV blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum

from molink_common.identity import sequence_number
from molink_common.wire import Entry, StepFrame, Traffic
from molink_stage_worker.lives import Lives


class Drop(StrEnum):
    """Why a frame was not let in."""

    GARBAGE = "garbage"
    OTHER_PIPELINE = "other_pipeline"
    OTHER_EPOCH = "other_epoch"
    SEEN_ALREADY = "seen_already"
    WRONG_SHAPE = "wrong_shape"
    HOLE = "hole"
    TOO_MANY = "too_many"
    REFUSED = "refused_by_engine"


class Fence:
    """Admits frames one after the other and counts those that it drops. No IO, no clock."""

    def __init__(self, *, pipeline: int, epoch: int) -> None:
        self._pipeline = pipeline
        self._epoch = epoch
        self._last_steps = dict.fromkeys(Traffic, 0)
        self._lives = Lives()
        self._lengths: dict[int, int] = {}
        self.dropped: Counter[Drop] = Counter()

    def check(self, frame: StepFrame) -> Drop | None:
        """Why a frame is to be dropped by what its header says, or None. Remembers its step."""
        reason = None
        if frame.pipeline != self._pipeline:
            reason = Drop.OTHER_PIPELINE
        elif frame.epoch != self._epoch:
            reason = Drop.OTHER_EPOCH
        elif frame.step <= self._last_steps[frame.traffic]:
            reason = Drop.SEEN_ALREADY
        if reason is not None:
            self.dropped[reason] += 1
            return reason
        self._last_steps[frame.traffic] = frame.step
        return None

    def enter(self, step: int, entries: Iterable[Entry], closes: Mapping[str, int]) -> Drop | None:
        """Follow the sequences of a step; with a hole its entries are to be dropped, while the closes hold."""
        for name in self._lives.close(closes):
            self._lengths.pop(sequence_number(name), None)
        entries = tuple(entries)
        if any(entry.start > self._lengths.get(entry.sequence, 0 if entry.opens else -1) for entry in entries):
            self.refuse(entries, Drop.HOLE)
            return Drop.HOLE
        self._lives.open(entries, step)
        for entry in entries:
            self._lengths[entry.sequence] = entry.start + entry.count
        return None

    def refuse(self, entries: Iterable[Entry], reason: Drop) -> None:
        """A step's entries are not computed: what they would have written is a hole for whatever follows."""
        for entry in entries:
            self._lengths.pop(entry.sequence, None)
        self.dropped[reason] += 1
