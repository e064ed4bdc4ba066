"""Attention of a step in bfloat16, over the paged store: decode tokens and prompts' chunks alike.

The store keeps 16 slots, a *stretch*, as a processor's `bf16_unit` multiplies them: keys turned, so that pairs of
their numbers lie side by side for all 16, and values in pairs of keys. A token is written once, but read by each that
follows it. Scores and sums are products for up to 16 queries at a time, a *tile*. The weights between are rounded to
bfloat16, as torch's fused kernel does; the softmax itself is float32.

A token's result is the same whoever else is in the step, and however its prompt was cut: keys are taken in stretches
that begin at multiples of 32, each row has its own softmax, and what a row does not see counts exactly nothing.

Shapes: as in `kernels`; B spans of a step, each some tokens of one sequence; Q width of all query heads.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
from numba import float32, float64, int64, uint8, uint16

from molink_stage_worker.engine.bf16_unit import (
    DEPTH,
    ROWS,
    add_up,
    configure,
    copies_of,
    is_here,
    make_ready,
    release,
    score,
)
from molink_stage_worker.engine.compiling import jit
from molink_stage_worker.engine.step_plan import KEYS_OF_A_STRETCH as KEYS
from molink_stage_worker.engine.team import PHASE, claim, done, size_of_team, wait
from molink_stage_worker.engine.vectors import largest_of, write_scaled, write_weights

_KEYS_AT_ONCE = 4 * KEYS
"""There is room for scores of so many at a time."""
_HIDDEN = float32(-np.inf)


def can_attend(*, head_size: int, group: int, block_size: int) -> bool:
    """Whether heads of this size, so many query heads a key head, and blocks of this size come out even in tiles."""
    return head_size % DEPTH == 0 and group <= ROWS and block_size % KEYS == 0


@cache
def is_ready() -> bool:
    """Whether this can be used. Compiles, some seconds."""
    if not is_here():
        return False
    integers, rows, stored = int64[::1], uint16[:, ::1], uint16[:, :, ::1]
    store.compile((rows, integers, stored, stored))
    attend.compile((PHASE, uint8[:, ::1], rows, *(integers,) * 5, int64, float64, stored, stored, rows))
    return True


@jit
def store(rows_TW: Any, slots_T: Any, keys_KSD: Any, values_KSD: Any) -> None:
    """As `kernels.store`, but keys and values lie as `attend` reads them."""
    key_heads, num_slots, size = keys_KSD.shape
    rotated = rows_TW.shape[1] - key_heads * size
    rows, keys, values = rows_TW.reshape(-1), keys_KSD.reshape(-1), values_KSD.reshape(-1)
    row_words, key_words = rows.view(np.uint32), keys.view(np.uint32)
    for t in range(slots_T.size):
        lane = slots_T[t] % KEYS
        for k in range(key_heads):
            stretch = (k * num_slots + slots_T[t] - lane) * size
            value = t * rows_TW.shape[1] + rotated + k * size
            key = value - key_heads * size
            for i in range(size // 2):
                key_words[stretch // 2 + i * KEYS + lane] = row_words[key // 2 + i]
            to = stretch + lane // 2 * 2 * size + lane % 2
            for i in range(size):
                values[to + 2 * i] = rows[value + i]


@jit
def _weigh(scores: Any, begin: Any, low: Any, high: Any, end: Any, scale: Any, weights: Any) -> Any:
    """Of the row that begins there, weights of keys from `low` to below `high`, 0 for the others up to `end`.

    Gives what makes their sum 1.
    """
    nothing = uint16(0)
    first, last = low // KEYS * KEYS, (high + KEYS - 1) // KEYS * KEYS
    for key in range(first, low):
        scores[begin + key] = _HIDDEN
    for key in range(high, last):
        scores[begin + key] = _HIDDEN
    largest, total = _HIDDEN, float32(0.0)
    for key in range(first, last, KEYS):
        largest = largest_of(scores, begin + key, largest)
    for key in range(first, last, KEYS):
        total += write_weights(scores, begin + key, largest, scale, weights)
    for key in range(low):
        weights[begin + key] = nothing
    for key in range(high, end):
        weights[begin + key] = nothing
    return float32(1.0) / total


@jit
def _first_key(start: Any, window: Any) -> Any:
    """Where the keys that a span looks at begin: even, in pairs of stretches."""
    return max(start + 1 - window, 0) & -(2 * KEYS)


@jit
def _attend_tile(
    rows: Any, place: Any, apart: Any, num_rows: Any, seen: Any, sight: Any, room: Any, row_width: Any, size: Any,
    outs: Any, out: Any, out_apart: Any,
) -> None:  # fmt: skip
    """Of a tile of queries; what is `seen` are keys and values (see `amx_attention`).

    `sight` is: where these keys begin; the first row sees keys to below `sees_to`, each other one `further` keys than
    the one before, and each looks back on `window`; then the scale. `room` is memory to work in.
    """
    begin, sees_to, further, window, scale = sight
    scores, weights, shares, sums = room
    stretches = (sees_to + (num_rows - 1) * further - begin + KEYS - 1) // KEYS
    end = (stretches + 1) // 2 * 2 * KEYS
    score(rows, place, apart, num_rows, seen, stretches, size, scores, row_width)
    for row in range(num_rows):
        high = sees_to + row * further
        low = max(high - window, begin)
        shares[row] = _weigh(scores, row * row_width, low - begin, high - begin, end, scale, weights)
    add_up(weights, row_width, num_rows, seen, stretches, size, sums)
    for row in range(num_rows):
        for i in range(0, size, KEYS):
            write_scaled(sums, row * size + i, shares[row], outs, out + row * out_apart + i)


@partial(jit, nogil=True)
def attend(  # noqa: PLR0917  numba takes no names
    phase: Any,
    tiles: Any,
    rows_TW: Any,
    firsts_B: Any,
    counts_B: Any,
    starts_B: Any,
    tables_B: Any,
    slots_N: Any,
    window: Any,
    scale: Any,
    keys_KSD: Any,
    values_KSD: Any,
    out_TQ: Any,
) -> None:
    """Attention of spans, whose keys and values are in the store already, into their rows of `out_TQ`.

    A span is `counts_B` tokens from row `firsts_B` on, the first of them at position `starts_B`, each of which looks
    back on `window` keys, its own included. Where each 16 keys of its sequence lie is in `slots_N`, from `tables_B` on.
    `tiles` are `bf16_unit.configurations`. An item of the phase is one key head of one span.
    """
    key_heads, num_slots, size = keys_KSD.shape
    width, out_width = rows_TW.shape[1], out_TQ.shape[1]
    group = out_width // size // key_heads
    rows, outs = rows_TW.reshape(-1), out_TQ.reshape(-1)
    keys, values, places_N = keys_KSD.reshape(-1), values_KSD.reshape(-1), slots_N * size
    factor = float32(scale)
    most = configured = 0
    for b in range(counts_B.size):
        most = max(most, starts_B[b] + counts_B[b] - _first_key(starts_B[b], window))
    most = (most + _KEYS_AT_ONCE - 1) // _KEYS_AT_ONCE * _KEYS_AT_ONCE
    row_width = most + KEYS  # rows must not lie a power of two apart
    scores, weights = np.empty(ROWS * row_width, np.float32), np.empty(ROWS * row_width, np.uint16)
    shares, sums = np.empty(ROWS, np.float32), np.empty(ROWS * size, np.float32)
    room = (scores, weights, shares, sums)
    copies = copies_of(most, size)
    num_items = counts_B.size * key_heads
    item = claim(phase)
    while item < num_items:
        b, k = item // key_heads, item % key_heads
        count, start = counts_B[b], starts_B[b]
        begin = _first_key(start, window)
        num_stretches = (start + count - begin + KEYS - 1) // KEYS
        # what this thread will probably claim next
        soon = min(item + size_of_team(phase), num_items - 1)
        soon_b, soon_k = soon // key_heads, soon % key_heads
        soon_table = tables_B[soon_b] + _first_key(starts_B[soon_b], window) // KEYS
        # a single token's tile holds the query heads of a key head; else a tile holds tokens, one query head's
        num_rows = group if count == 1 else min(count, ROWS)
        if num_rows != configured:
            configure(tiles[num_rows])
            configured = num_rows
        head_at, soon_at = k * num_slots * size, soon_k * num_slots * size
        table = tables_B[b] + begin // KEYS
        seen = (keys, values, places_N, head_at, table, soon_at, soon_table, copies[0], copies[1])
        make_ready(seen, num_stretches, size)
        if count == 1:
            head = k * group * size
            _attend_tile(
                rows, firsts_B[b] * width + head, size, num_rows, seen, (begin, start + 1, 0, window, factor),
                room, row_width, size, outs, firsts_B[b] * out_width + head, size,
            )  # fmt: skip
        else:
            for head in range(k * group * size, (k + 1) * group * size, size):
                for token in range(0, count, ROWS):
                    # the last rows may overlap with those before, to the same end
                    offset = min(token, count - num_rows)
                    row = firsts_B[b] + offset
                    _attend_tile(
                        rows, row * width + head, width, num_rows, seen,
                        (begin, start + offset + 1, 1, window, factor), room, row_width, size,
                        outs, row * out_width + head, out_width,
                    )  # fmt: skip
        done(phase)
        item = claim(phase)
    if configured:
        release()
    wait(phase, num_items)
