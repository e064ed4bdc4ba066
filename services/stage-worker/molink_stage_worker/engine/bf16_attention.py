"""Attention of a step in bfloat16, over the paged store: decode tokens and prompts' chunks alike.

A stretch of 16 keys is turned, and pairs of values are laid side by side, as a processor's `bf16_unit` wants them: once
for all queries that see them. Then scores and sums are products for up to 16 queries at a time, a *tile*. The weights
between are rounded to bfloat16, as torch's fused kernel does; the softmax itself is float32.

A token's result is the same whoever else is in the step, and however its prompt was cut: keys are taken in stretches
that begin at multiples of 32, each row has its own softmax, and what a row does not see counts exactly nothing.

Shapes: as in `kernels`; B spans of a step, each some tokens of one sequence; Q width of all query heads.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, float64, int64, types, uint8, uint16, uint32
from numba.extending import intrinsic

from molink_stage_worker.engine.bf16_unit import DEPTH, ROWS, add_up, configure, is_here, release, score
from molink_stage_worker.engine.compiling import jit
from molink_stage_worker.engine.step_plan import KEYS_OF_A_STRETCH as KEYS
from molink_stage_worker.engine.vectors import (
    address_in,
    fetch_line,
    largest_of,
    write_pairs,
    write_scaled,
    write_weights,
)

_TILE_WORDS = 256
_TILES_AT_ONCE = 4
_AHEAD = 2
"""Stretches before their turn keys and values are fetched: they lie anywhere in memory."""
_LINE_NUMBERS = 32
_HIDDEN = float32(-np.inf)


def can_attend(*, head_size: int, group: int, block_size: int) -> bool:
    """Whether heads of this size, so many query heads a key head, and blocks of this size come out even in tiles."""
    return head_size % DEPTH == 0 and group <= ROWS and block_size % KEYS == 0


@cache
def is_ready() -> bool:
    """Whether `attend` can be used. Compiles, some seconds."""
    if not is_here():
        return False
    integers, rows, store = int64[::1], uint16[:, ::1], uint16[:, :, ::1]
    attend.compile((uint8[:, ::1], rows, *(integers,) * 5, int64, float64, store, store, rows))
    return True


@intrinsic
def _turn(_context: Any, numbers: Any, place: Any, apart: Any, words: Any, there: Any) -> Any:
    """16 rows of 16 pairs of numbers, which lie `apart`, to 16 rows of 16 words side by side: rows become columns.

    Four rounds in each of which two rows change halves, quarters, eighths, ...
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(ir.IntType(32), ROWS)
        from_kind, to_kind = signature.args[0], signature.args[3]

        def pointer(kind: Any, array: Any, at: Any) -> Any:
            return builder.bitcast(address_in(context, builder, kind, array, at), vector.as_pointer())

        at, rows = arguments[1], []
        for _ in range(ROWS):
            rows.append(builder.load(pointer(from_kind, arguments[0], at), align=2))
            at = builder.add(at, arguments[2])
        for far in (1, 2, 4, 8):
            low = [lane if not lane & far else ROWS + lane - far for lane in range(ROWS)]
            high = [lane + far if not lane & far else ROWS + lane for lane in range(ROWS)]
            masks = [ir.Constant(ir.VectorType(ir.IntType(32), ROWS), mask) for mask in (low, high)]
            for i in (row for row in range(ROWS) if not row & far):
                pair = rows[i], rows[i + far]
                rows[i], rows[i + far] = (builder.shuffle_vector(*pair, mask) for mask in masks)
        for number, row in enumerate(rows):
            to = builder.add(arguments[4], ir.Constant(arguments[4].type, number * ROWS))
            builder.store(row, pointer(to_kind, arguments[3], to), align=4)
        return context.get_dummy_value()

    return types.none(numbers, int64, int64, words, int64), generate


