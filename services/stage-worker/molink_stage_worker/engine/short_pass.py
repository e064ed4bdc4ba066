"""A pass over a stack of layers without the frame that transformers puts around it.

For one token the frame costs as much as the layers' arithmetic would on eight: dozens of wrappers, masks that nobody
reads, outputs as objects, each out of a cold cache. Models with the Llama shape all do the same in it: embedding,
angles, layers, norm, output head.

Shapes: T tokens, H hidden size, R rows of logits, V vocabulary, F half of a head's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from molink_stage_worker.engine.attention import PagedStep
from molink_stage_worker.engine.compiled_layers import half_angles
from molink_stage_worker.engine.layer_stack import LayerStack
from molink_stage_worker.engine.step_plan import StepPlan

_TURNED_BY_POSITION_ALONE = frozenset({"default", "linear", "llama3", "yarn"})
"""Kinds of rotary embedding whose angles at a position do not depend on how long the sequence is."""
_FEWEST_POSITIONS = 1024


class ShortPass:
    """Stands in for the forward of a model whose layers are one stack, as long as steps are small."""

    def __init__(self, model: Any) -> None:
        """`model` is one of which `can_shorten` holds."""
        base = model.base_model
        self._embedding = base.embed_tokens
        self._stack: LayerStack = base.layers[0]
        self._norm = base.norm
        self._head = model.get_output_embeddings()
        self._angles = _Angles(base.rotary_emb, model.dtype)

    def takes(self, plan: StepPlan) -> bool:
        """Whether the step is one for this."""
        return self._stack.takes(plan)

    def hidden(self, inputs: torch.Tensor, paged: PagedStep) -> torch.Tensor:
        """Ids ``[1, T]`` or hidden states ``[1, T, H]`` to what comes out of the last layer, ``[T, H]``; no norm."""
        hidden_1TH: torch.Tensor = self._embedding(inputs)
        hidden_TH = hidden_1TH[0].clone(memory_format=torch.contiguous_format)
        self._stack.run(hidden_TH, paged, self._angles.at(paged.plan.positions))
        return hidden_TH

    def logits(self, inputs: torch.Tensor, paged: PagedStep, rows: Sequence[int]) -> torch.Tensor:
        """The same, then norm and output head for some rows: ``[R, V]``."""
        hidden_TH = self.hidden(inputs, paged)
        hidden_RH = hidden_TH if len(rows) == len(hidden_TH) else hidden_TH[rows]
        return self._head(self._norm(hidden_RH))  # type: ignore[no-any-return]


def can_shorten(model: Any) -> bool:
    """Whether all layers are one stack, and turn queries and keys by angles that can be kept."""
    layers: Any = getattr(model.base_model, "layers", ())
    is_stack = len(layers) == 1 and isinstance(layers[0], LayerStack)
    return is_stack and model.base_model.rotary_emb.rope_type in _TURNED_BY_POSITION_ALONE


class _Angles:
    """Cosines and sines of all positions met so far, as the model computes them."""

    def __init__(self, rotary: Any, dtype: torch.dtype) -> None:
        self._rotary = rotary
        self._like = torch.empty(0, dtype=dtype)
        self._tables: tuple[Any, Any] = (np.empty((0, 0), np.float32),) * 2

    def at(self, positions_T: Any) -> tuple[Any, Any]:
        """``[T, F]`` each."""
        last = int(positions_T.max())
        if last >= len(self._tables[0]):
            count = max(_FEWEST_POSITIONS, 1 << (last + 1).bit_length())
            self._tables = half_angles(self._rotary(self._like, torch.arange(count).unsqueeze(0)))
        cos_PF, sin_PF = self._tables
        return cos_PF[positions_T], sin_PF[positions_T]
