"""What a stage has sent to the next one, kept to be sent again: a stage that is replaced gets its KV blocks back so.

Hidden states by sequence and position, always a prefix from position 0 on: what has a hole is of no use. A chunk that
overwrites positions ends the prefix there. Bounded by bytes: whoever has not grown for longest is dropped first, and
stays dropped until it opens again, so that too many long sequences do not drop each other in turns.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable

DEFAULT_CAPACITY_BYTES = 256 << 20
_CHUNK_OVERHEAD_BYTES = 128
"""Of a chunk's place in the lists, about. Single tokens of a small model are not much larger."""


class _Kept:
    """The rows of one sequence, in chunks that follow one another."""

    __slots__ = ("chunks", "num_tokens", "size_bytes", "starts")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.chunks: list[bytes] = []
        self.num_tokens = 0
        self.size_bytes = 0


class Journal:
    """Rows of hidden states, `capacity_bytes` of them at most. Used by one thread; no IO, no clock."""

    def __init__(self, capacity_bytes: int = DEFAULT_CAPACITY_BYTES) -> None:
        """With a capacity of 0 nothing is kept."""
        if capacity_bytes < 0:
            raise ValueError(f"{capacity_bytes} bytes are no capacity")
        self.capacity_bytes = capacity_bytes
        self.size_bytes = 0
        """Kept now. May be read from any thread."""
        self._sequences: OrderedDict[int, _Kept] = OrderedDict()
        """By when they grew last, longest ago first."""

    def record(self, sequence: int, start: int, count: int, rows: memoryview) -> None:
        """Keep a copy of `count` rows from position `start` on. After a hole the sequence is dropped instead."""
        kept = self._sequences.get(sequence)
        if kept is None:
            if start:
                return
            kept = self._sequences[sequence] = _Kept()
        else:
            if start < kept.num_tokens:
                self._cut(kept, start)
            elif start > kept.num_tokens:
                self.forget((sequence,))
                return
            self._sequences.move_to_end(sequence)
        added = len(rows) + _CHUNK_OVERHEAD_BYTES
        kept.starts.append(start)
        kept.chunks.append(bytes(rows))
        kept.num_tokens = start + count
        kept.size_bytes += added
        self.size_bytes += added
        while self.size_bytes > self.capacity_bytes:
            _, dropped = self._sequences.popitem(last=False)
            self.size_bytes -= dropped.size_bytes

    def replay(self, sequence: int, start: int, count: int) -> bytes | None:
        """`count` rows from position `start` on, or None: they are not all here."""
        kept = self._sequences.get(sequence)
        end = start + count
        if kept is None or count < 1 or end > kept.num_tokens:
            return None
        first = bisect_right(kept.starts, start) - 1
        last = bisect_right(kept.starts, end - 1)
        joined = b"".join(kept.chunks[first:last])
        covered = (kept.starts[last] if last < len(kept.starts) else kept.num_tokens) - kept.starts[first]
        row_bytes = len(joined) // covered
        skipped = (start - kept.starts[first]) * row_bytes
        return joined[skipped : skipped + count * row_bytes]

    def forget(self, sequences: Iterable[int]) -> None:
        """Drop sequences; unknown ones are ignored."""
        for sequence in sequences:
            kept = self._sequences.pop(sequence, None)
            if kept is not None:
                self.size_bytes -= kept.size_bytes

    def num_tokens(self, sequence: int) -> int:
        """How long the prefix is that is kept."""
        kept = self._sequences.get(sequence)
        return 0 if kept is None else kept.num_tokens

    def check_invariants(self) -> None:
        """Assert that the books of bytes and positions are right."""
        assert self.size_bytes == sum(kept.size_bytes for kept in self._sequences.values()) <= self.capacity_bytes
        for kept in self._sequences.values():
            sizes = sum(len(chunk) + _CHUNK_OVERHEAD_BYTES for chunk in kept.chunks)
            assert kept.size_bytes == sizes
            assert kept.starts == sorted(set(kept.starts))
            assert kept.chunks, "a sequence without rows"
            assert kept.starts[0] == 0

    def _cut(self, kept: _Kept, num_tokens: int) -> None:
        """Keep the first `num_tokens` rows only. Leaves a sequence without rows to the caller, who adds some."""
        while kept.chunks and kept.starts[-1] >= num_tokens:
            kept.num_tokens = kept.starts.pop()
            self._shrink(kept, len(kept.chunks.pop()) + _CHUNK_OVERHEAD_BYTES)
        if num_tokens < kept.num_tokens:
            chunk = kept.chunks[-1]
            row_bytes = len(chunk) // (kept.num_tokens - kept.starts[-1])
            kept.chunks[-1] = chunk[: (num_tokens - kept.starts[-1]) * row_bytes]
            kept.num_tokens = num_tokens
            self._shrink(kept, len(chunk) - len(kept.chunks[-1]))

    def _shrink(self, kept: _Kept, size_bytes: int) -> None:
        kept.size_bytes -= size_bytes
        self.size_bytes -= size_bytes
