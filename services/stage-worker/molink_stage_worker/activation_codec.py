"""Hidden states on a link in fewer bytes: lossless, or approximate in about half of them.

    RAW        the scalars as they are
    LOSSLESS   ┌ lower bytes of all scalars ┬ zstd frame of their highest bytes ┐
    INT8       ┌ largest magnitude of each group, bfloat16 ┬ one signed byte a scalar ┐

What an encoding cannot make smaller travels as it is: data of exactly the raw length is raw under every codec, and
an encoding is always shorter. So no flag is needed, and raw rows keep their alignment in the frame.

The highest byte of a scalar is its sign and (most of) its exponent: in real activations about 3 bits of information.
The bytes below are noise, which no compressor makes smaller, so they are not tried. Since they travel as they are,
decoded data is at most twice as long as what arrived, whatever a peer sends.

INT8 divides each row into groups of up to 64 neighbouring channels and stores each scalar as a 127th of the largest
magnitude of its group (absmax quantization; Dettmers and others, "LLM.int8()", arXiv 2208.07339, explains why one
scale a row is too coarse: a few channels are far larger than the rest). NaN and infinity have no such form: a
tensor that has one anywhere travels raw, so they arrive as they were.

Shapes: N scalars in a tensor, G groups of `size` scalars.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from molink_common.errors import ProtocolError
from molink_common.messages import Dtype
from molink_common.wire import Codec

EXACTNESS: Mapping[Codec, str] = MappingProxyType(
    {
        Codec.RAW: "bit-exact",
        Codec.LOSSLESS: "bit-exact",
        Codec.INT8: "approximate: off by at most 1/125 of the largest of 64 neighbouring channels",
    }
)

_Bits = npt.NDArray[Any]
"""Scalars as unsigned integers of their width, or parts of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Format:
    """An IEEE 754 layout. The magnitudes of its numbers order like their bits without the sign."""

    bits: np.dtype[Any]
    magnitude_mask: int
    largest_magnitude: int
    """The largest that can be a group's: rounded up to bfloat16 and decoded, it is still finite."""
    largest_group_max: int
    """The same as bfloat16 bits."""


_FORMATS = {
    Dtype.FLOAT32: _Format(
        bits=np.dtype("<u4"), magnitude_mask=0x7FFFFFFF, largest_magnitude=0x7F7F0000, largest_group_max=0x7F7F
    ),
    Dtype.BFLOAT16: _Format(
        bits=np.dtype("<u2"), magnitude_mask=0x7FFF, largest_magnitude=0x7F7F, largest_group_max=0x7F7F
    ),
    # 64768; the next bfloat16 is 65536, which float16 cannot hold
    Dtype.FLOAT16: _Format(
        bits=np.dtype("<u2"), magnitude_mask=0x7FFF, largest_magnitude=0x7BE8, largest_group_max=0x477D
    ),
}
_GROUP_CHANNELS = 64
_BLOCK_SCALARS = 1 << 16
"""Worked on at a time, so that intermediate values stay in the cache."""
_LEAST_GROUP_MAX = 0x0D80
"""2⁻¹⁰⁰ as bfloat16. A group of smaller numbers decodes to zeros; the inverse of its scale would overflow."""
_SMALLEST_INT8 = -128


class _Zstd(threading.local):
    """A context a thread: they must not be shared."""

    def __init__(self) -> None:
        # A table of 64 entries finds hardly a match, and fast: what is left is the entropy coder, which is what pays.
        parameters = zstandard.ZstdCompressionParameters.from_level(
            1, strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6
        )
        self.compressor = zstandard.ZstdCompressor(compression_params=parameters)
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _Zstd()


def encode_hidden(hidden: memoryview, *, hidden_size: int, dtype: Dtype, codec: Codec) -> memoryview:
    """`T × hidden_size` scalars, encoded; never longer than they were, and themselves if that is not shorter.

    Raises:
        ValueError: they are not whole rows (our own mistake).
    """
    if hidden.nbytes % (hidden_size * dtype.size_bytes):
        raise ValueError(f"{hidden.nbytes} bytes are no whole rows of {hidden_size} {dtype}")
    layout = _FORMATS[dtype]
    bits_N: _Bits = np.frombuffer(hidden, layout.bits)
    encoded: _Bits | None = None
    match codec:
        case Codec.LOSSLESS if bits_N.size:
            encoded = _encode_lossless(bits_N)
        case Codec.INT8 if _int8_bytes(bits_N.size, hidden_size) < hidden.nbytes:
            encoded = _encode_int8(bits_N, layout, dtype, _group_size(hidden_size))
    return hidden if encoded is None else encoded.data


