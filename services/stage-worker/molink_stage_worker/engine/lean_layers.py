"""Decoder layers of the Llama shape with fewer and larger calls.

A layer of transformers is 43 calls that compute (counted for one token, views left out); for a handful of tokens
the calls cost more than the arithmetic. `LeanLayer` takes the weights of such a layer and needs 16: one projection
for queries, keys and values, one rotation for queries and keys, activation, factor and residual folded into
the projections. It stands in the model's own forward where the layer stood, so everything before and after
(embedding, rotary angles, final norm, output head) stays the model's.

Shapes: T tokens, H hidden size, N query heads, K key heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm

from molink_stage_worker.engine.attention import PagedStep, paged_attention
from molink_stage_worker.engine.projections import project


class Rotation:
    """Rotary embedding of queries and keys in one go. Angles are the same for all layers of a step."""

    def __init__(self) -> None:
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None
        self._cos_T1D = torch.empty(0)
        self._signed_sin_T1D = torch.empty(0)

    def apply(self, x_TND: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """``x * cos + rotate_half(x) * sin``; rotating by half and signing the sine is the same."""
        if angles is not self._angles:
            cos_1TD, sin_1TD = angles
            half = sin_1TD.shape[-1] // 2
            self._cos_T1D = cos_1TD[0].unsqueeze(1)
            self._signed_sin_T1D = torch.cat([-sin_1TD[0, :, :half], sin_1TD[0, :, half:]], dim=-1).unsqueeze(1)
            self._angles = angles
        half = x_TND.shape[-1] // 2
        return torch.addcmul(x_TND * self._cos_T1D, torch.roll(x_TND, half, -1), self._signed_sin_T1D)


class LeanLayer(nn.Module):
    """Takes the place of one decoder layer; the original is not kept."""

    def __init__(self, layer: nn.Module, rotation: Rotation) -> None:
        super().__init__()
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        self.layer_idx = attention.layer_idx
        self.sliding_window = _sliding_window(attention)
        self.head_size = attention.head_dim
        self.scaling = attention.scaling
        self.num_queries = attention.q_proj.out_features // attention.head_dim
        self.num_keys = attention.k_proj.out_features // attention.head_dim
        self._rotation = rotation if getattr(attention, "use_rope", True) else None
        self.input_norm = layer.input_layernorm
        self.post_attention_norm = layer.post_attention_layernorm
        self.query_norm = getattr(attention, "q_norm", None)
        self.key_norm = getattr(attention, "k_norm", None)
        self.query_key_value = project(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = project(attention.o_proj)
        self.gate = project(mlp.gate_proj)
        self.up = project(mlp.up_proj)
        self.down = project(mlp.down_proj)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        paged: PagedStep,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **_: Any,
    ) -> torch.Tensor:
        """``[1, T, H]`` to ``[1, T, H]``, as the layer that it replaces."""
        hidden_TH = hidden_states[0]
        rows_TW = self.query_key_value(self._normed(self.input_norm, hidden_TH))
        hidden_TH = self.output.plus(self._attended(rows_TW, paged, position_embeddings), hidden_TH)
        normed_TH = self._normed(self.post_attention_norm, hidden_TH)
        inner_TI = self.up.times(normed_TH, self.gate.with_silu(normed_TH))
        return self.down.plus(inner_TI, hidden_TH).unsqueeze(0)

    def _normed(self, norm: Any, x: torch.Tensor) -> torch.Tensor:
        """Root mean square norm over the last dimension, in one call."""
        return rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)

    def _attended(
        self, rows_TW: torch.Tensor, paged: PagedStep, angles: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Queries, keys and values of each token, side by side, to what its queries have found; keys are stored."""
        heads = self.num_queries + self.num_keys
        projected_TND = rows_TW.view(-1, heads + self.num_keys, self.head_size)
        rotated_TND = projected_TND[:, :heads]
        if self.query_norm is not None and self.key_norm is not None:
            queries = self._normed(self.query_norm, rotated_TND[:, : self.num_queries])
            keys = self._normed(self.key_norm, rotated_TND[:, self.num_queries :])
            rotated_TND = torch.cat([queries, keys], dim=1)
        if self._rotation is not None:
            rotated_TND = self._rotation.apply(rotated_TND, angles)
        attended, _weights = paged_attention(
            self,
            rotated_TND[:, : self.num_queries].transpose(0, 1).unsqueeze(0),
            rotated_TND[:, self.num_queries :].transpose(0, 1).unsqueeze(0),
            projected_TND[:, heads:].transpose(0, 1).unsqueeze(0),
            None,
            paged=paged,
            scaling=self.scaling,
        )
        return attended.reshape(rows_TW.shape[0], -1)


def _sliding_window(attention: Any) -> int | None:
    if hasattr(attention, "sliding_window"):
        window: int | None = attention.sliding_window
    else:
        window = attention.config.sliding_window if attention.config.model_type == "mistral" else None
    return window