@jit
def _lay_out(keys: Any, values: Any, at: Any, key_words: Any, value_words: Any, stretch: Any, size: Any) -> None:
    """The keys and values of a stretch, which begin at number `at`, for the products."""
    parts = size // DEPTH
    for part in range(parts):
        _turn(keys, at + part * DEPTH, size, key_words, (stretch * parts + part) * _TILE_WORDS)
    to = stretch * (KEYS // 2) * size
    for pair in range(KEYS // 2):
        one = at + 2 * pair * size
        for i in range(0, size, KEYS):
            write_pairs(values, one + i, one + size + i, value_words, to + pair * size + i)


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
def _fetch(keys: Any, values: Any, at: Any, size: Any) -> None:
    """Have a stretch fetched, keys and values."""
    for line in range(0, KEYS * size, _LINE_NUMBERS):
        fetch_line(keys, at + line)
        fetch_line(values, at + line)


@jit
def _attend_tile(
    rows: Any, place: Any, apart: Any, num_rows: Any, laid_out: Any, sight: Any, room: Any, row_width: Any, size: Any,
    outs: Any, out: Any, out_apart: Any,
) -> None:  # fmt: skip
    """Of a tile of queries, with keys and values that are laid out from key `begin` on.

    `sight` is: the first row sees keys to below `sees_to`, each other one `further` keys than the one before, and each
    looks back on `window`; then the scale. `room` is memory to work in.
    """
    key_words, value_words, begin = laid_out
    sees_to, further, window, scale = sight
    scores, weights, shares, sums = room
    stretches = (sees_to + (num_rows - 1) * further - begin + KEYS - 1) // KEYS
    end = (stretches + 1) // 2 * 2 * KEYS
    score(rows, place, apart, num_rows, key_words, stretches, size, scores, row_width)
    for row in range(num_rows):
        high = sees_to + row * further
        low = max(high - window, begin)
        shares[row] = _weigh(scores, row * row_width, low - begin, high - begin, end, scale, weights)
    add_up(weights, row_width, num_rows, value_words, end // KEYS, size, sums)
    for row in range(num_rows):
        for i in range(0, size, KEYS):
            write_scaled(sums, row * size + i, shares[row], outs, out + row * out_apart + i)


@partial(jit, nogil=True)
def attend(
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
    `tiles` are `bf16_unit.configurations`.
    """
    key_heads, num_slots, size = keys_KSD.shape
    width, out_width = rows_TW.shape[1], out_TQ.shape[1]
    group = out_width // size // key_heads
    rows, outs = rows_TW.reshape(-1), out_TQ.reshape(-1)
    keys, values = keys_KSD.reshape(-1), values_KSD.reshape(-1)
    factor = float32(scale)
    most = configured = 0
    for b in range(counts_B.size):
        most = max(most, starts_B[b] + counts_B[b] - _first_key(starts_B[b], window))
    at_once = _TILES_AT_ONCE * KEYS
    most = (most + at_once - 1) // at_once * at_once
    row_width = most + KEYS  # rows must not lie a power of two apart
    key_words, value_words = np.empty(most * size // 2, np.uint32), np.empty(most * size // 2, np.uint32)
    scores, weights = np.empty(ROWS * row_width, np.float32), np.empty(ROWS * row_width, np.uint16)
    shares, sums = np.empty(ROWS, np.float32), np.empty(ROWS * size, np.float32)
    room = (scores, weights, shares, sums)
    for b in range(counts_B.size):
        count, start = counts_B[b], starts_B[b]
        begin = _first_key(start, window)
        num_stretches = (start + count - begin + KEYS - 1) // KEYS
        next_b = min(b + 1, counts_B.size - 1)
        table = tables_B[b] + begin // KEYS
        next_table = tables_B[next_b] + _first_key(starts_B[next_b], window) // KEYS
        # a single token's tile holds the query heads of a key head; else a tile holds tokens, one query head's
        num_rows = group if count == 1 else min(count, ROWS)
        if num_rows != configured:
            configure(tiles[num_rows])
            configured = num_rows
        for k in range(key_heads):
            head_at = k * num_slots * size
            for stretch in range(num_stretches):
                # what comes soon: of this key head, of the next one, or of the next span
                soon = stretch + _AHEAD
                if soon < num_stretches:
                    _fetch(keys, values, head_at + slots_N[table + soon] * size, size)
                elif k + 1 < key_heads:
                    soon = min(soon - num_stretches, num_stretches - 1)
                    _fetch(keys, values, head_at + (num_slots + slots_N[table + soon]) * size, size)
                else:
                    soon = min(next_table + soon - num_stretches, slots_N.size - 1)
                    _fetch(keys, values, slots_N[soon] * size, size)
                at = head_at + slots_N[table + stretch] * size
                _lay_out(keys, values, at, key_words, value_words, stretch, size)
            if num_stretches % 2:
                half = KEYS // 2 * size
                value_words[num_stretches * half : (num_stretches + 1) * half] = uint32(0)
            laid_out = (key_words, value_words, begin)
            if count == 1:
                head = k * group * size
                _attend_tile(
                    rows, firsts_B[b] * width + head, size, num_rows, laid_out, (start + 1, 0, window, factor),
                    room, row_width, size, outs, firsts_B[b] * out_width + head, size,
                )  # fmt: skip
                continue
            for head in range(k * group * size, (k + 1) * group * size, size):
                for token in range(0, count, ROWS):
                    # the last rows may overlap with those before, to the same end
                    offset = min(token, count - num_rows)
                    row = firsts_B[b] + offset
                    _attend_tile(
                        rows, row * width + head, width, num_rows, laid_out, (start + offset + 1, 1, window, factor),
                        room, row_width, size, outs, row * out_width + head, out_width,
                    )  # fmt: skip
    release()