def decode_hidden(data: memoryview, *, num_tokens: int, hidden_size: int, dtype: Dtype, codec: Codec) -> memoryview:
    """`num_tokens × hidden_size` scalars as one-dimensional bytes; a view of `data` where it is raw.

    Raises:
        ProtocolError: `data` is no encoding of so many scalars. Nothing large was allocated to find out.
    """
    num_scalars = num_tokens * hidden_size
    expected = num_scalars * dtype.size_bytes
    if data.nbytes == expected:
        return data.cast("B")
    if data.nbytes > expected or codec not in (Codec.LOSSLESS, Codec.INT8):
        raise ProtocolError(f"{data.nbytes} bytes of hidden states where {expected} belong")
    layout = _FORMATS[dtype]
    bytes_: _Bits = np.frombuffer(data, np.uint8)
    if codec is Codec.LOSSLESS:
        bits_N = _decode_lossless(bytes_, layout, num_scalars)
    else:
        if data.nbytes != _int8_bytes(num_scalars, hidden_size):
            raise ProtocolError(f"{data.nbytes} bytes are no int8 form of {num_tokens} tokens of {hidden_size}")
        bits_N = _decode_int8(bytes_, layout, dtype, num_scalars, _group_size(hidden_size))
    return bits_N.view(np.uint8).data


# --- lossless ------------------------------------------------------------------------------------------------------


def _lower_planes(size: int, width: int) -> list[tuple[int, slice, type[np.unsignedinteger[Any]]]]:
    """Of the bytes below the highest: how far to shift down to each plane, where it lies, and its type."""
    if width == 2:
        return [(0, slice(0, size), np.uint8)]
    return [(0, slice(0, 2 * size), np.uint16), (16, slice(2 * size, 3 * size), np.uint8)]


def _encode_lossless(bits_N: _Bits) -> _Bits | None:
    """None: it does not get shorter."""
    size, width = bits_N.size, bits_N.itemsize
    highest_N = (bits_N >> (8 * width - 8)).astype(np.uint8)
    compressed = _zstd.compressor.compress(highest_N.data)
    if len(compressed) >= size:
        return None
    lower_bytes = size * (width - 1)
    out: _Bits = np.empty(lower_bytes + len(compressed), np.uint8)
    for shift, place, kind in _lower_planes(size, width):
        np.copyto(out[place].view(kind), bits_N >> shift if shift else bits_N, casting="unsafe")
    out[lower_bytes:] = np.frombuffer(compressed, np.uint8)
    return out


def _decode_lossless(data: _Bits, layout: _Format, size: int) -> _Bits:
    width = layout.bits.itemsize
    lower_bytes = size * (width - 1)
    if data.size <= lower_bytes:
        raise ProtocolError(f"{data.size} bytes are no lossless form of {size} scalars")
    bits_N = _decompress(data[lower_bytes:], size).astype(layout.bits)
    bits_N <<= 8 * width - 8
    for shift, place, kind in _lower_planes(size, width):
        plane = data[place].view(kind)
        np.bitwise_or(bits_N, plane.astype(layout.bits) << shift if shift else plane, out=bits_N)
    return bits_N


