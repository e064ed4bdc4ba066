"""The engine for families whose sequences can share a pass: all tokens of a step in one row ``[1, T]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from molink_common.errors import ProtocolError
from molink_common.wire import Entry
from molink_stage_worker.engine.attention import PagedStep
from molink_stage_worker.engine.block_tables import BlockTables
from molink_stage_worker.engine.interface import StageSpec, StepOutput
from molink_stage_worker.engine.kv_store import KvStore
from molink_stage_worker.engine.stage_tensors import (
    bytes_from_hidden,
    bytes_of,
    check_token_ids,
    hidden_from_bytes,
    logit_rows,
)
from molink_stage_worker.engine.step_plan import StepPlan


class PackedEngine:
    """Runs the cut model's own forward over packed sequences. See `Engine` for the contract."""

    def __init__(self, model: Any, spec: StageSpec) -> None:
        """`model` is a cut CausalLM whose attention is `paged_attention`."""
        self._model = model
        self._base = model.base_model
        self._spec = spec
        self._dtype: torch.dtype = model.dtype
        self._device = torch.device(spec.device)
        self._tables = BlockTables(num_blocks=spec.num_blocks, block_size=spec.block_size)
        self._store = KvStore(spec.num_blocks, spec.block_size)
        self._hidden_size: int = model.config.hidden_size
        self._weight_bytes = bytes_of(model)

    @property
    def hidden_size(self) -> int:
        """H."""
        return self._hidden_size

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""
        return self._weight_bytes

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
        inputs = self._inputs(num_tokens, token_ids, hidden)
        placement = self._tables.apply(entries, closes)
        if num_tokens == 0:
            return self._nothing()
        plan = StepPlan(placement, block_size=self._spec.block_size, device=self._device, dtype=self._dtype)
        inputs |= {
            "position_ids": plan.positions_1T,
            "paged": PagedStep(self._store, plan),
            "use_cache": False,
        }
        rows = logit_rows(entries) if self._spec.is_tail else []
        if rows:
            keep = torch.tensor(rows, device=self._device)
            logits_1RV = self._model(**inputs, logits_to_keep=keep).logits
            return StepOutput(logits_RV=logits_1RV[0].float())
        hidden_1TH = self._base(**inputs).last_hidden_state
        return self._nothing() if self._spec.is_tail else StepOutput(hidden=bytes_from_hidden(hidden_1TH))

    def _inputs(self, num_tokens: int, token_ids: Sequence[int] | None, hidden: memoryview | None) -> dict[str, Any]:
        if self._spec.is_head:
            if token_ids is None:
                raise ProtocolError("the head of a pipeline needs token ids")
            check_token_ids(token_ids, num_tokens=num_tokens, vocabulary_size=self._model.config.vocab_size)
            return {"input_ids": torch.tensor([list(token_ids)], device=self._device)}
        if hidden is None:
            raise ProtocolError("this stage needs hidden states")
        return {
            "inputs_embeds": hidden_from_bytes(
                hidden,
                num_tokens=num_tokens,
                hidden_size=self._hidden_size,
                dtype=self._dtype,
                device=self._device,
            )
            if num_tokens
            else None
        }

    def _nothing(self) -> StepOutput:
        if not self._spec.is_tail:
            return StepOutput(hidden=memoryview(b""))
        return StepOutput(logits_RV=torch.empty(0, self._model.config.vocab_size, device=self._device))
