"""Which instructions for bfloat16 this processor has."""

from __future__ import annotations

from functools import cache

import torch
from llvmlite import binding


@cache
def has_tiles() -> bool:
    """Whether there are matrix tiles (AMX) and the system lets this process and its threads use them."""
    features = binding.get_host_cpu_features()
    return bool(features.get("amx-tile") and features.get("amx-bf16") and torch.cpu._init_amx())


@cache
def has_pairs() -> bool:
    """Whether there are dot products of pairs in vectors of 512 bits (AVX-512 BF16)."""
    features = binding.get_host_cpu_features()
    return bool(features.get("avx512f") and features.get("avx512bf16"))
