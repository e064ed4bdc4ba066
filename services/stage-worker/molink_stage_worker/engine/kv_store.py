"""The keys and values of every sequence on a stage, in blocks.

Shapes: K key heads, N blocks, S = N · block size slots, D head size of keys, E of values, X = scalars of a
block of one head.

Heads come first, so that each head's keys of a block are one run of memory, whether gathered or seen in place.
Layers differ in their shapes, and keys differ from values (multi-head latent attention), so each layer's
tensors are made when its first keys arrive. They are not cleared when made: pages that no token has touched cost
nothing. Blocks are cleared when they are given out and not filled at once.

Attention in bfloat16 orders the numbers of each 16 slots in a way of its own (see `bf16_attention`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True)
class LayerStore:
    """One layer's keys and values, by slot and by block (the same memory)."""

    keys_KSD: torch.Tensor
    values_KSE: torch.Tensor
    keys_KNX: torch.Tensor
    values_KNX: torch.Tensor
    arrays: Any = None
    """Keys and values as arrays (again the same memory), once compiled code has asked for them."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class KvStore:
    """All layers of a stage."""

    num_blocks: int
    block_size: int
    _layers: dict[int, LayerStore] = field(default_factory=dict)

    def write(
        self,
        layer: int,
        slots_T: torch.Tensor,
        keys_KTD: torch.Tensor,
        values_KTE: torch.Tensor,
        *,
        blocks_to_clear: torch.Tensor | None,
    ) -> LayerStore:
        """Clear blocks, then put the keys and values of T tokens into their slots; gives the layer's tensors."""
        store = self.cleared(layer, keys_KTD, values_KTE, blocks_to_clear=blocks_to_clear)
        store.keys_KSD.index_copy_(1, slots_T, keys_KTD)
        store.values_KSE.index_copy_(1, slots_T, values_KTE)
        return store

    def cleared(
        self,
        layer: int,
        keys_KTD: torch.Tensor,
        values_KTE: torch.Tensor,
        *,
        blocks_to_clear: torch.Tensor | None,
    ) -> LayerStore:
        """The layer's tensors, made for keys and values like these, for a caller who puts them into their slots."""
        store = self._layers.get(layer)
        if store is None:
            store = self._layers[layer] = self._make(keys_KTD, values_KTE)
        if blocks_to_clear is not None:
            store.keys_KNX.index_fill_(1, blocks_to_clear, 0)
            store.values_KNX.index_fill_(1, blocks_to_clear, 0)
        return store

    def _make(self, keys_KTD: torch.Tensor, values_KTE: torch.Tensor) -> LayerStore:
        num_slots = self.num_blocks * self.block_size
        keys = keys_KTD.new_empty(keys_KTD.shape[0], num_slots, keys_KTD.shape[2])
        values = values_KTE.new_empty(values_KTE.shape[0], num_slots, values_KTE.shape[2])
        return LayerStore(keys, values, self._by_block(keys), self._by_block(values))

    def _by_block(self, slots_KSD: torch.Tensor) -> torch.Tensor:
        return slots_KSD.view(slots_KSD.shape[0], self.num_blocks, -1)
