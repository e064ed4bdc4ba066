"""All layers of a stage as one module: small steps take one compiled call, others go layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import nn

from molink_stage_worker.engine import bf16_layers, bf16_unit, kernels
from molink_stage_worker.engine.attention import PagedStep
from molink_stage_worker.engine.bf16_layers import Column
from molink_stage_worker.engine.bf16_unit import MOST_ROWS
from molink_stage_worker.engine.compiled_layers import CompiledLayer
from molink_stage_worker.engine.kv_store import KvStore
from molink_stage_worker.engine.projections import PackedProjection
from molink_stage_worker.engine.step_plan import StepPlan
from molink_stage_worker.engine.team import team_of

_NO_BLOCKS = np.empty(0, np.int64)


class LayerStack(nn.Module):
    """Takes the place of the layers of a model, as the only one."""

    def __init__(self, layers: Sequence[CompiledLayer]) -> None:
        """`layers` are those of which `can_stack` holds."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._compiled = tuple(layers)
        self._table_LC = np.array([_row(layer) for layer in layers], np.int64)
        self._store: ref[KvStore] | None = None
        """Where keys and values are, by the table. Not kept alive: it is most of a worker's memory."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        paged: PagedStep,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **others: Any,
    ) -> torch.Tensor:
        """``[1, T, H]`` to ``[1, T, H]``, as all layers one after the other."""
        if not self.takes(paged.plan):
            for layer in self._compiled:
                hidden_states = layer(hidden_states, paged=paged, position_embeddings=position_embeddings, **others)
            return hidden_states
        hidden_TH = hidden_states[0].clone(memory_format=torch.contiguous_format)
        self.run(hidden_TH, paged, self._compiled[0].angles_of(position_embeddings))
        return hidden_TH.unsqueeze(0)

    def takes(self, plan: StepPlan) -> bool:
        """Whether the step is small enough to be one compiled call."""
        return plan.num_tokens <= MOST_ROWS and self._compiled[0].attends_in_bf16(plan.block_size)

    def run(self, hidden_TH: torch.Tensor, paged: PagedStep, angles: tuple[Any, Any]) -> None:
        """Take the hidden states of a step that `takes` allows through all layers, in place.

        `angles` are cosines and sines ``[T, F]``.
        """
        if self._store is None or self._store() is not paged.store:
            self._find(paged.store, hidden_TH)
        first, plan, store, spans = self._compiled[0], paged.plan, paged.store, paged.plan.span_reads()
        rows_TW = hidden_TH.new_empty(plan.num_tokens, (first.num_queries + 2 * first.num_keys) * first.head_size)
        cleared = _NO_BLOCKS if plan.blocks_to_clear is None else plan.blocks_to_clear.numpy()
        found_TQ = hidden_TH.new_empty(plan.num_tokens, first.num_queries * first.head_size)
        inner: Any = first.gate.num_outputs
        room = hidden_TH.new_empty(plan.num_tokens * (hidden_TH.shape[1] + 2 * inner))
        team_of(torch.get_num_threads()).run(
            bf16_layers.layers, len(self._table_LC) * bf16_layers.PHASES,
            bf16_unit.configurations(), self._table_LC, kernels.array_of(hidden_TH), first.epsilon, *angles,
            plan.slots, cleared, plan.block_size, first.num_keys, first.head_size,
            store.num_blocks * store.block_size, kernels.array_of(rows_TW),
            spans.firsts_B, spans.counts_B, spans.starts_B, spans.tables_B, spans.slots_N,
            first.scaling, kernels.array_of(found_TQ), kernels.array_of(room), inner,
            owner=(self, store),
        )  # fmt: skip

    def _find(self, store: KvStore, like: torch.Tensor) -> None:
        """Note where a store keeps the keys and values of each layer."""
        for layer, row in zip(self._compiled, self._table_LC, strict=True):
            one_KTD = like.new_empty(layer.num_keys, 1, layer.head_size)
            found = store.cleared(layer.layer_idx, one_KTD, one_KTD, blocks_to_clear=None)
            row[Column.KEYS], row[Column.VALUES] = found.keys_KSD.data_ptr(), found.values_KSE.data_ptr()
        self._store = ref(store)


def can_stack(layers: Sequence[nn.Module]) -> bool:
    """Whether there are layers, all of them compiled and alike, with their weights where the loops can read them."""
    compiled = [layer for layer in layers if isinstance(layer, CompiledLayer)]
    if not compiled or len(compiled) < len(layers) or len({_shape(layer) for layer in compiled}) > 1:
        return False
    weights = [one for layer in compiled for one in _projections(layer)]
    return all(isinstance(one, PackedProjection) and one.in_blocks is not None for one in weights) and (
        bf16_layers.are_ready()
    )


def _projections(layer: CompiledLayer) -> tuple[Any, ...]:
    return layer.query_key_value, layer.output, layer.gate, layer.up, layer.down


def _shape(layer: CompiledLayer) -> tuple[Any, ...]:
    return layer.num_queries, layer.num_keys, layer.head_size, layer.scaling, layer.epsilon


def _row(layer: CompiledLayer) -> list[int]:
    row = [0] * len(Column)
    for place, projection in enumerate(_projections(layer)):
        row[Column.QUERY_KEY_VALUE + place] = projection.in_blocks.ctypes.data
        row[Column.QUERY_KEY_VALUE_BIAS + place] = _address(projection.bias)
    for place, weight in enumerate(layer.norm_weights):
        row[Column.INPUT_NORM + place] = _address(weight)
    row[Column.WINDOW] = layer.sliding_window or kernels.SEES_ALL
    row[Column.TURNS] = int(layer.turns)
    return row


def _address(array: Any) -> int:
    return array.ctypes.data if array.size else 0
