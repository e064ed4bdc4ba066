"""Noise for each token of a vocabulary, as a function of a 64-bit key: integers up to the last step, on any device.

The key is mixed into the token ids by two rounds of the 32-bit hash "lowbias32" (Wellons, *Prospecting for Hash
Functions*, 2018), in arithmetic that wraps. Philox for every token would take longer than the rest of sampling.
"""

from __future__ import annotations

import torch

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_31_BITS = 0x7FFFFFFF
_LONGEST = 100.0
"""The noise of a token is finite, so that the likeliest one always arrives."""


def exponentials(key: int, num_tokens: int, device: torch.device, *, of: torch.Tensor | None = None) -> torch.Tensor:
    """Exponentially distributed numbers of mean 1, V float32: of the first tokens, or of those in `of` alone."""
    low, high = _signed(key & 0xFFFFFFFF), _signed(key >> 32)
    bits_V = torch.arange(num_tokens, dtype=torch.int32, device=device) if of is None else of.to(torch.int32, copy=True)
    _mix(bits_V.bitwise_xor_(low))
    _mix(bits_V.bitwise_xor_(high))
    # small numbers decide the race: they keep all their digits in a float
    uniform_V = bits_V.bitwise_and_(_31_BITS).float().add_(0.5).mul_(2.0**-31)
    return uniform_V.neg_().log1p_().neg_().clamp_(max=_LONGEST)


def _mix(bits_V: torch.Tensor) -> None:
    bits_V.bitwise_xor_(_shifted(bits_V, 16)).mul_(_FIRST)
    bits_V.bitwise_xor_(_shifted(bits_V, 15)).mul_(_SECOND)
    bits_V.bitwise_xor_(_shifted(bits_V, 16))


def _shifted(bits_V: torch.Tensor, count: int) -> torch.Tensor:
    """To the right, zeros from the left: torch's own shift of a signed number keeps the sign."""
    return (bits_V >> count).bitwise_and_((1 << (32 - count)) - 1)


def _signed(bits: int) -> int:
    return bits - (1 << 32) if bits >= 1 << 31 else bits
