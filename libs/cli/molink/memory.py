"""How much memory workers may use, and whether a model fits into it."""

from __future__ import annotations

import re

from molink_common.errors import SettingsError
from molink_common.messages import Dtype, ModelCard

SHARE_OF_OFFER = 0.875
"""Of the four fifths of available memory that a worker alone offers: seven tenths in all."""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes: ``800MiB``, ``1.5G``, ``2147483648``. K, M, G, T are powers of 1024.

    Raises:
        SettingsError: it is none of these.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match["number"]) <= 0:
        raise SettingsError(f"--memory: {text!r} is no size; give for example 800MiB or 1.5GiB")
    return int(float(match["number"]) * _UNITS[match["unit"].upper()])


def show_size(size_bytes: int) -> str:
    """``312 MiB``, ``1.5 GiB``."""
    if size_bytes >= _UNITS["G"]:
        return f"{size_bytes / _UNITS['G']:.1f} GiB"
    return f"{size_bytes / _UNITS['M']:.0f} MiB"


def share_for_each(offered_alone: int, workers: int) -> int:
    """What each of `workers` on this machine may use, where one alone would offer `offered_alone`.

    One alone leaves a fifth of the machine to the others; with the servers and the gateway beside it we leave more.
    """
    return int(offered_alone * SHARE_OF_OFFER) // workers


def weight_bytes(card: ModelCard, dtype: Dtype) -> int:
    """Weights of the whole model, cut into any number of stages."""
    scalars = sum(card.layer_parameters) + card.embedding_parameters + card.output_parameters
    return scalars * dtype.size_bytes


def what_is_lacking(card: ModelCard, dtype: Dtype, *, per_worker: int, workers: int) -> str | None:
    """Why the model's weights cannot fit, or None if they may."""
    needed = weight_bytes(card, dtype)
    if needed <= per_worker * workers:
        return None
    advice = "a smaller model or more memory" if dtype is not Dtype.FLOAT32 else "--dtype bfloat16 or a smaller model"
    return (
        f"too little memory: the weights of {card.name} in {dtype} take {show_size(needed)}, and {workers} "
        f"worker{'s' if workers > 1 else ''} of {show_size(per_worker)} hold {show_size(per_worker * workers)}; "
        f"it takes {advice} (--memory sets the size of each worker)"
    )
