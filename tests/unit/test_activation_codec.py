"""What the codecs of a link promise, on tensors made for it."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
import zstandard

from molink_common.errors import ProtocolError
from molink_common.messages import Dtype
from molink_common.wire import Codec
from molink_stage_worker.activation_codec import EXACTNESS, decode_hidden, encode_hidden
from molink_stage_worker.engine.loading import TORCH_DTYPES

H = 576
ENCODING = (Codec.LOSSLESS, Codec.INT8)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).reshape(-1).numpy().tobytes())


def activations(num_tokens: int, dtype: Dtype, hidden_size: int = H) -> torch.Tensor:
    """Like a residual stream: most channels alike, a few of them far larger."""
    generator = torch.Generator().manual_seed(7)
    rows_TH = torch.randn(num_tokens, hidden_size, generator=generator)
    rows_TH[:, :: max(1, hidden_size // 3)] *= 50
    return rows_TH.to(TORCH_DTYPES[dtype])


def there_and_back(rows_TH: torch.Tensor, dtype: Dtype, codec: Codec) -> tuple[int, torch.Tensor]:
    """Encoded bytes, and what arrives."""
    num_tokens, hidden_size = rows_TH.shape
    encoded = encode_hidden(bytes_of(rows_TH), hidden_size=hidden_size, dtype=dtype, codec=codec)
    decoded = decode_hidden(encoded, num_tokens=num_tokens, hidden_size=hidden_size, dtype=dtype, codec=codec)
    arrived = torch.frombuffer(bytearray(decoded), dtype=rows_TH.dtype).view(num_tokens, hidden_size)
    return len(encoded), arrived


@pytest.mark.parametrize("num_tokens", [1, 32, 300])
@pytest.mark.parametrize(("dtype", "most"), [(Dtype.BFLOAT16, 0.76), (Dtype.FLOAT32, 0.88), (Dtype.FLOAT16, 0.95)])
def test_lossless_is_shorter_and_exact(num_tokens: int, dtype: Dtype, most: float) -> None:
    rows_TH = activations(num_tokens, dtype)
    size_bytes, arrived = there_and_back(rows_TH, dtype, Codec.LOSSLESS)
    assert size_bytes < most * rows_TH.nbytes
    assert bytes_of(arrived) == bytes_of(rows_TH)


@pytest.mark.parametrize("dtype", Dtype)
def test_int8_has_its_size_and_its_error(dtype: Dtype) -> None:
    rows_TH = activations(300, dtype)
    size_bytes, arrived = there_and_back(rows_TH, dtype, Codec.INT8)
    assert size_bytes == rows_TH.numel() * (64 + 2) / 64
    largest_G = rows_TH.float().view(-1, 64).abs().amax(1, keepdim=True)
    error_GS = (arrived.float() - rows_TH.float()).view(-1, 64).abs()
    assert bool((error_GS <= largest_G / 125).all())
    assert bool((error_GS > 0).any())


def test_int8_of_bfloat16_rounds_as_torch_does() -> None:
    rows_TH = activations(9, Dtype.BFLOAT16, 64)
    unit_T1 = rows_TH.float().abs().amax(1, keepdim=True) / 127
    expected = ((rows_TH.float() / unit_T1).round() * unit_T1).bfloat16()
    _, arrived = there_and_back(rows_TH, Dtype.BFLOAT16, Codec.INT8)
    # a quotient next to a half may go either way
    assert int((arrived != expected).sum()) <= 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", Dtype)
@pytest.mark.parametrize("codec", ENCODING)
def test_what_is_not_finite_arrives_as_it_was(codec: Codec, dtype: Dtype, value: float) -> None:
    rows_TH = activations(3, dtype)
    rows_TH[2, 5] = value
    _, arrived = there_and_back(rows_TH, dtype, codec)
    assert bytes_of(arrived) == bytes_of(rows_TH)


@pytest.mark.parametrize("dtype", Dtype)
def test_the_largest_numbers_stay_finite(dtype: Dtype) -> None:
    rows_TH = torch.full((1, H), torch.finfo(TORCH_DTYPES[dtype]).max, dtype=TORCH_DTYPES[dtype])
    for codec in ENCODING:
        assert bool(there_and_back(rows_TH, dtype, codec)[1].isfinite().all())


@pytest.mark.parametrize("dtype", Dtype)
def test_int8_of_zeros_and_of_the_smallest_numbers_is_near_zero(dtype: Dtype) -> None:
    for value in (0.0, torch.finfo(TORCH_DTYPES[dtype]).tiny):
        rows_TH = torch.full((2, H), value, dtype=TORCH_DTYPES[dtype])
        _, arrived = there_and_back(rows_TH, dtype, Codec.INT8)
        assert bool(((arrived - rows_TH).abs() <= max(2**-100, value / 125)).all())


def test_noise_travels_as_it_is() -> None:
    noise = memoryview(np.random.default_rng(1).bytes(2 * 4 * H))
    encoded = encode_hidden(noise, hidden_size=H, dtype=Dtype.BFLOAT16, codec=Codec.LOSSLESS)
    assert encoded is noise


def test_rows_too_narrow_for_groups_travel_as_they_are() -> None:
    rows_TH = activations(4, Dtype.BFLOAT16, 33)
    assert there_and_back(rows_TH, Dtype.BFLOAT16, Codec.INT8)[0] == rows_TH.nbytes


@pytest.mark.parametrize("codec", Codec)
def test_nothing_stays_nothing(codec: Codec) -> None:
    encoded = encode_hidden(memoryview(b""), hidden_size=H, dtype=Dtype.BFLOAT16, codec=codec)
    assert len(encoded) == 0
    assert decode_hidden(encoded, num_tokens=0, hidden_size=H, dtype=Dtype.BFLOAT16, codec=codec).nbytes == 0


def test_rows_that_are_not_whole_are_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="whole rows"):
        encode_hidden(memoryview(bytes(2 * H - 2)), hidden_size=H, dtype=Dtype.BFLOAT16, codec=Codec.RAW)


@pytest.mark.parametrize("codec", Codec)
def test_another_number_of_tokens_is_refused(codec: Codec) -> None:
    encoded = encode_hidden(bytes_of(activations(4, Dtype.BFLOAT16)), hidden_size=H, dtype=Dtype.BFLOAT16, codec=codec)
    for num_tokens in (0, 3, 5, 1 << 20):
        with pytest.raises(ProtocolError):
            decode_hidden(encoded, num_tokens=num_tokens, hidden_size=H, dtype=Dtype.BFLOAT16, codec=codec)


def lossless_of(plane: bytes) -> memoryview:
    """An encoding of H bfloat16 scalars whose highest bytes are `plane`, whatever its length."""
    return memoryview(bytes(H) + zstandard.ZstdCompressor().compress(plane))


@pytest.mark.parametrize(
    "data",
    [
        lossless_of(bytes(H - 1)),
        lossless_of(bytes(H + 1)),
        lossless_of(bytes(1 << 30)),
        memoryview(bytes(lossless_of(bytes(H))) + b"more"),
        memoryview(bytes(lossless_of(bytes(H)))[:-1]),
        memoryview(bytes(H) + zstandard.ZstdCompressor(write_content_size=False).compress(bytes(H))),
        memoryview(bytes(H) + b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip"),
        memoryview(bytes(H) + b"no zstd frame"),
        memoryview(bytes(H)),
    ],
    ids=["short", "long", "bomb", "trailing", "truncated", "undeclared", "skippable", "garbage", "none"],
)
def test_a_lossless_form_that_does_not_fit_is_refused(data: memoryview) -> None:
    with pytest.raises(ProtocolError):
        decode_hidden(data, num_tokens=1, hidden_size=H, dtype=Dtype.BFLOAT16, codec=Codec.LOSSLESS)


@pytest.mark.parametrize(
    ("dtype", "at", "value", "says"),
    [
        (Dtype.BFLOAT16, 1, 0xFF, "scale"),  # negative
        (Dtype.BFLOAT16, 0, 0x80, "scale"),  # 0x7F80 with the byte that is there: infinity
        (Dtype.FLOAT16, 0, 0x7E, "scale"),  # 0x477E: finite, but not as float16
        (Dtype.BFLOAT16, 2 * H // 64, 0x80, "beyond"),  # -128
    ],
)
def test_an_int8_form_that_does_not_fit_is_refused(dtype: Dtype, at: int, value: int, says: str) -> None:
    largest = 64768.0 if dtype is Dtype.FLOAT16 else 3.3895e38
    rows_TH = torch.full((1, H), largest).to(TORCH_DTYPES[dtype])
    encoded = bytearray(encode_hidden(bytes_of(rows_TH), hidden_size=H, dtype=dtype, codec=Codec.INT8))
    assert len(encoded) < rows_TH.nbytes
    decode_hidden(memoryview(encoded), num_tokens=1, hidden_size=H, dtype=dtype, codec=Codec.INT8)
    encoded[at] = value
    with pytest.raises(ProtocolError, match=says):
        decode_hidden(memoryview(encoded), num_tokens=1, hidden_size=H, dtype=dtype, codec=Codec.INT8)


def test_threads_do_not_disturb_each_other() -> None:
    rows_TH = activations(64, Dtype.BFLOAT16)
    plain = bytes_of(rows_TH)
    wrong: list[int] = []

    def work(name: int) -> None:
        for _ in range(50):
            _, arrived = there_and_back(rows_TH, Dtype.BFLOAT16, Codec.LOSSLESS)
            if bytes_of(arrived) != plain:
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def test_every_codec_says_how_exact_it_is() -> None:
    assert set(EXACTNESS) == set(Codec) - {Codec.ABSENT}, "which carries nothing that could be exact"
    assert {codec for codec, says in EXACTNESS.items() if says == "bit-exact"} == {Codec.RAW, Codec.LOSSLESS}
