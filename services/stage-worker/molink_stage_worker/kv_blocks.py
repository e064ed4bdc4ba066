"""Which KV block belongs to which sequence, decided once for the whole pipeline.

Every stage has the same number of blocks and uses the same ids, so the head's allocator speaks for all.
Neighbouring blocks are worth having: where the blocks of a sequence follow one another, attention reads its keys
and values in place instead of gathering them. So a sequence that begins *wishes* for a run as long as it may
grow. A wish binds nobody: others take a wished block as soon as no free one is left.
"""

from __future__ import annotations

from molink_common.errors import CapacityError

_FREE, _WISHED, _USED = 0, 1, 2


class BlockAllocator:
    """Blocks ``0 .. num_blocks-1``. Not thread-safe; no IO, no clock."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        # one byte a block, so that a run of free ones is found by `bytes.find` instead of a loop
        self._state = bytearray(num_blocks)
        self._tables: dict[int, list[int]] = {}
        self._wishes: dict[int, range] = {}
        self._wisher: dict[int, int] = {}

    def held(self, sequence: int) -> int:
        """How many blocks the sequence has."""
        return len(self._tables.get(sequence, ()))

    def table(self, sequence: int) -> tuple[int, ...]:
        """The sequence's blocks, in the order of its tokens."""
        return tuple(self._tables.get(sequence, ()))

    def take(self, sequence: int, count: int, *, expected: int = 0) -> tuple[int, ...]:
        """`count` more blocks for a sequence, next to those that it has where that is possible.

        `expected` is how many it may come to hold; it matters with the first call for the sequence only.

        Raises:
            CapacityError: fewer than `count` are free; nothing was taken.
        """
        if count > self.num_free:
            raise CapacityError(f"{count} KV blocks wanted, {self.num_free} of {self.num_blocks} free")
        table = self._tables.get(sequence)
        if table is None:
            table = self._tables[sequence] = []
            self._wish(sequence, max(count, expected))
        taken: list[int] = []
        for _ in range(count):
            block = self._next_block(sequence, table)
            self._state[block] = _USED
            self._wisher.pop(block, None)
            table.append(block)
            taken.append(block)
        self.num_free -= count
        return tuple(taken)

    def release(self, sequence: int) -> None:
        """Everything that the sequence has is free again. Harmless for an unknown one."""
        for block in self._tables.pop(sequence, ()):
            self._state[block] = _FREE
            self.num_free += 1
        for block in self._wishes.pop(sequence, ()):
            if self._wisher.get(block) == sequence:
                del self._wisher[block]
                self._state[block] = _FREE

    def check_invariants(self) -> None:
        """Assert that no block has two owners and that every block is accounted for."""
        used = [block for table in self._tables.values() for block in table]
        assert len(used) == len(set(used)), "a KV block has two owners"
        assert self.num_free == self.num_blocks - len(used), "KV blocks got lost"
        assert {block for block, state in enumerate(self._state) if state == _USED} == set(used)
        assert {block for block, state in enumerate(self._state) if state == _WISHED} == set(self._wisher)
        assert set(self._wishes) <= set(self._tables)

    def _wish(self, sequence: int, length: int) -> None:
        """Mark the first run of free blocks of that length, or the longest shorter one by halves."""
        length = min(length, self.num_free)
        while length > 1:
            start = self._state.find(bytes(length))
            if start >= 0:
                run = range(start, start + length)
                self._wishes[sequence] = run
                self._state[start : start + length] = bytes([_WISHED]) * length
                self._wisher.update(dict.fromkeys(run, sequence))
                return
            length //= 2

    def _next_block(self, sequence: int, table: list[int]) -> int:
        if table:
            following = table[-1] + 1
            if following < self.num_blocks and self._state[following] != _USED:
                return following
        else:
            wish = self._wishes.get(sequence)
            if wish is not None:
                return wish.start
        block = self._state.find(_FREE)
        # the wished block with the highest number is the one whose turn is most likely the last to come
        return block if block >= 0 else self._state.rfind(_WISHED)
