"""The engine for families whose sequences can share a pass: all tokens of a step in one row ``[1, T]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from molink_common.wire import Entry
from molink_stage_worker.engine.attention import PagedStep
from molink_stage_worker.engine.block_tables import BlockTables
from molink_stage_worker.engine.families import strict_context_length
from molink_stage_worker.engine.interface import StageSpec, StepOutput
from molink_stage_worker.engine.kv_store import KvStore
from molink_stage_worker.engine.short_pass import ShortPass, can_shorten
from molink_stage_worker.engine.stage_tensors import Boundary, bytes_of, logit_rows
from molink_stage_worker.engine.step_plan import StepPlan


class PackedEngine:
    """Runs the cut model's own forward over packed sequences. See `Engine` for the contract."""

    def __init__(self, model: Any, spec: StageSpec) -> None:
        """`model` is a cut CausalLM whose attention is `paged_attention`."""
        self._model = model
        self._base = model.base_model
        self._spec = spec
        self._boundary = Boundary(model, spec)
        self._short = ShortPass(model) if can_shorten(model) else None
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
        self._block_size = block_size
        self._tables = BlockTables(
            num_blocks=num_blocks,
            block_size=block_size,
            context_length=strict_context_length(self._model.config),
        )
        self._store = KvStore(num_blocks, block_size)

    @property
    def can_rewind(self) -> bool:
        """Yes: keys and values lie in the blocks, whoever wrote them."""
        return True

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
        placement = self._tables.apply(entries, closes)
        if num_tokens == 0:
            return self._boundary.logits(None) if self._spec.is_tail else self._boundary.hidden(None)
        plan = StepPlan(
            placement,
            block_size=self._block_size,
            device=self._boundary.device,
            dtype=self._boundary.dtype,
        )
        paged = PagedStep(self._store, plan)
        rows = logit_rows(entries) if self._spec.is_tail else []
        if self._short is not None and self._short.takes(plan):
            if rows:
                return self._boundary.logits(self._short.logits(inputs_1T, paged, rows))
            hidden_TH = self._short.hidden(inputs_1T, paged)
            return self._boundary.logits(None) if self._spec.is_tail else self._boundary.hidden(hidden_TH)
        arguments: dict[str, Any] = {
            name: inputs_1T, "position_ids": plan.positions_1T, "paged": paged, "use_cache": False
        }  # fmt: skip
        if rows:
            keep = torch.tensor(rows, device=self._boundary.device)
            return self._boundary.logits(self._model(**arguments, logits_to_keep=keep).logits[0])
        hidden_1TH = self._base(**arguments).last_hidden_state
        return self._boundary.logits(None) if self._spec.is_tail else self._boundary.hidden(hidden_1TH[0])
