"""Hidden states between bytes and tensors, and small things that both kinds of engine need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from molink_common.errors import ProtocolError
from molink_common.wire import Entry, Logits


def hidden_from_bytes(
    hidden: memoryview, *, num_tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """``[1, T, H]`` over the same memory (on the CPU), which must stay as it is while the tensor is used.

    Raises:
        ProtocolError: the size does not fit.
    """
    expected = num_tokens * hidden_size * dtype.itemsize
    if len(hidden) != expected:
        raise ProtocolError(f"{len(hidden)} bytes of hidden states for {num_tokens} tokens, not {expected}")
    tensor = torch.frombuffer(hidden, dtype=dtype).view(1, num_tokens, hidden_size)
    return tensor if device.type == "cpu" else tensor.to(device)


def bytes_from_hidden(hidden_1TH: torch.Tensor) -> memoryview:
    """One-dimensional bytes; on the CPU they are the tensor's own memory, which they keep alive."""
    flat = hidden_1TH.cpu().contiguous().view(torch.uint8).reshape(-1)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # an array is a buffer; Python 3.11 cannot say so


def logit_rows(entries: Sequence[Entry]) -> list[int]:
    """The rows of the step for which logits are asked, in order."""
    rows: list[int] = []
    row = 0
    for entry in entries:
        if entry.logits is Logits.LAST:
            rows.append(row + entry.count - 1)
        elif entry.logits is Logits.ALL:
            rows.extend(range(row, row + entry.count))
        row += entry.count
    return rows


def check_token_ids(token_ids: Sequence[int], *, num_tokens: int, vocabulary_size: int) -> None:
    """Whether there is one id of the vocabulary for each token.

    Raises:
        ProtocolError: there is not.
    """
    if len(token_ids) != num_tokens:
        raise ProtocolError(f"{len(token_ids)} token ids for {num_tokens} tokens")
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocabulary_size:
        raise ProtocolError(f"a token id is not in the vocabulary of {vocabulary_size}")


def bytes_of(model: Any) -> int:
    """Memory of parameters and buffers, tied ones counted once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values())