def _decompress(frame: _Bits, size: int) -> _Bits:
    """Exactly `size` bytes from one zstd frame."""
    try:
        # the declared size bounds what zstd writes
        if zstandard.get_frame_parameters(frame.data).content_size != size:
            raise ProtocolError(f"a zstd frame that does not hold {size} bytes")
        plain = _zstd.decompressor.decompress(frame.data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ProtocolError(f"hidden states that do not decompress: {error}") from error
    if len(plain) != size:
        raise ProtocolError(f"a zstd frame of {len(plain)} bytes where {size} belong")
    return np.frombuffer(plain, np.uint8)


# --- int8 ----------------------------------------------------------------------------------------------------------


def _group_size(hidden_size: int) -> int:
    return math.gcd(hidden_size, _GROUP_CHANNELS)


def _int8_bytes(num_scalars: int, hidden_size: int) -> int:
    return num_scalars + 2 * (num_scalars // _group_size(hidden_size))


def _encode_int8(bits_N: _Bits, layout: _Format, dtype: Dtype, size: int) -> _Bits | None:
    """None: a number is not finite, or so large that it would not be when it is decoded."""
    bits_GS = bits_N.reshape(-1, size)
    num_groups = len(bits_GS)
    out: _Bits = np.empty(2 * num_groups + bits_N.size, np.uint8)
    maxima_G = out[: 2 * num_groups].view("<u2")
    values_GS = out[2 * num_groups :].view(np.int8).reshape(-1, size)
    groups = max(1, _BLOCK_SCALARS // size)
    for at in range(0, num_groups, groups):
        block = slice(at, at + groups)
        magnitude_G = (bits_GS[block] & layout.magnitude_mask).max(axis=1)
        if int(magnitude_G.max()) > layout.largest_magnitude:
            return None
        max_G = _group_max(magnitude_G, dtype)
        max_G[max_G < _LEAST_GROUP_MAX] = 0
        maxima_G[block] = max_G
        per_unit_G = 127 / _widened(np.maximum(max_G, _LEAST_GROUP_MAX))
        scaled_GS = _floats(bits_GS[block], dtype)
        scaled_GS *= per_unit_G[:, None]
        np.rint(scaled_GS, out=scaled_GS)
        np.copyto(values_GS[block], scaled_GS, casting="unsafe")
    return out


def _decode_int8(data: _Bits, layout: _Format, dtype: Dtype, num_scalars: int, size: int) -> _Bits:
    num_groups = num_scalars // size
    maxima_G = data[: 2 * num_groups].view("<u2")
    if int(maxima_G.max()) > layout.largest_group_max:
        raise ProtocolError("an int8 group with a scale that is not finite")
    values_GS = data[2 * num_groups :].view(np.int8).reshape(-1, size)
    unit_G = _widened(maxima_G) / np.float32(127)
    bits_GS: _Bits = np.empty((num_groups, size), layout.bits)
    groups = max(1, _BLOCK_SCALARS // size)
    for at in range(0, num_groups, groups):
        block = slice(at, at + groups)
        if int(values_GS[block].min()) == _SMALLEST_INT8:
            raise ProtocolError("an int8 value beyond its group's largest")
        scalars_GS = values_GS[block].astype(np.float32)
        scalars_GS *= unit_G[block, None]
        _store(scalars_GS, bits_GS[block], dtype)
    return bits_GS.reshape(-1)


def _group_max(magnitude_G: _Bits, dtype: Dtype) -> _Bits:
    """Magnitudes in bits of `dtype` as bfloat16 bits, rounded up, as uint32."""
    if dtype is Dtype.BFLOAT16:
        return magnitude_G.astype(np.uint32)
    if dtype is Dtype.FLOAT16:
        magnitude_G = magnitude_G.view(np.float16).astype(np.float32).view(np.uint32)
    rounded: _Bits = (magnitude_G + 0xFFFF) >> 16
    return rounded


def _widened(bfloat16_bits: _Bits) -> npt.NDArray[np.float32]:
    return (bfloat16_bits.astype(np.uint32) << 16).view(np.float32)


def _floats(bits: _Bits, dtype: Dtype) -> npt.NDArray[np.float32]:
    """A copy."""
    if dtype is Dtype.FLOAT16:
        return bits.view(np.float16).astype(np.float32)
    return _widened(bits) if dtype is Dtype.BFLOAT16 else bits.view(np.float32).copy()


def _store(scalars: npt.NDArray[np.float32], out: _Bits, dtype: Dtype) -> None:
    """Finite numbers as `dtype`, rounded to the nearest, ties to even. Uses up `scalars`."""
    if dtype is Dtype.FLOAT32:
        out.view(np.float32)[...] = scalars
    elif dtype is Dtype.FLOAT16:
        out.view(np.float16)[...] = scalars
    else:
        bits: _Bits = scalars.view(np.uint32)
        is_odd = (bits >> 16) & 1
        bits += is_odd
        bits += 0x7FFF
        bits >>= 16
        np.copyto(out, bits, casting="unsafe")
