"""Lean layers for a CPU: between their matrix products everything is compiled loops (`kernels`).

Shapes: T tokens, W width of a row of queries, keys and values, I inner size, N heads, D head size, F half of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from molink_stage_worker.engine import bf16_attention, bf16_unit, kernels
from molink_stage_worker.engine.attention import Kind, PagedStep, attend, attend_chunks
from molink_stage_worker.engine.kv_store import LayerStore
from molink_stage_worker.engine.lean_layers import LeanLayer, Rotation
from molink_stage_worker.engine.step_plan import StepPlan
from molink_stage_worker.engine.team import team_of

_KEYS_FOR_ONE_THREAD = 4_096
"""Compiled attention runs on one thread. Where torch has several, it is left to them from so many keys a layer on.
An estimate: not tried on a machine where it matters."""

_NOTHING = np.empty(0, np.float32)
_NO_ANGLES = np.empty((0, 0), np.float32)


class CompiledRotation(Rotation):
    """The angles of a step as arrays; the same for all layers."""

    def __init__(self) -> None:
        super().__init__()
        self._arrays: tuple[Any, Any] = (_NO_ANGLES, _NO_ANGLES)

    def arrays(self, angles: tuple[torch.Tensor, torch.Tensor]) -> tuple[Any, Any]:
        """Cosines and sines ``[T, F]``."""
        if angles is not self._angles:
            self._arrays = half_angles(angles)
            self._angles = angles
        return self._arrays


class CompiledLayer(LeanLayer):
    """A `LeanLayer` on a CPU whose dtype the kernels know."""

    def __init__(self, layer: nn.Module, rotation: CompiledRotation) -> None:
        super().__init__(layer, rotation)
        self._angles = rotation
        self.turns = self._rotation is not None
        """Whether queries and keys are rotated."""
        norms: list[Any] = [self.input_norm, self.post_attention_norm, self.query_norm, self.key_norm]
        self._weights = {norm: _floats(norm.weight) for norm in norms if norm is not None}
        self.norm_weights = tuple(self._weights.get(norm, _NOTHING) for norm in norms)
        """Before attention, after it, of queries, of keys; empty where there is none."""
        self.epsilon = norms[0].variance_epsilon
        is_bf16 = norms[0].weight.dtype is torch.bfloat16 and bf16_attention.is_ready()
        # settled here once, since it settles how keys lie in the store, too
        self._may_attend_in_bf16 = is_bf16 and bf16_unit.may_share()

    def attends_in_bf16(self, block_size: int) -> bool:
        """Whether attention over blocks of that size is `bf16_attention`'s."""
        group = self.num_queries // self.num_keys
        comes_out_even = bf16_attention.can_attend(head_size=self.head_size, group=group, block_size=block_size)
        return self._may_attend_in_bf16 and comes_out_even

    def angles_of(self, angles: tuple[torch.Tensor, torch.Tensor]) -> tuple[Any, Any]:
        """Cosines and sines of a step's positions as arrays ``[T, F]``."""
        return self._angles.arrays(angles)

    def _normed(self, norm: Any, x: torch.Tensor) -> torch.Tensor:
        normed = torch.empty_like(x)
        kernels.norm(kernels.array_of(x), self._weights[norm], norm.variance_epsilon, kernels.array_of(normed))
        return normed

    def _attended(
        self, rows_TW: torch.Tensor, paged: PagedStep, angles: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        plan = paged.plan
        store = self._store(rows_TW, paged)
        cos_TF, sin_TF = self.angles_of(angles) if self.turns else (_NO_ANGLES, _NO_ANGLES)
        weights = (*self.norm_weights[2:], self.epsilon)
        in_bf16 = self.attends_in_bf16(plan.block_size)
        kernels.rotate(kernels.array_of(rows_TW), cos_TF, sin_TF, *weights, self.num_keys, self.head_size)
        put = bf16_attention.store if in_bf16 else kernels.store
        put(kernels.array_of(rows_TW), plan.slots, *store.arrays)
        found_TI = rows_TW.new_empty(rows_TW.shape[0], self.num_queries * self.head_size)
        if in_bf16:
            self._attend_in_bf16(rows_TW, plan, store, found_TI)
        elif torch.get_num_threads() > 1 and plan.token_reads().num_keys > _KEYS_FOR_ONE_THREAD:
            reads = plan.reads(self.sliding_window)
            return attend(*self._parts(rows_TW), store, reads, Kind(self.scaling)).reshape(found_TI.shape)
        else:
            self._attend_in_loops(rows_TW, plan, store, found_TI)
        return found_TI

    def _attend_in_bf16(self, rows_TW: torch.Tensor, plan: StepPlan, store: LayerStore, found_TI: torch.Tensor) -> None:
        spans = plan.span_reads()
        team_of(torch.get_num_threads()).run(
            bf16_attention.attend, 1, bf16_unit.configurations(), kernels.array_of(rows_TW),
            spans.firsts_B, spans.counts_B, spans.starts_B, spans.tables_B, spans.slots_N,
            self.sliding_window or kernels.SEES_ALL, self.scaling, *store.arrays, kernels.array_of(found_TI),
            owner=store,
        )  # fmt: skip

    def _attend_in_loops(
        self, rows_TW: torch.Tensor, plan: StepPlan, store: LayerStore, found_TI: torch.Tensor
    ) -> None:
        """Short spans token by token; torch does the others."""
        reads = plan.token_reads()
        if len(reads.rows_R):
            kernels.attend(
                kernels.array_of(rows_TW), reads.rows_R, reads.tables_R, reads.ends_R, reads.blocks_N, plan.block_size,
                self.sliding_window or kernels.SEES_ALL, self.scaling, *store.arrays, kernels.array_of(found_TI),
            )  # fmt: skip
        if reads.has_chunks:
            found_TND = found_TI.view(-1, self.num_queries, self.head_size)
            chunks = plan.long_chunks(self.sliding_window)
            attend_chunks(*self._parts(rows_TW), store, chunks, Kind(self.scaling), found_TND)

    def _parts(self, rows_TW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys, values, ``[N, T, D]`` each."""
        heads_NTD = self._heads(rows_TW)
        keys, values = self.num_queries, self.num_queries + self.num_keys
        return heads_NTD[:keys], heads_NTD[keys:values], heads_NTD[values:]

    def _heads(self, rows_TW: torch.Tensor) -> torch.Tensor:
        """``[N, T, D]``: queries, keys, values."""
        return rows_TW.view(rows_TW.shape[0], -1, self.head_size).transpose(0, 1)

    def _store(self, rows_TW: torch.Tensor, paged: PagedStep) -> LayerStore:
        """The layer's keys and values, with `arrays`; cleared where the step wants it."""
        _, keys_KTD, values_KTD = self._parts(rows_TW)
        store = paged.store.cleared(self.layer_idx, keys_KTD, values_KTD, blocks_to_clear=paged.plan.blocks_to_clear)
        if store.arrays is None:
            store.arrays = (kernels.array_of(store.keys_KSD), kernels.array_of(store.values_KSE))
        return store


class CompiledNorm(nn.Module):
    """Takes the place of a root mean square norm."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self._norm = norm
        self._weight_H = _floats(norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Over the last dimension."""
        x = x.contiguous()
        normed = torch.empty_like(x)
        rows, normed_rows = (kernels.array_of(one.view(-1, x.shape[-1])) for one in (x, normed))
        kernels.norm(rows, self._weight_H, self._norm.variance_epsilon, normed_rows)
        return normed


def half_angles(angles: tuple[torch.Tensor, torch.Tensor]) -> tuple[Any, Any]:
    """Cosines and sines ``[1, T, D]`` as arrays ``[T, F]``: both halves of a head turn by the same angles."""
    half = angles[0].shape[-1] // 2
    cos_TF, sin_TF = (part_1TD[0, :, :half].float().contiguous().numpy() for part_1TD in angles)
    return cos_TF, sin_TF


def _floats(weight: torch.Tensor) -> Any:
    return weight.detach().float().numpy().copy()
