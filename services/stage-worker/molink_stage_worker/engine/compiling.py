"""What the compiled loops of an engine are made of: how they are compiled, scalars, and a word to the cache.

A scalar in memory is float32, or bfloat16 as the integer of its bits. What numba compiles is kept in the cache folder,
in a folder for this very version: numba itself looks at the file of a loop only, not at those that it calls. Nor does
it see that a system may forbid the tiles that the processor has, and that other loops are called then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import float32, types, uint16
from numba.core import cgutils
from numba.extending import intrinsic, overload

from molink_common.folders import cache_folder
from molink_stage_worker.engine import instructions
from molink_stage_worker.engine.processor import has_tiles


def _kept_in() -> Path:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    digest.update(bytes([has_tiles()]))
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


def _written_down(make: Callable[[Any, Any], Any], result: Any, argument: Any) -> Any:
    """A function of `instructions` for loops: takes a scalar to a scalar."""

    @intrinsic
    def compute(_context: Any, x: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return make(builder, arguments[0])

        return result(argument), generate

    return compute


exp = _written_down(instructions.exponential, float32, float32)
_bfloat16_of = _written_down(instructions.rounded, uint16, float32)
_float_of = _written_down(instructions.widened, float32, uint16)


def prefetch_at(builder: Any, address: Any, *, is_near: bool = True) -> None:
    """Write down that the cache line of an address is to be fetched, into the nearest cache or the next one."""
    word = ir.IntType(32)
    function_type = ir.FunctionType(ir.VoidType(), [address.type, word, word, word])
    function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
    builder.call(function, [address, word(0), word(3 if is_near else 2), word(1)])


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
        return lambda x: _float_of(x)  # noqa: PLW0108  numba wants a function of Python's here
    return lambda x: x


def narrow(x: Any, like: Any) -> Any:
    """A float32 as a scalar in memory of the type of `like`."""
    raise NotImplementedError(x, like)


@overload(narrow, strict=False)
def _narrow_typed(x: Any, like: Any) -> Any:
    if like != uint16:
        return lambda x, like: x

    return lambda x, like: _bfloat16_of(float32(x))
