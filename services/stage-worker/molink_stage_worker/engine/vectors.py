"""Sixteen numbers at a time, over flat arrays: float32, or bfloat16 as the integers of their bits.

Rounding 256 sums to bfloat16 took 232 ns as a loop in numba (see `instructions` for why), and 27 here. Places are those
of the first of 16 numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import float32, int64, types
from numba.extending import intrinsic

from molink_stage_worker.engine.compiling import prefetch_at
from molink_stage_worker.engine.instructions import constant, exponential, rounded

LANES = 16
_WORDS = ir.VectorType(ir.IntType(32), LANES)
HALVES = ir.VectorType(ir.IntType(16), LANES)
FLOATS = ir.VectorType(ir.FloatType(), LANES)


def address_in(context: Any, builder: Any, kind: Any, array: Any, place: Any) -> Any:
    """Of an element of a flat array, by its place."""
    view = context.make_array(kind)(context, builder, array)
    return builder.bitcast(builder.gep(view.data, [place]), ir.IntType(8).as_pointer())


def place_of(builder: Any, context: Any, kind: Any, array: Any, at: Any, vector: Any) -> Any:
    """Of a vector in a flat array, by the place of its first element."""
    return builder.bitcast(address_in(context, builder, kind, array, at), vector.as_pointer())


@intrinsic
def write_scaled(_context: Any, sums: Any, at: Any, factor: Any, outs: Any, to: Any) -> Any:
    """16 floats times a factor, rounded."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        there = place_of(builder, context, signature.args[0], arguments[0], arguments[1], FLOATS)
        value = builder.fmul(builder.load(there, align=4), _splat(builder, arguments[2]))
        there = place_of(builder, context, signature.args[3], arguments[3], arguments[4], HALVES)
        builder.store(rounded(builder, value), there, align=2)
        return context.get_dummy_value()

    return types.none(sums, int64, float32, outs, int64), generate


@intrinsic
def copy_vector(_context: Any, array: Any, at: Any, other: Any, to: Any) -> Any:
    """64 bytes from a place of `array` to a place of `other`, whatever their numbers are."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        there = place_of(builder, context, signature.args[0], arguments[0], arguments[1], _WORDS)
        words = builder.load(there, align=2)
        there = place_of(builder, context, signature.args[2], arguments[2], arguments[3], _WORDS)
        builder.store(words, there, align=2)
        return context.get_dummy_value()

    return types.none(array, int64, other, int64), generate


@intrinsic
def write_weights(_context: Any, scores: Any, at: Any, largest: Any, scale: Any, weights: Any) -> Any:
    """``e**((score - largest) * scale)`` of 16 scores to the same place of `weights`; gives their sum, not rounded."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        there = place_of(builder, context, signature.args[0], arguments[0], arguments[1], FLOATS)
        largest, scale = (_splat(builder, argument) for argument in arguments[2:4])
        value = exponential(builder, builder.fmul(builder.fsub(builder.load(there, align=4), largest), scale))
        there = place_of(builder, context, signature.args[4], arguments[4], arguments[1], HALVES)
        builder.store(rounded(builder, value), there, align=2)
        return _summed(builder, value)

    return float32(scores, int64, float32, float32, weights), generate


@intrinsic
def largest_of(_context: Any, scores: Any, at: Any, largest: Any) -> Any:
    """Of 16 floats and one more. Wants numbers: where there is NaN, it gives any of them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        there = place_of(builder, context, signature.args[0], arguments[0], arguments[1], FLOATS)
        return _folded(builder, builder.load(there, align=4), _larger, arguments[2])

    return float32(scores, int64, float32), generate


@intrinsic
def fetch_line(_context: Any, array: Any, place: Any) -> Any:
    """Have the processor fetch the cache line of an element. It may lie outside the array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = address_in(context, builder, signature.args[0], arguments[0], arguments[1])
        prefetch_at(builder, address)
        return context.get_dummy_value()

    return types.none(array, int64), generate


def _splat(builder: Any, scalar: Any) -> Any:
    first = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), scalar, ir.IntType(32)(0))
    return builder.shuffle_vector(first, first, constant(_WORDS, 0))


def _larger(builder: Any, one: Any, other: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)


def _summed(builder: Any, floats: Any) -> Any:
    return _folded(builder, floats, lambda builder, one, other: builder.fadd(one, other), None)


def _folded(builder: Any, floats: Any, fold: Callable[[Any, Any, Any], Any], more: Any) -> Any:
    """One number of 16: halves upon halves, always in the same order."""
    far = LANES // 2
    while far:
        moved = ir.Constant(_WORDS, [(lane + far) % LANES for lane in range(LANES)])
        floats = fold(builder, floats, builder.shuffle_vector(floats, floats, moved))
        far //= 2
    one = builder.extract_element(floats, ir.IntType(32)(0))
    return one if more is None else fold(builder, one, more)
