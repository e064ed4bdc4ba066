"""The engine for families that cannot be packed: each sequence has transformers' own cache and its own pass.

Block tables are kept and checked as elsewhere, so that a stage refuses the same frames whatever its family,
but keys and values lie in the caches. Two things follow. A sequence cannot start on blocks that another has
filled, and one whose cache forgets (a sliding window, a recurrent state) cannot go back to an earlier
position. Both are answered with a `ProtocolError`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from molink_common.errors import ProtocolError
from molink_common.wire import Entry, Logits
from molink_stage_worker.engine.block_tables import BlockTables
from molink_stage_worker.engine.families import Family, strict_context_length
from molink_stage_worker.engine.interface import StageSpec, StepOutput
from molink_stage_worker.engine.stage_tensors import Boundary, bytes_of


@dataclass(slots=True)
class _Sequence:
    cache: Any
    num_tokens: int = 0


class PerSequenceEngine:
    """Runs the cut model once an entry. See `Engine` for the contract."""

    def __init__(self, model: Any, spec: StageSpec, family: Family) -> None:
        """`model` is a cut CausalLM with one of transformers' own attentions."""
        self._model = model
        self._base = model.base_model
        self._spec = spec
        self._family = family
        self._boundary = Boundary(model, spec)
        self._takes_positions = "position_ids" in inspect.signature(self._base.forward).parameters
        self._weight_bytes = bytes_of(model)
        self.reset(num_blocks=spec.num_blocks, block_size=spec.block_size)

    @property
    def hidden_size(self) -> int:
        """H."""
        return self._boundary.hidden_size

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""
        return self._weight_bytes

    def reset(self, *, num_blocks: int, block_size: int) -> None:
        """See `Engine.reset`."""
        self._tables = BlockTables(
            num_blocks=num_blocks,
            block_size=block_size,
            context_length=strict_context_length(self._model.config),
        )
        self._sequences: dict[int, _Sequence] = {}

    @property
    def can_rewind(self) -> bool:
        """No: keys and values lie in caches that begin with the sequence."""
        return False

    @torch.inference_mode()
    def run(
        self,
        entries: Sequence[Entry],
        closes: Sequence[int],
        *,
        token_ids: Sequence[int] | None = None,
        hidden: memoryview | None = None,
    ) -> StepOutput:
        """See `Engine.run`."""
        num_tokens = sum(entry.count for entry in entries)
        name, inputs_1T = self._boundary.inputs(num_tokens, token_ids, hidden)
        for entry in entries:
            self._check(entry)
        self._tables.apply(entries, closes)
        for sequence in closes:
            self._sequences.pop(sequence, None)
        outputs: list[torch.Tensor] = []
        row = 0
        for entry in entries:
            outputs += self._run_entry(entry, name, inputs_1T[:, row : row + entry.count])
            row += entry.count
        joined = torch.cat(outputs) if outputs else None
        return self._boundary.logits(joined) if self._spec.is_tail else self._boundary.hidden(joined)

    def _check(self, entry: Entry) -> None:
        """What the caches cannot do."""
        name = f"sequence {entry.sequence:016x}"
        if entry.opens:
            if entry.start:
                raise ProtocolError(f"{name} opens at {entry.start}; models of this family share no prefixes")
            return
        known = self._sequences.get(entry.sequence)
        if known is not None and entry.start < known.num_tokens and not _can_go_back(known.cache):
            raise ProtocolError(f"{name} goes back to {entry.start}; models of this family only go on")

    def _run_entry(self, entry: Entry, name: str, inputs_1C: torch.Tensor) -> list[torch.Tensor]:
        """Rows of logits (tail) or of hidden states that the entry gives."""
        if entry.opens:
            self._sequences[entry.sequence] = _Sequence(DynamicCache(config=self._model.config))
        sequence = self._sequences[entry.sequence]
        if entry.start < sequence.num_tokens:
            sequence.cache.crop(entry.start - sequence.num_tokens)
        step = 1 if self._family.continues_by_one and entry.start > 0 else entry.count
        rows: list[torch.Tensor] = []
        for at in range(0, entry.count, step):
            is_last = at + step == entry.count
            piece = inputs_1C[:, at : at + step]
            rows.append(self._forward(sequence, entry.start + at, name, piece, _wanted(entry.logits, is_last)))
        sequence.num_tokens = entry.start + entry.count
        return rows

    def _forward(
        self, sequence: _Sequence, start: int, name: str, inputs_1C: torch.Tensor, logits: Logits
    ) -> torch.Tensor:
        arguments: dict[str, Any] = {name: inputs_1C, "use_cache": True, self._family.cache_argument: sequence.cache}
        if self._takes_positions:
            arguments["position_ids"] = torch.arange(
                start, start + inputs_1C.shape[1], device=inputs_1C.device
            ).unsqueeze(0)
        if self._spec.is_tail and logits is not Logits.NONE:
            logits_1CV: torch.Tensor = self._model(**arguments, logits_to_keep=int(logits is Logits.LAST)).logits
            return logits_1CV[0].float()
        hidden_1CH: torch.Tensor = self._base(**arguments).last_hidden_state
        return hidden_1CH.new_empty(0, self._boundary.vocabulary_size) if self._spec.is_tail else hidden_1CH[0]


def _wanted(logits: Logits, is_last: bool) -> Logits:
    return logits if is_last or logits is not Logits.LAST else Logits.NONE


def _can_go_back(cache: Any) -> bool:
    return all(type(layer) is DynamicLayer for layer in cache.layers)
