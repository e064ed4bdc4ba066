"""Which activation frames a stage lets in.

A broker may deliver what is stale (an older epoch) or lose something in an outage. A frame counts only if it is
of this pipeline and epoch, is newer than every frame of its class before it, and continues each of its sequences at
the position that the sequence has reached here, or before it where the sequence opens again: computing on after a
hole would give wrong text without an error. Behind guesses a sequence goes on where they were right up to: nothing
else of it is under way meanwhile, so nothing can be missing there. A sequence may open behind KV blocks that others
have filled here in this epoch (see `prefix_cache`). Whether the stage computes a step or passes it on makes no
difference here: what is rebuilt elsewhere is in this stage's KV blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum

from molink_common.identity import sequence_number
from molink_common.wire import Entry, Logits, StepFrame, Traffic
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

    def __init__(self, *, pipeline: int, epoch: int, block_size: int) -> None:
        self._block_size = block_size
        self._pipeline = pipeline
        self._epoch = epoch
        self._last_steps = dict.fromkeys(Traffic, 0)
        self._lives = Lives()
        self._lengths: dict[int, int] = {}
        self._guessed: dict[int, int] = {}
        """By sequence, how many of its tokens were guesses that may have been wrong."""
        self._tables: dict[int, list[int]] = {}
        """The KV blocks of each sequence."""
        self._full: set[int] = set()
        """KV blocks whose tokens are all here, whoever's they are."""
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
            self._forget(sequence_number(name))
        entries = tuple(entries)
        if not all(self._goes_on(entry) for entry in entries):
            self.refuse(entries, Drop.HOLE)
            return Drop.HOLE
        self._lives.open(entries, step)
        for entry in entries:
            self._lengths[entry.sequence] = entry.start + entry.count
            self._guessed[entry.sequence] = entry.count - 1 if entry.logits is Logits.DRAFTS else 0
            if entry.opens:
                self._tables[entry.sequence] = []
            if entry.new_blocks:
                self._tables[entry.sequence].extend(entry.new_blocks)
            self._fill(entry)
        return None

    def refuse(self, entries: Iterable[Entry], reason: Drop) -> None:
        """A step's entries are not computed: what they would have written is a hole for whatever follows."""
        for entry in entries:
            self._full.difference_update(self._tables.get(entry.sequence, ())[entry.start // self._block_size :])
            self._forget(entry.sequence)
        self.dropped[reason] += 1

    def _goes_on(self, entry: Entry) -> bool:
        length = self._lengths.get(entry.sequence, 0 if entry.opens else -1)
        # only an opening goes back: else it is a step of a life whose opening was lost on the way
        certain = length - self._guessed.get(entry.sequence, 0)
        if certain <= entry.start <= length or (entry.opens and entry.start < length):
            return True
        filled, rest = divmod(entry.start, self._block_size)
        return (
            entry.opens
            and not rest
            and filled <= len(entry.new_blocks)
            and self._full.issuperset(entry.new_blocks[:filled])
        )

    def _fill(self, entry: Entry) -> None:
        """What the entry's blocks held behind its tokens is not there any more."""
        end = (entry.start + entry.count) // self._block_size
        table = self._tables[entry.sequence]
        self._full.difference_update(table[end:])
        self._full.update(table[entry.start // self._block_size : end])

    def _forget(self, sequence: int) -> None:
        self._lengths.pop(sequence, None)
        self._guessed.pop(sequence, None)
        self._tables.pop(sequence, None)
