"""Keys and values for attention on AMX tiles.

A tile of values is 32 keys, twice what lies side by side in the store. So a key head's keys and values are copied to
where they lie one after the other, once for all queries that see them.

What is *seen* is a tuple: keys and values, flat, and of each stretch the place of its first number in a head's; where
the head begins, and its sequence's first stretch; the same of what comes next; then memory for copies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import uint32

from molink_stage_worker.engine import amx_products
from molink_stage_worker.engine.compiling import jit
from molink_stage_worker.engine.vectors import LANES, copy_vector, fetch_line

_AHEAD = 2
"""Stretches before their turn keys and values are fetched: they lie anywhere in memory."""
_LINE_NUMBERS = 32


@jit
def copies_of(num_keys: Any, size: Any) -> Any:
    """Memory for a head's keys and values."""
    return np.empty(num_keys * size // 2, np.uint32), np.empty(num_keys * size // 2, np.uint32)


@jit
def make_ready(seen: Any, num_stretches: Any, size: Any) -> None:
    """Copy a head's keys and values. The last turns fetch what comes next."""
    keys, values, places_N, head_at, table, next_head_at, next_table, key_words, value_words = seen
    numbers = LANES * size
    for stretch in range(num_stretches):
        soon = stretch + _AHEAD
        if soon < num_stretches:
            soon_at = head_at + places_N[table + soon]
        else:
            soon_at = next_head_at + places_N[min(next_table + soon - num_stretches, places_N.size - 1)]
        at, to = head_at + places_N[table + stretch], stretch * numbers // 2
        for i in range(0, numbers, _LINE_NUMBERS):
            fetch_line(keys, soon_at + i)
            fetch_line(values, soon_at + i)
            copy_vector(keys, at + i, key_words, to + i // 2)
            copy_vector(values, at + i, value_words, to + i // 2)
    if num_stretches % 2:
        half = numbers // 2
        value_words[num_stretches * half : (num_stretches + 1) * half] = uint32(0)


@jit
def score(
    rows: Any, first: Any, apart: Any, num_rows: Any, seen: Any, num_stretches: Any, size: Any, scores: Any, width: Any
) -> None:
    """See `amx_products.score`."""
    amx_products.score(rows, first, apart, num_rows, seen[7], num_stretches, size, scores, width)


@jit
def add_up(weights: Any, width: Any, num_rows: Any, seen: Any, num_stretches: Any, size: Any, sums: Any) -> None:
    """See `amx_products.add_up`."""
    amx_products.add_up(weights, width, num_rows, seen[8], (num_stretches + 1) // 2 * 2, size, sums)
