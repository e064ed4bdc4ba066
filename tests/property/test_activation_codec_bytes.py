"""Any bits survive the lossless codec, int8 keeps its bound, and garbage is a ProtocolError and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molink_common.errors import ProtocolError
from molink_common.messages import Dtype
from molink_common.wire import Codec
from molink_stage_worker.activation_codec import decode_hidden, encode_hidden

codecs = st.sampled_from(Codec)
dtypes = st.sampled_from(Dtype)
hidden_sizes = st.sampled_from([1, 3, 8, 32, 33, 48, 64, 96, 128, 200])


@st.composite
def tensors(draw: st.DrawFn) -> tuple[bytes, int, int, Dtype]:
    """Bytes, rows, row length and dtype. From wild to constant."""
    dtype, hidden_size, num_tokens = draw(dtypes), draw(hidden_sizes), draw(st.integers(0, 20))
    size_bytes = num_tokens * hidden_size * dtype.size_bytes
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    alphabet = np.frombuffer(draw(st.binary(min_size=1, max_size=20)), np.uint8)
    if draw(st.booleans()):
        return generator.bytes(size_bytes), num_tokens, hidden_size, dtype
    return generator.choice(alphabet, size_bytes).tobytes(), num_tokens, hidden_size, dtype


def floats(data: bytes | memoryview, dtype: Dtype) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # NaNs that signal
        if dtype is Dtype.BFLOAT16:
            return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
        return np.frombuffer(data, "<f2" if dtype is Dtype.FLOAT16 else "<f4").astype(np.float64)


@pytest.mark.parametrize("codec", [Codec.RAW, Codec.LOSSLESS])
@given(tensors())
def test_exact_codecs_keep_every_bit(codec: Codec, tensor: tuple[bytes, int, int, Dtype]) -> None:
    data, num_tokens, hidden_size, dtype = tensor
    encoded = encode_hidden(memoryview(data), hidden_size=hidden_size, dtype=dtype, codec=codec)
    assert len(encoded) <= len(data)
    decoded = decode_hidden(encoded, num_tokens=num_tokens, hidden_size=hidden_size, dtype=dtype, codec=codec)
    assert (decoded.format, decoded.ndim) == ("B", 1)
    assert bytes(decoded) == data


@given(tensors())
def test_int8_keeps_its_bound_and_never_hides_what_is_not_finite(tensor: tuple[bytes, int, int, Dtype]) -> None:
    data, num_tokens, hidden_size, dtype = tensor
    encoded = encode_hidden(memoryview(data), hidden_size=hidden_size, dtype=dtype, codec=Codec.INT8)
    assert len(encoded) <= len(data)
    decoded = decode_hidden(encoded, num_tokens=num_tokens, hidden_size=hidden_size, dtype=dtype, codec=Codec.INT8)
    before_N, after_N = floats(data, dtype), floats(decoded, dtype)
    if not np.isfinite(before_N).all():
        assert bytes(decoded) == data
        return
    group = np.gcd(hidden_size, 64)
    largest_G = np.abs(before_N).reshape(-1, group).max(axis=1, keepdims=True)
    error_GS = np.abs(after_N - before_N).reshape(-1, group)
    # float16 cannot say more than 2⁻²⁴, and less than 2⁻¹⁰⁰ counts as nothing
    smallest = 2.0**-25 if dtype is Dtype.FLOAT16 else 2.0**-100
    assert (error_GS <= largest_G / 125 + smallest).all()


@given(tensors(), codecs, st.data())
def test_a_damaged_encoding_is_refused_or_decodes_to_as_many_scalars(
    tensor: tuple[bytes, int, int, Dtype], codec: Codec, draws: st.DataObject
) -> None:
    data, num_tokens, hidden_size, dtype = tensor
    damaged = bytearray(encode_hidden(memoryview(data), hidden_size=hidden_size, dtype=dtype, codec=codec))
    for _ in range(draws.draw(st.integers(0, 4))):
        if damaged:
            damaged[draws.draw(st.integers(0, len(damaged) - 1))] = draws.draw(st.integers(0, 255))
    del damaged[draws.draw(st.integers(0, len(damaged))) :]
    damaged += draws.draw(st.binary(max_size=12))
    check_decodes_or_refuses(bytes(damaged), num_tokens, hidden_size, dtype, codec)


@given(st.binary(max_size=400), st.integers(0, 1 << 20), hidden_sizes, dtypes, codecs)
def test_garbage_is_refused_or_decodes_to_as_many_scalars(
    data: bytes, num_tokens: int, hidden_size: int, dtype: Dtype, codec: Codec
) -> None:
    check_decodes_or_refuses(data, num_tokens, hidden_size, dtype, codec)


def check_decodes_or_refuses(data: bytes, num_tokens: int, hidden_size: int, dtype: Dtype, codec: Codec) -> None:
    try:
        decoded = decode_hidden(
            memoryview(data), num_tokens=num_tokens, hidden_size=hidden_size, dtype=dtype, codec=codec
        )
    except ProtocolError:
        return
    assert decoded.nbytes == num_tokens * hidden_size * dtype.size_bytes
    if codec is Codec.INT8 and decoded.nbytes != len(data):
        assert np.isfinite(floats(decoded, dtype)).all()
