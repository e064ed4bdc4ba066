"""Attention over the paged store, registered with transformers under the name ``molink``.

Shapes: T tokens of a step, H query heads, K key heads, G = H/K query heads for each key head, D head size
(values may have another, E), B sequences, S keys, Q queries a key head.

A group's query heads share their keys, so they are laid along the query length: nothing is repeated, and one
token of many sequences is one call with Q = G.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from molink_stage_worker.engine.kv_store import KvStore, LayerStore
from molink_stage_worker.engine.step_plan import Chunk, KeyView, Reads, StepPlan

ATTENTION_NAME = "molink"

_PRODUCTS_FROM_KEYS = 512
"""From so many keys in a group on, two batched matrix products beat the fused kernel for bfloat16 on a CPU: the
kernel works through heads one by one and gives each only a few queries."""


@dataclass(frozen=True, slots=True)
class PagedStep:
    """What the attention function needs; travels through the model's layers as the argument ``paged``."""

    store: KvStore
    plan: StepPlan


@dataclass(frozen=True, slots=True)
class Kind:
    """How a layer turns scores into weights."""

    scale: float | None = None
    softcap: float | None = None
    sinks_H: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether a softmax of the scaled scores is all."""
        return self.softcap is None and self.sinks_H is None


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # transformers passes it; none is ever built
    *,
    paged: PagedStep,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Store the step's keys and values, then attend causally within each sequence.

    Takes ``query [1, H, T, D]``, ``key [1, K, T, D]``, ``value [1, K, T, E]``; gives ``[1, T, H, E]``.
    """
    # a family that does not pass its window has it on the module
    window = kwargs["sliding_window"] if "sliding_window" in kwargs else getattr(module, "sliding_window", None)
    kind = Kind(scaling, softcap, s_aux)
    plan = paged.plan
    index: int = module.layer_idx  # type: ignore[assignment]
    layer = paged.store.write(index, plan.slots_T, key[0], value[0], blocks_to_clear=plan.blocks_to_clear)
    return attend(query[0], key[0], value[0], layer, plan.reads(window), kind).unsqueeze(0), None


def attend(
    query_HTD: torch.Tensor,
    keys_KTD: torch.Tensor,
    values_KTE: torch.Tensor,
    layer: LayerStore,
    reads: Reads,
    kind: Kind,
) -> torch.Tensor:
    """Attention of a step whose keys and values are in the store already; gives ``[T, H, E]``."""
    if reads.is_one_group:
        return _attend_decode(query_HTD, layer, reads.groups[0].view, kind)
    num_heads, num_tokens, _ = query_HTD.shape
    output_THE = query_HTD.new_empty(num_tokens, num_heads, values_KTE.shape[-1])
    for group in reads.groups:
        output_THE[group.rows] = _attend_decode(query_HTD[:, group.rows], layer, group.view, kind)
    attend_chunks(query_HTD, keys_KTD, values_KTE, layer, reads.chunks, kind, output_THE)
    return output_THE


def attend_chunks(
    query_HTD: torch.Tensor,
    keys_KTD: torch.Tensor,
    values_KTE: torch.Tensor,
    layer: LayerStore,
    chunks: Sequence[Chunk],
    kind: Kind,
    output_THE: torch.Tensor,
) -> None:
    """Attention of a step's chunks into their rows of `output_THE`."""
    for chunk in chunks:
        rows = chunk.rows
        if chunk.view is None:
            keys_1KSD, values_1KSE = keys_KTD[None, :, rows], values_KTE[None, :, rows]
        else:
            keys_1KSD, values_1KSE = _read(layer, chunk.view)
        output_THE[rows] = _attend_chunk(query_HTD[:, rows], keys_1KSD, values_1KSE, chunk, kind)


