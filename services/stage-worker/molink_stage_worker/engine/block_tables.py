"""Which KV blocks hold a sequence's tokens: the stage's copy of what the head decided. No tensors here.

A step is checked as a whole before anything changes, so that a frame which contradicts the tables leaves the
stage as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from molink_common.errors import ProtocolError
from molink_common.wire import Entry

BlockIds = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens ``start .. start+count`` of one sequence, in rows ``row .. row+count`` of the step."""

    row: int
    start: int
    count: int
    blocks: BlockIds
    """The sequence's whole block table."""

    @property
    def end(self) -> int:
        """How many tokens the sequence has after the step, counted from its beginning."""
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a step's tokens go."""

    spans: tuple[Span, ...]
    """One for each entry, in order."""
    blocks_to_clear: tuple[int, ...]
    """New blocks that this step does not fill. What a former owner left there could be read under a mask, and
    one NaN of his would spoil every score of the new owner."""


@dataclass(slots=True)
class _Table:
    blocks: BlockIds
    num_tokens: int
    """Positions below this hold keys and values."""


class BlockTables:
    """The block tables of every sequence of the stage."""

    def __init__(self, *, num_blocks: int, block_size: int, context_length: int | None = None) -> None:
        self._context_length = context_length
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._tables: dict[int, _Table] = {}

    def __len__(self) -> int:
        """How many sequences are known."""
        return len(self._tables)

    def apply(self, entries: Sequence[Entry], closes: Iterable[int]) -> Placement:
        """Forget `closes`, then place `entries`.

        Sequences to close that are not known are ignored: they may have ended before they reached this stage.

        Raises:
            ProtocolError: an entry contradicts the tables; nothing was changed.
        """
        closed = frozenset(closes)
        changed: dict[int, _Table] = {}
        written: set[int] = set()
        spans: list[Span] = []
        to_clear: list[int] = []
        row = 0
        for entry in entries:
            if entry.sequence in changed:
                raise ProtocolError(f"sequence {entry.sequence:016x} stands twice in a step")
            known = None if entry.opens or entry.sequence in closed else self._tables.get(entry.sequence)
            table = self._placed(entry, known)
            changed[entry.sequence] = table
            first, last = entry.start // self._block_size, (entry.start + entry.count - 1) // self._block_size
            touched = table.blocks[first : last + 1].tolist()
            if not written.isdisjoint(touched):
                raise ProtocolError(f"sequence {entry.sequence:016x} writes to a KV block of another in the same step")
            written.update(touched)
            if entry.new_blocks:
                num_old = len(table.blocks) - len(entry.new_blocks)
                # a sequence that opens in its middle has tokens in the blocks that it names
                kept = -(-entry.start // self._block_size)
                first_unfilled = max(num_old, kept, (entry.start + entry.count) // self._block_size)
                to_clear += table.blocks[first_unfilled:].tolist()
            spans.append(Span(row, entry.start, entry.count, table.blocks))
            row += entry.count
        for sequence in closed:
            self._tables.pop(sequence, None)
        self._tables.update(changed)
        return Placement(tuple(spans), tuple(to_clear))

    def _placed(self, entry: Entry, known: _Table | None) -> _Table:
        """The sequence's table with the entry's blocks and tokens, as a new value."""
        name = f"sequence {entry.sequence:016x}"
        if known is None and not entry.opens:
            raise ProtocolError(f"{name} is not known here and does not open")
        if entry.count < 1 or entry.start < 0:
            raise ProtocolError(f"{name}: {entry.count} tokens from position {entry.start}")
        if known is None:
            # an opening sequence may start after a prefix that another has computed into the same blocks
            blocks, num_tokens = np.empty(0, np.int64), entry.start
        else:
            blocks, num_tokens = known.blocks, known.num_tokens
        if entry.start > num_tokens:
            raise ProtocolError(f"{name} goes on at {entry.start}, but only {num_tokens} tokens are here")
        if entry.new_blocks:
            blocks = self._extended(name, blocks, entry.new_blocks)
        if self._context_length is not None and entry.start + entry.count > self._context_length:
            raise ProtocolError(f"{name} is longer than the model's {self._context_length} tokens")
        if entry.start + entry.count > len(blocks) * self._block_size:
            raise ProtocolError(f"{name} has {len(blocks)} KV blocks, too few for {entry.start + entry.count} tokens")
        return _Table(blocks, entry.start + entry.count)

    def _extended(self, name: str, blocks: BlockIds, new_blocks: Sequence[int]) -> BlockIds:
        if min(new_blocks) < 0 or max(new_blocks) >= self._num_blocks:
            raise ProtocolError(f"{name} gets KV block {max(new_blocks)} of {self._num_blocks}")
        extended = np.concatenate([blocks, np.asarray(new_blocks, np.int64)])
        if len(np.unique(extended)) != len(extended):
            raise ProtocolError(f"{name} gets a KV block twice")
        return extended
