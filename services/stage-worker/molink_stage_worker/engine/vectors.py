"""Sixteen numbers at a time, written down for LLVM itself.

What numba writes for a loop of sixteen LLVM often does not take as a vector: it cannot know that two arrays do not
overlap, and numba counts with 64 bits. Rounding 256 sums to bfloat16 took 232 ns so, and 27 here.

All arrays are flat, float32 or bfloat16 as the integers of their bits; places are those of the first of 16 numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import float32, int64, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
_WORDS = ir.VectorType(ir.IntType(32), LANES)
_HALVES = ir.VectorType(ir.IntType(16), LANES)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)

Maker = Callable[..., Any]
"""Takes LLVM's builder and values, writes instructions down, gives the value that comes out."""


def address_in(context: Any, builder: Any, kind: Any, array: Any, place: Any) -> Any:
    """Of an element of a flat array, by its place."""
    view = context.make_array(kind)(context, builder, array)
    return builder.bitcast(builder.gep(view.data, [place]), ir.IntType(8).as_pointer())


def _all(kind: Any, value: float) -> Any:
    return ir.Constant(kind, [value] * LANES)


def _call(builder: Any, name: str, *arguments: Any) -> Any:
    function_type = ir.FunctionType(arguments[0].type, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.{name}.v{LANES}f32")
    return builder.call(function, arguments)


def _widened(builder: Any, halves: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(halves, _WORDS), _all(_WORDS, 16)), _FLOATS)


def _rounded(builder: Any, floats: Any) -> Any:
    """To bfloat16, ties to even; NaN stays NaN."""
    bits = builder.bitcast(floats, _WORDS)
    odd = builder.and_(builder.lshr(bits, _all(_WORDS, 16)), _all(_WORDS, 1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _all(_WORDS, 0x7FFF))), _all(_WORDS, 16))
    is_nan = builder.fcmp_unordered("uno", floats, floats)
    return builder.trunc(builder.select(is_nan, _all(_WORDS, 0x7FC0), rounded), _HALVES)


def _exp(builder: Any, x: Any) -> Any:
    """See `compiling.exp`."""
    power = builder.fmul(x, _all(_FLOATS, 1.44269504))
    least = _all(_FLOATS, -126.0)
    power = builder.select(builder.fcmp_ordered(">", power, least), power, least)
    whole = builder.fptosi(builder.fsub(power, _all(_FLOATS, 0.5)), _WORDS)
    f = builder.fsub(power, builder.sitofp(whole, _FLOATS))
    value = _all(_FLOATS, 1.54035304e-4)
    for factor in (1.33335581e-3, 9.61812911e-3, 5.55041087e-2, 2.40226507e-1, 6.93147181e-1, 1.0):
        value = _call(builder, "fma", value, f, _all(_FLOATS, factor))
    exponent = builder.shl(builder.add(whole, _all(_WORDS, 127)), _all(_WORDS, 23))
    return builder.fmul(value, builder.bitcast(exponent, _FLOATS))


def _silu(builder: Any, x: Any, _other: Any) -> Any:
    one, zero = _all(_FLOATS, 1.0), _all(_FLOATS, 0.0)
    power = _exp(builder, builder.fneg(_call(builder, "fabs", x)))
    share = builder.fdiv(one, builder.fadd(one, power))
    share = builder.select(builder.fcmp_ordered(">=", x, zero), share, builder.fmul(power, share))
    return builder.fmul(x, share)


def _place(builder: Any, context: Any, kind: Any, array: Any, at: Any, vector: Any) -> Any:
    return builder.bitcast(address_in(context, builder, kind, array, at), vector.as_pointer())


def _rounding(what: Maker | None, reads_other: bool) -> Any:
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
                    other = _widened(builder, builder.load(there, align=2))
                value = what(builder, value, other)
            there = _place(builder, context, kinds[3], arguments[3], arguments[4], _HALVES)
            builder.store(_rounded(builder, value), there, align=2)
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
        builder.store(_rounded(builder, value), there, align=2)
        return context.get_dummy_value()

    return types.none(sums, int64, float32, outs, int64), generate


@intrinsic
def write_pairs(_context: Any, numbers: Any, low: Any, high: Any, words: Any, to: Any) -> Any:
    """16 numbers from `low` on and 16 from `high` on, as halves of 16 words."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        halves = (
            builder.zext(
                builder.load(_place(builder, context, signature.args[0], arguments[0], at, _HALVES), align=2), _WORDS
            )
            for at in arguments[1:3]
        )
        low, high = halves
        there = _place(builder, context, signature.args[3], arguments[3], arguments[4], _WORDS)
        builder.store(builder.or_(low, builder.shl(high, _all(_WORDS, 16))), there, align=4)
        return context.get_dummy_value()

    return types.none(numbers, int64, int64, words, int64), generate


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
        value = _exp(builder, builder.fmul(builder.fsub(builder.load(there, align=4), largest), scale))
        there = _place(builder, context, signature.args[4], arguments[4], arguments[1], _HALVES)
        builder.store(_rounded(builder, value), there, align=2)
        return _summed(builder, value)

    return float32(scores, int64, float32, float32, weights), generate


@intrinsic
def largest_of(_context: Any, scores: Any, at: Any, largest: Any) -> Any:
    """Of 16 floats and one more. Wants numbers: where there is NaN, it gives any of them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        there = _place(builder, context, signature.args[0], arguments[0], arguments[1], _FLOATS)
        return _folded(builder, builder.load(there, align=4), _larger, arguments[2])

    return float32(scores, int64, float32), generate


def _splat(builder: Any, scalar: Any) -> Any:
    first = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), scalar, ir.IntType(32)(0))
    return builder.shuffle_vector(first, first, _all(_WORDS, 0))


def _larger(builder: Any, one: Any, other: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)


def _summed(builder: Any, floats: Any) -> Any:
    return _folded(builder, floats, lambda builder, one, other: builder.fadd(one, other), None)


def _folded(builder: Any, floats: Any, fold: Maker, more: Any) -> Any:
    """One number of 16: halves upon halves, always in the same order."""
    far = LANES // 2
    while far:
        moved = ir.Constant(_WORDS, [(lane + far) % LANES for lane in range(LANES)])
        floats = fold(builder, floats, builder.shuffle_vector(floats, floats, moved))
        far //= 2
    one = builder.extract_element(floats, ir.IntType(32)(0))
    return one if more is None else fold(builder, one, more)
