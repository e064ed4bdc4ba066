"""Exchange the layers of a loaded model for lean ones, where they are known to compute the same.

Only layers whose code is known to have the Llama shape are replaced. Every other family's layers run as transformers
wrote them; of those models only the output head's product is exchanged for a packed one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from molink_stage_worker.engine import kernels
from molink_stage_worker.engine.compiled_layers import CompiledLayer, CompiledNorm, CompiledRotation
from molink_stage_worker.engine.layer_stack import LayerStack, can_stack
from molink_stage_worker.engine.lean_layers import LeanLayer, Rotation
from molink_stage_worker.engine.projections import PackedProjection, can_pack, project

_LLAMA_SHAPED = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})


def make_lean(model: PreTrainedModel) -> None:
    """Exchange what is known to be exchangeable in a pruned, loaded model of a packed family.

    `model` is a causal language model of any family. Layers are replaced one by one, so that at most one
    layer's weights exist twice at a time.
    """
    config: Any = model.config
    if _is_llama_shaped(config):
        in_place_of = _replacement(model)
        layers: Any = model.model.layers
        for index, layer in enumerate(layers):
            if hasattr(layer, "self_attn"):
                layers[index] = in_place_of(layer)
        if can_stack(layers):
            model.model.layers = nn.ModuleList([LayerStack(list(layers))])
            if hasattr(model.model.norm, "variance_epsilon"):
                model.model.norm = CompiledNorm(model.model.norm)
    head: Any = model.get_output_embeddings()
    if type(head) is nn.Linear and can_pack(head.weight.dtype, head.weight.device):
        model.set_output_embeddings(project(head))
    if any(isinstance(module, PackedProjection) for module in model.modules()):
        # what was packed was read through a mapping of the checkpoint, which stays as long as anything points into it
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()


def _is_llama_shaped(config: Any) -> bool:
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in _LLAMA_SHAPED
        and getattr(config, "hidden_act", None) == "silu"
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and not getattr(config, "pretraining_tp", 1) > 1
    )


def _replacement(model: PreTrainedModel) -> Callable[[nn.Module], nn.Module]:
    """The best kind of layer for where the model is."""
    if model.device.type == "cpu" and kernels.compile_for(model.dtype):
        turns = CompiledRotation()
        return lambda layer: CompiledLayer(layer, turns)
    rotation = Rotation()
    return lambda layer: LeanLayer(layer, rotation)
