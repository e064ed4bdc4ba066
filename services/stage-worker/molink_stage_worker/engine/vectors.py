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
from molink_stage_worker.engine.instructions import call, constant, exponential, rounded, widened

LANES = 16
_WORDS = ir.VectorType(ir.IntType(32), LANES)
_HALVES = ir.VectorType(ir.IntType(16), LANES)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)

_Combined = Callable[[Any, Any, Any], Any]
"""Takes LLVM's builder, 16 sums and 16 other numbers, gives what comes of them."""


def address_in(context: Any, builder: Any, kind: Any, array: Any, place: Any) -> Any:
    """Of an element of a flat array, by its place."""
    view = context.make_array(kind)(context, builder, array)
    return builder.bitcast(builder.gep(view.data, [place]), ir.IntType(8).as_pointer())


def _silu(builder: Any, x: Any, _other: Any) -> Any:
    one, zero = constant(_FLOATS, 1.0), constant(_FLOATS, 0.0)
    power = exponential(builder, builder.fneg(call(builder, "fabs", x)))
    share = builder.fdiv(one, builder.fadd(one, power))
    share = builder.select(builder.fcmp_ordered(">=", x, zero), share, builder.fmul(power, share))
    return builder.fmul(x, share)


def _place(builder: Any, context: Any, kind: Any, array: Any, at: Any, vector: Any) -> Any:
    return builder.bitcast(address_in(context, builder, kind, array, at), vector.as_pointer())


def _rounding(what: _Combined | None, reads_other: bool) -> Any:
    """An intrinsic that takes sums, and perhaps another 16 numbers, to what is written."""

    @intrinsic
    def write(_context: Any, sums: Any, at: Any, others: Any, outs: Any, to: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = signature.args
            value = builder.load(_place(builder, context, kinds[0], arguments[0], arguments[1], _FLOATS), align=4)
            if what is not None:
                other = None
                if reads_other:
                    there = _place(builder, context, kinds[2], arguments[2], arguments[4], _HALVES)
                    other = widened(builder, builder.load(there, align=2))
                value = what(builder, value, other)
            there = _place(builder, context, kinds[3], arguments[3], arguments[4], _HALVES)
            builder.store(rounded(builder, value), there, align=2)
            return context.get_dummy_value()

        return types.none(sums, int64, others, outs, int64), generate

    return write


write = _rounding(None, reads_other=False)
write_silu = _rounding(_silu, reads_other=False)
write_product = _rounding(lambda builder, value, other: builder.fmul(value, other), reads_other=True)
write_sum = _rounding(lambda builder, value, other: builder.fadd(value, other), reads_other=True)


@intrinsic
def write_scaled(_context: Any, sums: Any, at: Any, factor: Any, outs: Any, to: Any) -> Any:
    """16 floats times a factor, rounded."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        there = _place(builder, context, signature.args[0], arguments[0], arguments[1], _FLOATS)
        value = builder.fmul(builder.load(there, align=4), _splat(builder, arguments[2]))
        there = _place(builder, context, signature.args[3], arguments[3], arguments[4], _HALVES)
        builder.store(rounded(builder, value), there, align=2)
        return context.get_dummy_value()

    return types.none(sums, int64, float32, outs, int64), generate


@intrinsic
def copy_vector(_context: Any, array: Any, at: Any, other: Any, to: Any) -> Any:
    """64 bytes from a place of `array` to a place of `other`, whatever their numbers are."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        there = _place(builder, context, signature.args[0], arguments[0], arguments[1], _WORDS)
        words = builder.load(there, align=2)
        there = _place(builder, context, signature.args[2], arguments[2], arguments[3], _WORDS)
        builder.store(words, there, align=2)
        return context.get_dummy_value()

    return types.none(array, int64, other, int64), generate


@intrinsic
def add_to(_context: Any, sums: Any, at: Any, more: Any, place: Any) -> Any:
    """Add 16 floats of `more` to those of `sums`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        there = _place(builder, context, signature.args[0], arguments[0], arguments[1], _FLOATS)
        other = _place(builder, context, signature.args[2], arguments[2], arguments[3], _FLOATS)
        value = builder.fadd(builder.load(there, align=4), builder.load(other, align=4))
        builder.store(value, there, align=4)
        return context.get_dummy_value()

    return types.none(sums, int64, more, int64), generate


@intrinsic
def write_weights(_context: Any, scores: Any, at: Any, largest: Any, scale: Any, weights: Any) -> Any:
    """``e**((score - largest) * scale)`` of 16 scores to the same place of `weights`; gives their sum, not rounded."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        there = _place(builder, context, signature.args[0], arguments[0], arguments[1], _FLOATS)
        largest, scale = (_splat(builder, argument) for argument in arguments[2:4])
        value = exponential(builder, builder.fmul(builder.fsub(builder.load(there, align=4), largest), scale))
        there = _place(builder, context, signature.args[4], arguments[4], arguments[1], _HALVES)
        builder.store(rounded(builder, value), there, align=2)
        return _summed(builder, value)

    return float32(scores, int64, float32, float32, weights), generate


@intrinsic
def largest_of(_context: Any, scores: Any, at: Any, largest: Any) -> Any:
    """Of 16 floats and one more. Wants numbers: where there is NaN, it gives any of them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        there = _place(builder, context, signature.args[0], arguments[0], arguments[1], _FLOATS)
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
    first = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), scalar, ir.IntType(32)(0))
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
