"""Arithmetic written down as LLVM's instructions, for one float32 or for a vector of them.

Of loops in numba LLVM often does not make vectors, since numba counts with 64 bits and cannot tell that two arrays do
not overlap. A function here takes LLVM's builder and a value, and gives the value that comes out.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils


def like(value: Any, scalar: Any) -> Any:
    """The type of as many of `scalar` as there are in `value`."""
    kind = value.type
    return ir.VectorType(scalar, kind.count) if isinstance(kind, ir.VectorType) else scalar


def constant(kind: Any, number: float) -> Any:
    """A number of that type, or as often as the vector is long."""
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


def call(builder: Any, name: str, *arguments: Any) -> Any:
    """Of a function of LLVM's whose arguments are all of one type, which it gives as well."""
    kind = arguments[0].type
    suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
    function_type = ir.FunctionType(kind, [kind] * len(arguments))
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.{name}.{suffix}")
    return builder.call(function, arguments)


def widened(builder: Any, halves: Any) -> Any:
    """bfloat16, as the integers of their bits, to float32."""
    words = like(halves, ir.IntType(32))
    bits = builder.shl(builder.zext(halves, words), constant(words, 16))
    return builder.bitcast(bits, like(halves, ir.FloatType()))


def rounded(builder: Any, floats: Any) -> Any:
    """To the bits of the bfloat16 next to it, ties to even. Rounding must not carry a NaN into a number."""
    words = like(floats, ir.IntType(32))
    bits = builder.bitcast(floats, words)
    odd = builder.and_(builder.lshr(bits, constant(words, 16)), constant(words, 1))
    upper = builder.lshr(builder.add(bits, builder.add(odd, constant(words, 0x7FFF))), constant(words, 16))
    is_nan = builder.fcmp_unordered("uno", floats, floats)
    return builder.trunc(builder.select(is_nan, constant(words, 0x7FC0), upper), like(floats, ir.IntType(16)))


def exponential(builder: Any, x: Any) -> Any:
    """``e**x`` for x up to 0, to 3e-7 of its value: Taylor's polynomial of ``2**f`` between −½ and ½, and the exponent.

    The library's function takes one number at a time.
    """
    floats, words = x.type, like(x, ir.IntType(32))
    power, least = builder.fmul(x, constant(floats, 1.44269504)), constant(floats, -126.0)
    power = builder.select(builder.fcmp_ordered(">", power, least), power, least)
    whole = builder.fptosi(builder.fsub(power, constant(floats, 0.5)), words)
    f = builder.fsub(power, builder.sitofp(whole, floats))
    value = constant(floats, 1.54035304e-4)
    for factor in (1.33335581e-3, 9.61812911e-3, 5.55041087e-2, 2.40226507e-1, 6.93147181e-1, 1.0):
        value = call(builder, "fmuladd", value, f, constant(floats, factor))
    exponent = builder.shl(builder.add(whole, constant(words, 127)), constant(words, 23))
    return builder.fmul(value, builder.bitcast(exponent, floats))


def silu(builder: Any, x: Any) -> Any:
    """``x / (1 + e**-x)``."""
    one, zero = constant(x.type, 1.0), constant(x.type, 0.0)
    power = exponential(builder, builder.fneg(call(builder, "fabs", x)))
    share = builder.fdiv(one, builder.fadd(one, power))
    share = builder.select(builder.fcmp_ordered(">=", x, zero), share, builder.fmul(power, share))
    return builder.fmul(x, share)