def _read(layer: LayerStore, view: KeyView) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys ``[B, K, S, D]`` and values ``[B, K, S, E]`` of a view; a copy only if they must be gathered."""
    if view.run is not None:
        return layer.keys_KSD[None, :, view.run], layer.values_KSE[None, :, view.run]
    return _gathered(layer.keys_KNX, view, layer.keys_KSD), _gathered(layer.values_KNX, view, layer.values_KSE)


def _gathered(blocks_KNX: torch.Tensor, view: KeyView, slots_KSD: torch.Tensor) -> torch.Tensor:
    heads, _, head_size = slots_KSD.shape
    assert view.blocks_N is not None
    picked = blocks_KNX.index_select(1, view.blocks_N)
    return picked.view(heads, view.batch, -1, head_size)[:, :, view.keys].transpose(0, 1)


def _attend_decode(query_HBD: torch.Tensor, layer: LayerStore, view: KeyView, kind: Kind) -> torch.Tensor:
    """One token for each of B sequences; gives ``[B, H, E]``."""
    keys_BKSD, values_BKSE = _read(layer, view)
    num_heads, batch, head_size = query_HBD.shape
    key_heads = keys_BKSD.shape[1]
    query_BKGD = query_HBD.transpose(0, 1).reshape(batch, key_heads, num_heads // key_heads, head_size)
    if kind.is_plain and _products_are_faster(keys_BKSD):
        output = _attend_by_products(query_BKGD, keys_BKSD, values_BKSE, view.mask, kind)
    elif kind.is_plain:
        output = scaled_dot_product_attention(query_BKGD, keys_BKSD, values_BKSE, attn_mask=view.mask, scale=kind.scale)
    else:
        output = _attend_explicitly(query_BKGD, keys_BKSD, values_BKSE, view.mask, kind, repeats=1)
    return output.reshape(batch, num_heads, -1)


def _products_are_faster(keys_BKSD: torch.Tensor) -> bool:
    return (
        keys_BKSD.dtype is torch.bfloat16
        and keys_BKSD.device.type == "cpu"
        and keys_BKSD.shape[0] * keys_BKSD.shape[2] >= _PRODUCTS_FROM_KEYS
        and _cpu_multiplies_bfloat16()
    )


@cache
def _cpu_multiplies_bfloat16() -> bool:
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


def _attend_by_products(
    query_BKGD: torch.Tensor,
    keys_BKSD: torch.Tensor,
    values_BKSE: torch.Tensor,
    mask: torch.Tensor | None,
    kind: Kind,
) -> torch.Tensor:
    """Scores, softmax (in float32 inside) and values as three calls; scores are rounded to bfloat16 between."""
    scale = kind.scale if kind.scale is not None else query_BKGD.shape[-1] ** -0.5
    # heads first is how the store lies: batches of both products are then views
    query_KBGD, keys_KBSD, values_KBSE = (t.transpose(0, 1) for t in (query_BKGD * scale, keys_BKSD, values_BKSE))
    scores_KBGS = torch.matmul(query_KBGD, keys_KBSD.transpose(-1, -2))
    if mask is not None:
        scores_KBGS += mask.transpose(0, 1)
    return torch.matmul(torch.softmax(scores_KBGS, dim=-1), values_KBSE).transpose(0, 1)


def _attend_chunk(
    query_HCD: torch.Tensor, keys_1KSD: torch.Tensor, values_1KSE: torch.Tensor, chunk: Chunk, kind: Kind
) -> torch.Tensor:
    """C tokens of one sequence; gives ``[C, H, E]``."""
    num_heads, count, head_size = query_HCD.shape
    key_heads = keys_1KSD.shape[1]
    group = num_heads // key_heads
    mask = None if chunk.view is None else chunk.view.mask
    if kind.is_plain and (group == 1 or not chunk.short or mask is None):
        output = scaled_dot_product_attention(
            query_HCD[None],
            _repeated(keys_1KSD, group),
            _repeated(values_1KSE, group),
            attn_mask=mask,
            is_causal=mask is None,
            scale=kind.scale,
        )
        return output[0].transpose(0, 1)
    if mask is None:
        mask = _causal_mask(count, query_HCD)
    query_1KQD = query_HCD.reshape(1, key_heads, group * count, head_size)
    mask = mask.repeat(1, 1, group, 1)
    if kind.is_plain:
        output = scaled_dot_product_attention(query_1KQD, keys_1KSD, values_1KSE, attn_mask=mask, scale=kind.scale)
    else:
        output = _attend_explicitly(query_1KQD, keys_1KSD, values_1KSE, mask, kind, repeats=count)
    return output.reshape(num_heads, count, -1).transpose(0, 1)


def _repeated(tensor_1KSD: torch.Tensor, group: int) -> torch.Tensor:
    """Each key head `group` times, next to each other."""
    if group == 1:
        return tensor_1KSD
    batch, heads, keys, size = tensor_1KSD.shape
    return tensor_1KSD[:, :, None].expand(batch, heads, group, keys, size).reshape(batch, heads * group, keys, size)


def _causal_mask(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((1, 1, count, count), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)


def _attend_explicitly(
    query_BKQD: torch.Tensor,
    keys_BKSD: torch.Tensor,
    values_BKSE: torch.Tensor,
    mask: torch.Tensor | None,
    kind: Kind,
    *,
    repeats: int,
) -> torch.Tensor:
    """Scores, cap, mask, sinks and softmax step by step, for what no fused kernel does.

    Each of a group's query heads has `repeats` queries, side by side.
    """
    scale = kind.scale if kind.scale is not None else query_BKQD.shape[-1] ** -0.5
    scores = torch.matmul(query_BKQD, keys_BKSD.transpose(-1, -2)) * scale
    if kind.softcap is not None:
        scores = torch.tanh(scores / kind.softcap) * kind.softcap
    if mask is not None:
        scores = scores + mask
    if kind.sinks_H is None:
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    else:
        # a sink takes its share of the attention and gives no value
        batch, key_heads, _, _ = scores.shape
        sinks = kind.sinks_H.reshape(1, key_heads, -1, 1).repeat_interleave(repeats, dim=2)
        joined = torch.cat([scores, sinks.expand(batch, -1, -1, -1).to(scores.dtype)], dim=-1)
        weights = torch.softmax(joined, dim=-1, dtype=torch.float32)[..., :-1]
    return torch.matmul(weights.to(values_BKSE.dtype), values_BKSE)


AttentionInterface.register(ATTENTION_NAME, paged_attention)
