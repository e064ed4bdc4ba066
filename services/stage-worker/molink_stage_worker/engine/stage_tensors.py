"""Where tensors enter and leave a stage, the same for both kinds of engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from molink_common.errors import ProtocolError
from molink_common.wire import Entry
from molink_stage_worker.engine.interface import StageSpec, StepOutput
from molink_stage_worker.engine.projections import PackedProjection


class Boundary:
    """Bytes and token ids to tensors, tensors to a `StepOutput`."""

    def __init__(self, model: Any, spec: StageSpec) -> None:
        self.hidden_size: int = model.config.hidden_size
        self.vocabulary_size: int = model.config.vocab_size
        self.dtype: torch.dtype = model.dtype
        self.device = torch.device(spec.device)
        self._is_head = spec.is_head

    def inputs(
        self, num_tokens: int, token_ids: Sequence[int] | None, hidden: memoryview | None
    ) -> tuple[str, torch.Tensor]:
        """The forward's argument and its value: ids ``[1, T]`` at the head, else hidden states ``[1, T, H]``.

        On the CPU the hidden states lie in the given bytes, which must stay as they are during the step.

        Raises:
            ProtocolError: what is given does not fit the number of tokens, the hidden size or the vocabulary.
        """
        if self._is_head:
            if token_ids is None and num_tokens:
                raise ProtocolError("the head of a pipeline takes token ids")
            return "input_ids", self._ids(num_tokens, token_ids or ())
        if hidden is None and num_tokens:
            raise ProtocolError("this stage takes hidden states")
        return "inputs_embeds", self._hidden_states(num_tokens, memoryview(b"") if hidden is None else hidden)

    def hidden(self, hidden_TH: torch.Tensor | None) -> StepOutput:
        """One-dimensional bytes; on the CPU they are the tensor's own memory, which they keep alive."""
        if hidden_TH is None:
            return StepOutput(hidden=memoryview(b""))
        flat = hidden_TH.cpu().contiguous().view(torch.uint8).reshape(-1)
        return StepOutput(hidden=memoryview(flat.numpy()))  # type: ignore[arg-type]  # 3.11 cannot type a buffer

    def logits(self, logits_RV: torch.Tensor | None) -> StepOutput:
        """As float32; None stands for no rows."""
        if logits_RV is None:
            return StepOutput(logits_RV=torch.empty(0, self.vocabulary_size, device=self.device))
        return StepOutput(logits_RV=logits_RV.float())

    def _ids(self, num_tokens: int, token_ids: Sequence[int]) -> torch.Tensor:
        if len(token_ids) != num_tokens:
            raise ProtocolError(f"{len(token_ids)} token ids for {num_tokens} tokens")
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.vocabulary_size:
            raise ProtocolError(f"a token id is not in the vocabulary of {self.vocabulary_size}")
        return torch.tensor([list(token_ids)], dtype=torch.int64, device=self.device)

    def _hidden_states(self, num_tokens: int, hidden: memoryview) -> torch.Tensor:
        expected = num_tokens * self.hidden_size * self.dtype.itemsize
        if hidden.nbytes != expected:
            raise ProtocolError(f"{hidden.nbytes} bytes of hidden states for {num_tokens} tokens, not {expected}")
        if not expected:
            return torch.empty(1, 0, self.hidden_size, dtype=self.dtype, device=self.device)
        tensor = torch.frombuffer(hidden, dtype=self.dtype).view(1, num_tokens, self.hidden_size)
        return tensor if self.device.type == "cpu" else tensor.to(self.device)


def logit_rows(entries: Sequence[Entry]) -> list[int]:
    """The rows of the step for which logits are asked, in order."""
    rows: list[int] = []
    row = 0
    for entry in entries:
        rows.extend(row + place - entry.start for place in entry.places_with_logits)
        row += entry.count
    return rows


def bytes_of(model: Any) -> int:
    """Memory of parameters and buffers, tied ones counted once, and of packed projections."""
    tensors: dict[int, int] = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    packed = [module.packed_bytes for module in model.modules() if isinstance(module, PackedProjection)]
    return sum([*tensors.values(), *packed])
