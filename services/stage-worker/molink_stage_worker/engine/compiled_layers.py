"""Lean layers for a CPU: between their matrix products everything is compiled loops (`kernels`).

Shapes: T tokens, W width of a row of queries, keys and values, I inner size, N heads, D head size, F half of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from molink_stage_worker.engine import kernels
from molink_stage_worker.engine.attention import Kind, PagedStep, attend, attend_chunks
from molink_stage_worker.engine.kv_store import LayerStore
from molink_stage_worker.engine.lean_layers import LeanLayer, Rotation

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
        """Cosines and sines ``[T, F]``; both halves of a head turn by the same angles."""
        if angles is not self._angles:
            half = angles[0].shape[-1] // 2
            cos_TF, sin_TF = (part_1TD[0, :, :half].float().contiguous().numpy() for part_1TD in angles)
            self._arrays = (cos_TF, sin_TF)
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
        store = self._store(rows_TW, paged, blocks_to_clear=plan.blocks_to_clear)
        cos_TF, sin_TF = self.angles_of(angles) if self.turns else (_NO_ANGLES, _NO_ANGLES)
        weights = (*self.norm_weights[2:], self.epsilon)
        kernels.rotate_and_store(kernels.array_of(rows_TW), cos_TF, sin_TF, *weights, plan.slots, *store.arrays)
        return self.found(rows_TW, paged)

    def found(self, rows_TW: torch.Tensor, paged: PagedStep) -> torch.Tensor:
        """What the queries find, ``[T, N * D]``, once all of `rows_TW` is turned, and keys and values are stored."""
        plan, heads = paged.plan, self.num_queries + self.num_keys
        heads_NTD = self._heads(rows_TW)
        keys_KTD, values_KTD = heads_NTD[self.num_queries : heads], heads_NTD[heads:]
        store = self._store(rows_TW, paged, blocks_to_clear=None)
        reads = plan.token_reads()
        kind = Kind(self.scaling)
        if reads.num_keys > _KEYS_FOR_ONE_THREAD and torch.get_num_threads() > 1:
            found_TND = attend(
                heads_NTD[: self.num_queries], keys_KTD, values_KTD, store, plan.reads(self.sliding_window), kind
            )
            return found_TND.reshape(rows_TW.shape[0], -1)
        found_TI = rows_TW.new_empty(rows_TW.shape[0], self.num_queries * self.head_size)
        if len(reads.rows_R):
            window = self.sliding_window or kernels.SEES_ALL
            where = (reads.rows_R, reads.tables_R, reads.ends_R, reads.blocks_N, plan.block_size, window)
            rows, found = kernels.array_of(rows_TW), kernels.array_of(found_TI)
            kernels.attend(rows, *where, self.scaling, *store.arrays, found)
        if reads.has_chunks:
            found_TND = found_TI.view(-1, self.num_queries, self.head_size)
            chunks = plan.long_chunks(self.sliding_window)
            attend_chunks(heads_NTD[: self.num_queries], keys_KTD, values_KTD, store, chunks, kind, found_TND)
        return found_TI

    def _heads(self, rows_TW: torch.Tensor) -> torch.Tensor:
        """``[N, T, D]``: queries, keys, values."""
        return rows_TW.view(rows_TW.shape[0], -1, self.head_size).transpose(0, 1)

    def _store(self, rows_TW: torch.Tensor, paged: PagedStep, *, blocks_to_clear: torch.Tensor | None) -> LayerStore:
        """The layer's keys and values, with `arrays`."""
        queries, keys = self.num_queries, self.num_queries + self.num_keys
        heads_NTD = self._heads(rows_TW)
        store = paged.store.cleared(
            self.layer_idx, heads_NTD[queries:keys], heads_NTD[keys:], blocks_to_clear=blocks_to_clear
        )
        if store.arrays is None:
            store.arrays = (kernels.array_of(store.keys_KSD), kernels.array_of(store.values_KSE))
        return store


def _floats(weight: torch.Tensor) -> Any:
    return weight.detach().float().numpy().copy()
