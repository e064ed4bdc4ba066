"""Which KV blocks hold which beginning of a text, so that it is computed once.

A full block is known by a key: the hash of the key before it and of its own tokens. So a key stands for everything
from the first token on, and two texts have the same key exactly as far as they are the same.

    key 0 = H(tenant, tokens 0 … b)      key 1 = H(key 0, tokens b … 2b)      key 2 = H(key 1, …)

H is BLAKE2b with a secret of this process, cut to 128 bits: nobody can make two texts with one key. The tenant begins
the chain, so one tenant never learns from a fast answer what another has asked.

A block that nobody uses any more stays *idle*: whoever needs an empty block may take it, the one that was used longest
ago first, of one text its end before its beginning. A key is known only while the key before it is.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Listing
from hashlib import blake2b

_KEY_BYTES = 16
_SECRET_BYTES = 64
"""BLAKE2b takes no longer one."""


class ChainKeys:
    """Makes the keys of texts. No IO; the secret is an argument."""

    def __init__(self, secret: bytes, block_size: int) -> None:
        self._secret = secret[:_SECRET_BYTES]
        self._block_size = block_size

    def extend(self, keys: list[bytes], count: int, tenant: str, tokens: Listing[int]) -> None:
        """Make `keys`, those of the first blocks of `tokens`, be `count` at least."""
        for index in range(len(keys), count):
            before = keys[-1] if keys else self._hash(b"tenant", tenant.encode())
            own = tokens[index * self._block_size : (index + 1) * self._block_size]
            keys.append(self._hash(b"block", before + array("Q", own).tobytes()))

    def _hash(self, kind: bytes, data: bytes) -> bytes:
        return blake2b(data, digest_size=_KEY_BYTES, key=self._secret, person=kind).digest()


class PrefixIndex:
    """Key ↔ block, and which of these blocks are idle. Not thread-safe; no IO, no clock."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._before: dict[bytes, bytes] = {}
        """The key before a key; none for the first of a text."""
        self._after: dict[bytes, set[bytes]] = {}
        self._idle: OrderedDict[int, int] = OrderedDict()
        """With the turn at which it became idle, longest ago first."""
        self._turn = 0

    @property
    def num_idle(self) -> int:
        """Blocks that are known and that nobody uses."""
        return len(self._idle)

    def __contains__(self, block: int) -> bool:
        return block in self._keys

    def block(self, key: bytes) -> int | None:
        """The block that is known by a key."""
        return self._blocks.get(key)

    def known(self, keys: Listing[bytes]) -> Iterator[int]:
        """The blocks of the longest beginning of `keys` that is here."""
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                return
            yield block

    def publish(self, keys: Listing[bytes], blocks: Listing[int], first: int) -> None:
        """`blocks` hold what `keys` stand for; those before `first` were published already.

        Where another block is known by a key, that one stays: the sequence's own is no more than its own.
        """
        if first and keys[first - 1] not in self._blocks:
            first = 0  # what was known by the keys before was taken since
        for index in range(first, len(blocks)):
            key = keys[index]
            if key in self._blocks:
                continue
            self._blocks[key], self._keys[blocks[index]] = blocks[index], key
            if index:
                self._before[key] = keys[index - 1]
                self._after.setdefault(keys[index - 1], set()).add(key)

    def set_idle(self, block: int) -> None:
        """Nobody uses this known block any more."""
        self._turn += 1
        self._idle[block] = self._turn

    def set_used(self, block: int) -> None:
        """Somebody uses this known block."""
        self._idle.pop(block, None)

    def oldest(self) -> int:
        """The idle block to take first; there must be one."""
        return next(iter(self._idle))

    def is_of_older_half(self, block: int) -> bool:
        """Whether a block is idle, and was used longer ago than most idle ones."""
        turn = self._idle.get(block)
        return turn is not None and 2 * turn <= self._idle[self.oldest()] + self._turn

    def forget(self, block: int) -> list[int]:
        """Nobody finds the block, nor what follows upon it, any more. Those of them that were idle, which are empty."""
        key = self._keys.get(block)
        if key is None:
            return []
        before = self._before.pop(key, None)
        if before is not None:
            self._after[before].discard(key)
            if not self._after[before]:
                del self._after[before]
        emptied: list[int] = []
        pending = [key]
        while pending:
            key = pending.pop()
            self._before.pop(key, None)
            pending.extend(self._after.pop(key, ()))
            block = self._blocks.pop(key)
            del self._keys[block]
            if self._idle.pop(block, None) is not None:
                emptied.append(block)
        return emptied

    def forget_all(self) -> list[int]:
        """As `forget`, of every block."""
        emptied = list(self._idle)
        for one in (self._blocks, self._keys, self._before, self._after, self._idle):
            one.clear()
        return emptied

    def check_invariants(self) -> None:
        """Assert that keys and blocks are one to one, and that no key stands without the one before it."""
        assert {block: key for key, block in self._blocks.items()} == self._keys
        assert self._idle.keys() <= self._keys.keys()
        assert list(self._idle.values()) == sorted(self._idle.values())
        assert self._before.keys() <= self._blocks.keys()
        assert set(self._before.values()) <= self._blocks.keys()
        pairs = {(before, key) for before, after in self._after.items() for key in after}
        assert pairs == {(before, key) for key, before in self._before.items()}
