"""Which KV block belongs to which sequences, decided once for the whole pipeline.

Every stage has the same number of blocks and uses the same ids, so the head's allocator speaks for all.

    empty ── take ──▶ used by one ── publish ──▶ known, used by one or more ── release ──▶ idle ── take ──▶ used by one
      ▲                   │                                  ▲                               │
      └───── release ─────┘                                  └──────────── share ────────────┘

A block that is known (see `prefix_cache`) is never written to: it may be shared. Idle ones count as free.

Neighbouring blocks are worth having: where the blocks of a sequence follow one another, attention reads its keys
and values in place instead of gathering them. So a sequence that begins *wishes* for a run as long as it may
grow. A wish binds nobody: others take a wished block as soon as no empty one is left, and idle ones after that. Idle
blocks are given up as many at a time as are needed, since those of one former sequence make a run again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Listing

from molink_common.errors import CapacityError
from molink_stage_worker.prefix_cache import PrefixIndex

_EMPTY, _WISHED, _USED, _IDLE = 0, 1, 2, 3


class BlockAllocator:
    """Blocks ``0 .. num_blocks-1``. Not thread-safe; no IO, no clock."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        # one byte a block, so that a run of empty ones is found by `bytes.find` instead of a loop
        self._state = bytearray(num_blocks)
        self._tables: dict[int, list[int]] = {}
        self._users: Counter[int] = Counter()
        """How many sequences have a block."""
        self._wishes: dict[int, range] = {}
        self._wisher: dict[int, int] = {}
        self._index = PrefixIndex()

    @property
    def num_idle(self) -> int:
        """Of the free blocks, how many hold something that can be found again."""
        return self._index.num_idle

    @property
    def holders(self) -> frozenset[int]:
        """Sequences that have blocks."""
        return frozenset(self._tables)

    def held(self, sequence: int) -> int:
        """How many blocks the sequence has."""
        return len(self._tables.get(sequence, ()))

    def table(self, sequence: int) -> tuple[int, ...]:
        """The sequence's blocks, in the order of its tokens."""
        return tuple(self._tables.get(sequence, ()))

    def is_sole_user(self, sequence: int) -> bool:
        """Whether no other sequence has any of its blocks."""
        return all(self._users[block] == 1 for block in self._tables.get(sequence, ()))

    def may_write(self, sequence: int, first: int) -> bool:
        """Whether nobody has, or can come to have, the sequence's blocks from its `first` one on."""
        return all(
            self._users[block] == 1 and block not in self._index for block in self._tables.get(sequence, ())[first:]
        )

    def num_known(self, sequence: int) -> int:
        """How many of the sequence's first blocks are known."""
        known = 0
        for block in self._tables.get(sequence, ()):
            if block not in self._index:
                break
            known += 1
        return known

    def knows(self, key: bytes) -> bool:
        """Whether a block is known by this key."""
        return self._index.block(key) is not None

    def known(self, keys: Listing[bytes]) -> tuple[int, int]:
        """How many of the first `keys` are here, and how many of these blocks are in use: they cost nothing."""
        blocks = tuple(self._index.known(keys))
        return len(blocks), sum(self._state[block] == _USED for block in blocks)

    def share(self, sequence: int, keys: Listing[bytes]) -> None:
        """Let the sequence begin with the blocks that are known by `keys`, all of them known.

        They take the place of as many blocks that it has, which nobody may have written to yet.
        """
        table = self._tables.setdefault(sequence, [])
        replaced: list[int] = []
        for place, block in enumerate(list(self._index.known(keys))):
            if place < len(table) and table[place] == block:
                continue
            if self._users[block] == 0:
                self._index.set_used(block)
                self._state[block] = _USED
                self.num_free -= 1
            self._users[block] += 1
            replaced += table[place : place + 1]
            table[place : place + 1] = [block]
        for block in replaced:
            self._let_go(block)

    def take(self, sequence: int, count: int, *, expected: int = 0) -> tuple[int, ...]:
        """`count` more blocks for a sequence, next to those that it has where that is possible.

        `expected` is how many it may come to hold; it matters with the first call for the sequence only.

        Raises:
            CapacityError: fewer than `count` are free; nothing was taken.
        """
        if count > self.num_free:
            raise CapacityError(f"{count} KV blocks wanted, {self.num_free} of {self.num_blocks} free")
        table = self._tables.setdefault(sequence, [])
        self._empty(count - (self.num_free - self.num_idle), table[-1] + 1 if table else None)
        if expected or not table:
            self._wish(sequence, table, count, expected - len(table))
        taken: list[int] = []
        for _ in range(count):
            block = self._next_block(sequence, table)
            self._state[block] = _USED
            self._users[block] = 1
            self._wisher.pop(block, None)
            table.append(block)
            taken.append(block)
        self.num_free -= count
        return tuple(taken)

    def publish(self, sequence: int, keys: Listing[bytes], first: int) -> None:
        """The first blocks of the sequence, one for each of `keys`, are full on every stage: they may be shared.

        Those before `first` were published already.
        """
        self._index.publish(keys, self._tables[sequence][: len(keys)], first)

    def forget(self, sequence: int) -> None:
        """Nobody finds the sequence's blocks any more, nor what follows upon them; who has them keeps them."""
        for block in self._tables.get(sequence, ()):
            self._set_empty(self._index.forget(block))

    def forget_all(self) -> None:
        """No block is known any more; who has some keeps them."""
        self._set_empty(self._index.forget_all())

    def release(self, sequence: int) -> None:
        """Whatever only this sequence has is free again. Harmless for an unknown one."""
        for block in reversed(self._tables.pop(sequence, [])):  # of a text its end is given up before its beginning
            self._let_go(block)
        for block in self._wishes.pop(sequence, ()):
            if self._wisher.get(block) == sequence:
                del self._wisher[block]
                self._state[block] = _EMPTY

    def check_invariants(self) -> None:
        """Assert that every block is accounted for."""
        users = Counter(block for table in self._tables.values() for block in table)
        assert users == +self._users, "the number of users of a KV block is wrong"
        assert all(len(table) == len(set(table)) for table in self._tables.values()), "a KV block stands twice"
        assert self.num_free == self.num_blocks - len(users), "KV blocks got lost"
        by_state = [{block for block, state in enumerate(self._state) if state == wanted} for wanted in range(4)]
        assert by_state[_USED] == set(users)
        assert by_state[_WISHED] == set(self._wisher)
        assert len(by_state[_IDLE]) == self.num_idle
        assert all(block in self._index for block in by_state[_IDLE])
        assert not any(block in self._index for block in by_state[_EMPTY] | by_state[_WISHED])
        assert set(self._wishes) <= set(self._tables)
        self._index.check_invariants()

    def _let_go(self, block: int) -> None:
        self._users[block] -= 1
        if self._users[block]:
            return
        del self._users[block]
        self.num_free += 1
        if block in self._index:
            self._index.set_idle(block)
            self._state[block] = _IDLE
        else:
            self._state[block] = _EMPTY

    def _empty(self, count: int, following: int | None) -> None:
        """Give up `count` idle blocks: those that come next to the sequence if they are old, else the oldest."""
        while count > 0:
            near = following is not None and self._index.is_of_older_half(following)
            block = following if following is not None and near else self._index.oldest()
            following = block + 1 if near else None
            emptied = self._index.forget(block)
            self._set_empty(emptied)
            count -= len(emptied)

    def _set_empty(self, blocks: Listing[int]) -> None:
        for block in blocks:
            self._state[block] = _EMPTY

    def _wish(self, sequence: int, table: list[int], count: int, expected: int) -> None:
        """Mark the empty blocks that follow, or the first run that is long enough, or the longest one by halves."""
        length = min(max(count, expected), self.num_free - self.num_idle)
        if table:
            start = end = table[-1] + 1
            while end < self.num_blocks and end - start < length and self._state[end] == _EMPTY:
                end += 1
            if end - start >= max(count, 1):
                self._mark(sequence, range(start, end))
                return
        while length > 1:
            start = self._state.find(bytes(length))
            if start >= 0:
                self._mark(sequence, range(start, start + length))
                return
            length = max(length // 2, count) if length > count else length // 2

    def _mark(self, sequence: int, run: range) -> None:
        self._wishes[sequence] = run
        self._state[run.start : run.stop] = bytes([_WISHED]) * len(run)
        self._wisher.update(dict.fromkeys(run, sequence))

    def _next_block(self, sequence: int, table: list[int]) -> int:
        if table:
            following = table[-1] + 1
            if following < self.num_blocks and self._state[following] in (_EMPTY, _WISHED):
                return following
        wish = self._wishes.get(sequence)
        if wish is not None and self._wisher.get(wish.start) == sequence:
            return wish.start
        block = self._state.find(_EMPTY)
        # the wished block with the highest number is the one whose turn is most likely the last to come
        return block if block >= 0 else self._state.rfind(_WISHED)
