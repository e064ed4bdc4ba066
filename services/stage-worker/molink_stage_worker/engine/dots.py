"""Dot products of pairs of bfloat16 (AVX-512 BF16: AMD since Zen 4, some of Intel's) for compiled loops.

One instruction, VDPBF16PS, adds to each of 16 sums in float32 the products of two activations with two weights
(Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2). A *vector* is 16 pairs of weights side by
side, 64 bytes; the same two activations meet all of them. What is written down here keeps all sums of up to six rows
in registers from the first pair to the last. The weights of a matrix lie in 12 bits each (`twelve_bits`); keys and
values of attention lie as they are.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import int64, types
from numba.core import cgutils
from numba.extending import intrinsic

from molink_stage_worker.engine import twelve_bits
from molink_stage_worker.engine.compiling import prefetch_at
from molink_stage_worker.engine.vectors import LANES, address_in

MOST_ROWS = 6
"""Four vectors of sums for each, four of weights and one of activations: 29 of the 32 registers."""
VECTOR_BYTES = 64
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_PAIRS = ir.VectorType(ir.IntType(32), LANES)
_PLACE = ir.IntType(64)


def _dots(num_vectors: int, *, goes_on: bool = False, are_apart: bool = False, in_twelve_bits: bool = False) -> Any:
    """An intrinsic: sums of 1 to 6 rows of activations with so many vectors of weights, over all `pairs`.

    Vectors of weights lie side by side, those of the next pair `pairs_apart` bytes further; rows of activations lie
    `x_apart` numbers apart, rows of sums `sums_apart`. Sums that go on begin with what is there. As many cache lines as
    there are vectors are fetched every `fetch_every` pairs, from number `fetch_at` of the array `far` on. Where vectors
    are apart, `weights_at` and `fetch_at` are tuples, a place for each. In 12 bits, `weights_at` is the place of a
    block of `twelve_bits`, which knows how far pairs are apart and how many lines they are.
    """

    @intrinsic
    def dots(  # noqa: PLR0917  numba takes no names
        _context: Any, num_rows: Any, x: Any, x_at: Any, x_apart: Any, weights: Any, weights_at: Any,
        pairs_apart: Any, pairs: Any, far: Any, fetch_at: Any, fetch_every: Any,
        sums: Any, sums_at: Any, sums_apart: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            for count in range(1, MOST_ROWS + 1):
                with builder.if_then(builder.icmp_signed("==", arguments[0], _PLACE(count))):
                    _of_rows(
                        count, num_vectors, goes_on, in_twelve_bits, context, builder, signature.args[1:], arguments[1:]
                    )
            return context.get_dummy_value()

        at = types.UniTuple(int64, num_vectors) if are_apart else int64
        kinds = (int64, x, int64, int64, weights, at, int64, int64, far, at, int64, sums, int64, int64)
        return types.none(*kinds), generate

    return dots


def _of_rows(
    num_rows: int, num_vectors: int, goes_on: bool, in_twelve_bits: bool,
    context: Any, builder: Any, kinds: Any, arguments: Any,
) -> None:  # fmt: skip
    """Write the sums of that many rows down; `arguments`, of `kinds`, are those of the intrinsic."""
    (x, x_at, x_apart, weights, weights_at, pairs_apart, pairs, far, fetch_at, fetch_every,
     sums, sums_at, sums_apart) = arguments  # fmt: skip
    x_kind, weights_kind, far_kind, sums_kind = kinds[0], kinds[3], kinds[7], kinds[10]
    function_type = ir.FunctionType(_FLOATS, [_FLOATS, _PAIRS, _PAIRS])
    add = cgutils.get_or_insert_function(builder.module, function_type, "llvm.x86.avx512bf16.dpbf16ps.512")

    def row_at(kind: Any, array: Any, at: Any, apart: Any, row: int) -> Any:
        return address_in(context, builder, kind, array, builder.add(at, builder.mul(apart, _PLACE(row))))

    rows = [row_at(x_kind, x, x_at, x_apart, row) for row in range(num_rows)]

    def lines_at(kind: Any, array: Any, at: Any, num_lines: int) -> list[Any]:
        if isinstance(at.type, ir.ArrayType):
            return [address_in(context, builder, kind, array, one) for one in cgutils.unpack_tuple(builder, at)]
        begin = address_in(context, builder, kind, array, at)
        return [builder.gep(begin, [_PLACE(VECTOR_BYTES * line)]) for line in range(num_lines)]

    fars = lines_at(far_kind, far, fetch_at, twelve_bits.LINES if in_twelve_bits else num_vectors)
    line_bytes = VECTOR_BYTES * (1 if isinstance(fetch_at.type, ir.ArrayType) else len(fars))
    reader = None
    if in_twelve_bits:
        reader = twelve_bits.Reader(builder, address_in(context, builder, weights_kind, weights, weights_at))
        read = reader.vectors_at
    else:
        firsts = lines_at(weights_kind, weights, weights_at, num_vectors)

        def read(pair: Any) -> list[Any]:
            at = builder.mul(pair, pairs_apart)
            there = [builder.bitcast(builder.gep(first, [at]), _PAIRS.as_pointer()) for first in firsts]
            return [builder.load(vector, align=4) for vector in there]

    sums_of = [row_at(sums_kind, sums, sums_at, sums_apart, row) for row in range(num_rows)]

    def vector_of(row: int, vector: int) -> Any:
        return builder.bitcast(builder.gep(sums_of[row], [_PLACE(VECTOR_BYTES * vector)]), _FLOATS.as_pointer())

    zero = ir.Constant(_FLOATS, [0.0] * LANES)
    # LLVM makes registers of them
    kept = [[cgutils.alloca_once(builder, _FLOATS) for _ in range(num_vectors)] for _ in range(num_rows)]
    fetched, wait = (cgutils.alloca_once(builder, _PLACE) for _ in range(2))
    for place in (fetched, wait):
        builder.store(_PLACE(0), place)
    for row, kept_V in enumerate(kept):
        for vector, sum_ in enumerate(kept_V):
            builder.store(builder.load(vector_of(row, vector), align=4) if goes_on else zero, sum_)
    with cgutils.for_range(builder, pairs) as loop:
        with builder.if_then(builder.icmp_signed("==", builder.load(wait), _PLACE(0))):
            line = builder.load(fetched)
            for far_vector in fars:
                prefetch_at(builder, builder.gep(far_vector, [line]), is_near=False)
            builder.store(builder.add(line, _PLACE(line_bytes)), fetched)
            builder.store(fetch_every, wait)
        builder.store(builder.sub(builder.load(wait), _PLACE(1)), wait)
        vectors = read(loop.index)
        for row, kept_V in zip(rows, kept, strict=True):
            pair = builder.gep(row, [builder.mul(loop.index, _PLACE(4))])
            pair = builder.load(builder.bitcast(pair, ir.IntType(32).as_pointer()), align=2)
            one = builder.insert_element(ir.Constant(_PAIRS, ir.Undefined), pair, ir.IntType(32)(0))
            everywhere = builder.shuffle_vector(one, one, ir.Constant(_PAIRS, [0] * LANES))
            for sum_, vector in zip(kept_V, vectors, strict=True):
                builder.store(builder.call(add, [builder.load(sum_), everywhere, vector]), sum_)
    for row, kept_V in enumerate(kept):
        for vector, sum_ in enumerate(kept_V):
            builder.store(builder.load(sum_), vector_of(row, vector), align=4)
    if reader is not None:
        reader.add_left_out(rows, sums_of)


dots_of_block = _dots(4, in_twelve_bits=True)
dots_1 = _dots(1)
dots_4_apart = _dots(4, are_apart=True)
more_dots_4 = _dots(4, goes_on=True)
more_dots_2 = _dots(2, goes_on=True)
