"""Cutting a transformers model down to one stage.

It happens twice. While the model is built (on no device, so at no cost), what the stage does not own becomes
a placeholder at the same place, so that the checkpoint's names still fit and nothing else is read. After the
weights are there, the placeholders go and the layers are counted anew from 0, so that the model's own forward
runs the stage as if it were a small whole model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from molink_stage_worker.engine.families import Family, Neutral
from molink_stage_worker.engine.interface import StageSpec


class Placeholder(nn.Module):
    """Stands where a module of another stage was; hands on what it is given."""

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """The input itself."""
        return hidden


class Nothing(nn.Module):
    """Adds nothing, where another stage has added positions already."""

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        """Zero, to be broadcast."""
        return torch.zeros(())


def stage_class(model_class: type[nn.Module], spec: StageSpec, family: Family) -> type[nn.Module]:
    """A subclass of a CausalLM class that holds placeholders for what the stage does not own."""

    def build(self: Any, config: Any) -> None:
        model_class.__init__(self, config)  # type: ignore[arg-type]
        _omit_the_rest(self, spec, family)

    return type(model_class.__name__, (model_class,), {"__init__": build, "__module__": model_class.__module__})


def _omit_the_rest(model: Any, spec: StageSpec, family: Family) -> None:
    base = model.base_model
    layers = getattr(base, family.layers)
    for index in range(len(layers)):
        if not spec.first_layer <= index < spec.last_layer:
            layers[index] = Placeholder()
    is_tied = bool(model.config.tie_word_embeddings)
    if not spec.is_tail:
        setattr(base, family.norm, Placeholder())
        model.set_output_embeddings(Placeholder())
    if not spec.is_head:
        for name, neutral in family.only_at_head:
            setattr(base, name, _neutral(neutral))
    if not spec.is_head and not (spec.is_tail and is_tied):
        # a tied tail reads the embedding: it is its output head
        setattr(base, family.embedding, Placeholder())
    if is_tied and not spec.is_tail:
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}


def _neutral(neutral: Neutral) -> object:
    match neutral:
        case Neutral.IDENTITY:
            return Placeholder()
        case Neutral.ZERO:
            return Nothing()
        case Neutral.ONE:
            return 1.0


def cut(model: Any, spec: StageSpec, family: Family) -> None:
    """Drop the placeholders of other stages' layers; the rest become layers 0 … n−1."""
    base = model.base_model
    kept = list(getattr(base, family.layers))[spec.first_layer : spec.last_layer]
    setattr(base, family.layers, nn.ModuleList(kept))
    for index, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    if not spec.is_head:
        setattr(base, family.embedding, Placeholder())
    _cut_config(model.config, spec)
    if base.config is not model.config:
        _cut_config(base.config, spec)


def _cut_config(config: Any, spec: StageSpec) -> None:
    """Shorten whatever counts or lists layers. The layers have read theirs already."""
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == spec.num_layers and "layer" in name:
            setattr(config, name, value[spec.first_layer : spec.last_layer])
    config.num_hidden_layers = spec.last_layer - spec.first_layer
