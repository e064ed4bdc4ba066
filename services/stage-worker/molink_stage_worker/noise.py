"""Random numbers as a function of (seed, token index).

Philox 4x64 with ten rounds (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011): a block
cipher over a counter, so any machine computes the number for any token without having drawn those before it.
Integers only: the value is the same on every processor and every library version.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_MULTIPLIER_0 = 0xD2E7470EE14C6C93
_MULTIPLIER_1 = 0xCA5A826395121157
_WEYL_0 = 0x9E3779B97F4A7C15
_WEYL_1 = 0xBB67AE8584CAA73B
_ROUNDS = 10


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four 64-bit words for a counter under a key."""
    word_0, word_1, word_2, word_3 = counter
    key_0, key_1 = key
    for _ in range(_ROUNDS):
        product_0 = word_0 * _MULTIPLIER_0
        product_1 = word_2 * _MULTIPLIER_1
        word_0, word_1, word_2, word_3 = (
            (product_1 >> 64) ^ word_1 ^ key_0,
            product_1 & _MASK,
            (product_0 >> 64) ^ word_3 ^ key_1,
            product_0 & _MASK,
        )
        key_0 = (key_0 + _WEYL_0) & _MASK
        key_1 = (key_1 + _WEYL_1) & _MASK
    return word_0, word_1, word_2, word_3


def token_key(seed: int, index: int) -> int:
    """The 64 bits that choose token `index` of a sequence with this seed."""
    return philox((index, 0, 0, 0), (seed, 0))[0]
