"""What the compiled loops of an engine are made of: how they are compiled, scalars, and a word to the cache.

A scalar in memory is float32, or bfloat16 as the integer of its bits. What numba compiles is kept in the cache folder,
in a folder for this very version: numba itself looks at the file of a loop only, not at those that it calls.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import float32, int32, types, uint16, uint32
from numba.core import cgutils
from numba.extending import intrinsic, overload

from molink_common.folders import cache_folder


def _kept_in() -> Path:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return cache_folder() / "compiled" / digest.hexdigest()[:16]


numba.config.CACHE_DIR = str(_kept_in())

ANY_ORDER = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be taken in any order, which is what lets them be computed sixteen at a time. NaN stays NaN."""


def jit(function: Any, **options: Any) -> Any:
    """Have numba compile `function`; what comes out is kept, where that can be written."""
    try:
        return numba.njit(function, fastmath=ANY_ORDER, cache=True, **options)
    except RuntimeError:  # nowhere to keep it
        return numba.njit(function, fastmath=ANY_ORDER, **options)


@intrinsic
def float_of(_context: Any, bits: Any) -> Any:
    """The float32 that 32 bits stand for."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return float32(types.uint32), generate


@intrinsic
def _bfloat16_of(_context: Any, x: Any) -> Any:
    """The bits of the bfloat16 next to a float32, ties to even. Rounding must not carry a NaN into a number.

    Written down for LLVM itself: numba would compute with 64 bits, half as many numbers at a time.
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, word(0x7FFF))), word(16))
        is_nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        return builder.trunc(builder.select(is_nan, word(0x7FC0), rounded), ir.IntType(16))

    return uint16(types.float32), generate


def prefetch_at(builder: Any, address: Any) -> None:
    """Write down that the cache line of an address is to be fetched, for reading and to be kept near."""
    word = ir.IntType(32)
    function_type = ir.FunctionType(ir.VoidType(), [address.type, word, word, word])
    function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
    builder.call(function, [address, word(0), word(3), word(1)])


@intrinsic
def prefetch(context: Any, array: Any, row: Any, column: Any) -> Any:
    """Have the processor fetch the cache line of an element."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        view = context.make_array(kind)(context, builder, arguments[0])
        at = cgutils.get_item_pointer(context, builder, kind, view, arguments[1:])
        prefetch_at(builder, builder.bitcast(at, ir.IntType(8).as_pointer()))
        return context.get_dummy_value()

    return types.none(array, row, column), generate


def widen(x: Any) -> Any:
    """A scalar in memory as float32."""
    raise NotImplementedError(x)


@overload(widen, strict=False, jit_options={"fastmath": ANY_ORDER})
def _widen_typed(x: Any) -> Any:
    if x == uint16:
        return lambda x: float_of(uint32(x) << uint32(16))
    return lambda x: x


def narrow(x: Any, like: Any) -> Any:
    """A float32 as a scalar in memory of the type of `like`."""
    raise NotImplementedError(x, like)


@overload(narrow, strict=False)
def _narrow_typed(x: Any, like: Any) -> Any:
    if like != uint16:
        return lambda x, like: x

    return lambda x, like: _bfloat16_of(float32(x))


@jit
def exp(x: Any) -> Any:
    """``e**x`` for x up to 0, to 3e-7 of its value: Taylor's polynomial of ``2**f`` between −½ and ½, and the exponent.

    The library's function takes one number at a time.
    """
    power = x * float32(1.44269504)
    power = power if power > float32(-126.0) else float32(-126.0)
    whole = int32(power - float32(0.5))
    f = power - float32(whole)
    value = float32(1.54035304e-4)
    value = value * f + float32(1.33335581e-3)
    value = value * f + float32(9.61812911e-3)
    value = value * f + float32(5.55041087e-2)
    value = value * f + float32(2.40226507e-1)
    value = value * f + float32(6.93147181e-1)
    value = value * f + float32(1.0)
    return value * float_of(uint32((whole + int32(127)) << int32(23)))
