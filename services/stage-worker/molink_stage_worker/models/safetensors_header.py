"""The header of a safetensors file: names, shapes and places of its tensors, without reading them.

The format: eight bytes with the header's length (little endian), a JSON object, the tensors. A header comes
from a file that somebody else made, so lengths and places are checked before they are believed.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import orjson

from molink_common.errors import ModelError

_LENGTH_BYTES = 8
_LONGEST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's form and its place ``[start, end)`` behind the header."""

    dtype: str
    """In the format's words: ``BF16``, ``F32``, …"""
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_scalars(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)


Header = Mapping[str, TensorInfo]


def read_header(path: Path) -> Header:
    """The tensors in a file.

    Raises:
        ModelError: it cannot be read, is not safetensors, or is cut short.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_LENGTH_BYTES)
            if len(start) < _LENGTH_BYTES:
                raise ModelError(f"{path} is cut short: not even a header fits")
            (length,) = struct.unpack("<Q", start)
            if length > _LONGEST_HEADER_BYTES:
                raise ModelError(f"{path} is no safetensors file, or a damaged one")
            text = file.read(length)
            data_bytes = path.stat().st_size - _LENGTH_BYTES - length
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    header = parse_header(text, str(path))
    if max((tensor.end for tensor in header.values()), default=0) > data_bytes:
        raise ModelError(f"{path} is cut short: its last tensors are missing; fetch it again")
    return header


def parse_header(text: bytes, name: str) -> Header:
    """The tensors that a header describes.

    Raises:
        ModelError: it is not a header; `name` says of which file.
    """
    try:
        body = orjson.loads(text)
        return {key: _tensor(value) for key, value in body.items() if key != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{name} is no safetensors file, or a damaged one") from error


def _tensor(value: Mapping[str, Any]) -> TensorInfo:
    start, end = value["data_offsets"]
    shape = tuple(int(size) for size in value["shape"])
    if not 0 <= start <= end or any(size < 0 for size in shape):
        raise ValueError("a tensor outside its file")
    return TensorInfo(dtype=str(value["dtype"]), shape=shape, start=start, end=end)
