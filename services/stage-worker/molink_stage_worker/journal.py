"""What a stage has sent to the next one, kept to be sent again: a stage that is replaced gets its KV blocks back so.

Hidden states lie as their keys and values do, by KV block and place in it. So what sequences share is kept once, and
what a sequence has taken over from one that has left is there as well (see `prefix_cache`). Of a block there is always
a beginning: what has a hole is of no use, nor is what comes behind one. Whoever gets a block to fill it drops what it
held.

Bounded by bytes. When a sequence begins to fill a block, all that it has moves to the safe end of the line, the
beginning of its text last; what stands at the other end is dropped first. So whoever has not grown for longest loses
its rows, from the end of its text on, and keeps none of what it adds until it opens again: too many long sequences do
not drop each other in turns.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Listing

from molink_common.wire import Entry

DEFAULT_CAPACITY_BYTES = 256 << 20
_BLOCK_OVERHEAD_BYTES = 256
"""Of a block's place in the books, about. Single tokens of a small model are not much larger."""


class Journal:
    """Rows of hidden states, `capacity_bytes` of them at most. Used by one thread; no IO, no clock."""

    def __init__(self, capacity_bytes: int, block_size: int) -> None:
        """With a capacity of 0 nothing is kept."""
        if capacity_bytes < 0:
            raise ValueError(f"{capacity_bytes} bytes are no capacity")
        self.capacity_bytes = capacity_bytes
        self.size_bytes = 0
        """Kept now. May be read from any thread."""
        self._block_size = block_size
        self._row_bytes = 0
        """The same for all rows; 0 before the first one."""
        self._tables: dict[int, list[int]] = {}
        """The KV blocks of each sequence."""
        self._rows: OrderedDict[int, bytearray] = OrderedDict()
        """By block, who is to be dropped first comes first."""

    def record(self, entry: Entry, rows: memoryview) -> None:
        """Keep a copy of the rows of an entry, where all that is before them is here."""
        if entry.opens:
            table = self._tables[entry.sequence] = list(entry.new_blocks)
            self._drop(table[-(-entry.start // self._block_size) :])
        else:
            known = self._tables.get(entry.sequence)
            if known is None:
                return
            table = known
            table.extend(entry.new_blocks)
            self._drop(entry.new_blocks)
        self._row_bytes = len(rows) // entry.count
        position, end = entry.start, entry.start + entry.count
        while position < end:
            index, place = divmod(position, self._block_size)
            until = min(end, (index + 1) * self._block_size)
            if not self._reaches(table, index, place):
                self._drop(table[index:])
                return
            first, last = position - entry.start, until - entry.start
            self._put(table[index], place, rows[first * self._row_bytes : last * self._row_bytes])
            if place == 0:
                self._keep_long(table[: index + 1])
            while self.size_bytes > self.capacity_bytes:
                self._drop((next(iter(self._rows)),))
            position = until
        self._drop(table[-(-end // self._block_size) :])

    def replay(self, sequence: int, start: int, count: int) -> bytes | None:
        """`count` rows from position `start` on, or None: they are not all here."""
        table = self._tables.get(sequence)
        end = start + count
        if table is None or count < 1 or end > len(table) * self._block_size:
            return None
        parts: list[bytes] = []
        position = start
        while position < end:
            index, place = divmod(position, self._block_size)
            last = min(end - index * self._block_size, self._block_size)
            held = self._rows.get(table[index], b"")
            if len(held) < last * self._row_bytes:
                return None
            parts.append(bytes(held[place * self._row_bytes : last * self._row_bytes]))
            position = index * self._block_size + last
        return b"".join(parts)

    def forget(self, sequences: Iterable[int]) -> None:
        """Sequences have left; unknown ones are ignored. What their blocks hold may be taken over by others."""
        for sequence in sequences:
            self._tables.pop(sequence, None)

    def num_tokens(self, sequence: int) -> int:
        """How many tokens of a sequence are here from its beginning on."""
        count = 0
        for block in self._tables.get(sequence, ()):
            held = self._num_rows(block)
            count += held
            if held < self._block_size:
                break
        return count

    def check_invariants(self) -> None:
        """Assert that the books of bytes are right."""
        sizes = sum(len(held) + _BLOCK_OVERHEAD_BYTES for held in self._rows.values())
        assert self.size_bytes == sizes <= self.capacity_bytes
        for held in self._rows.values():
            assert 0 < len(held) <= self._block_size * self._row_bytes
            assert len(held) % self._row_bytes == 0

    def _num_rows(self, block: int) -> int:
        held = self._rows.get(block)
        return 0 if held is None else len(held) // self._row_bytes

    def _reaches(self, table: Listing[int], index: int, place: int) -> bool:
        """Whether what is kept of a sequence goes on at this place of its block."""
        if index >= len(table):
            return False
        if place:
            return self._num_rows(table[index]) >= place
        return index == 0 or self._num_rows(table[index - 1]) == self._block_size

    def _keep_long(self, blocks: Listing[int]) -> None:
        for block in reversed(blocks):
            if block in self._rows:
                self._rows.move_to_end(block)

    def _put(self, block: int, place: int, rows: memoryview) -> None:
        held = self._rows.get(block)
        if held is None:
            held = self._rows[block] = bytearray()
            self.size_bytes += _BLOCK_OVERHEAD_BYTES
        before = len(held)
        del held[place * self._row_bytes :]
        held += rows
        self.size_bytes += len(held) - before

    def _drop(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            held = self._rows.pop(block, None)
            if held is not None:
                self.size_bytes -= len(held) + _BLOCK_OVERHEAD_BYTES
