"""Which model families can be served, and how: one literal table.

A family is here because the matrix in ``tests/architectures`` showed that its stages, cut anywhere, give the
tokens of the whole model. Anything else is refused: a stage of a model that mixes sequences or skips a scaling
would answer fluently and wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from molink_common.errors import ModelError


class Serving(Enum):
    """How a step of several sequences runs."""

    PACKED = "packed"
    """All tokens of all sequences in one pass, keys and values in the paged store."""
    PER_SEQUENCE = "per sequence"
    """One pass a sequence, each with transformers' own cache: state or position biases defy packing."""


class Neutral(Enum):
    """What takes the place of something that the model's forward does between embedding and first layer.

    Every stage runs that forward, but only the head may do it.
    """

    IDENTITY = "identity"
    """A module that would transform the hidden states."""
    ZERO = "zero"
    """A module whose output is added to the hidden states."""
    ONE = "one"
    """A number that the hidden states are multiplied by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How to serve and to cut the models of one ``model_type``. Names are attributes of the base model."""

    serving: Serving = Serving.PACKED
    layers: str = "layers"
    norm: str = "norm"
    embedding: str = "embed_tokens"
    only_at_head: tuple[tuple[str, Neutral], ...] = ()
    cache_argument: str = "past_key_values"
    """The forward's name for the cache (only asked of families that run per sequence)."""
    continues_by_one: bool = False
    """After its first pass a sequence must go on token by token: a longer pass would start from no state."""


_PLAIN = Family()

FAMILIES: dict[str, Family] = {
    "cohere": _PLAIN,
    "cohere2": _PLAIN,
    "deepseek_v2": _PLAIN,
    "deepseek_v3": _PLAIN,
    "exaone4": _PLAIN,
    "gemma": _PLAIN,
    "gemma2": _PLAIN,
    "gemma3_text": _PLAIN,
    "glm": _PLAIN,
    "glm4": _PLAIN,
    "gpt2": Family(layers="h", norm="ln_f", embedding="wte", only_at_head=(("wpe", Neutral.ZERO),)),
    "gpt_neox": Family(norm="final_layer_norm", embedding="embed_in"),
    "gpt_oss": _PLAIN,
    "granite": Family(only_at_head=(("embedding_multiplier", Neutral.ONE),)),
    "llama": _PLAIN,
    "ministral3": _PLAIN,
    "mistral": _PLAIN,
    "mixtral": _PLAIN,
    "olmo2": _PLAIN,
    "olmo3": _PLAIN,
    "phi": Family(norm="final_layernorm"),
    "phi3": _PLAIN,
    "qwen2": _PLAIN,
    "qwen2_moe": _PLAIN,
    "qwen3": _PLAIN,
    "qwen3_moe": _PLAIN,
    "smollm3": _PLAIN,
    "starcoder2": _PLAIN,
    "bloom": Family(
        serving=Serving.PER_SEQUENCE,
        layers="h",
        norm="ln_f",
        embedding="word_embeddings",
        only_at_head=(("word_embeddings_layernorm", Neutral.IDENTITY),),
    ),
    "falcon": Family(serving=Serving.PER_SEQUENCE, layers="h", norm="ln_f", embedding="word_embeddings"),
    "gptj": Family(serving=Serving.PER_SEQUENCE, layers="h", norm="ln_f", embedding="wte"),
    "mamba": Family(
        serving=Serving.PER_SEQUENCE,
        norm="norm_f",
        embedding="embeddings",
        cache_argument="cache_params",
        continues_by_one=True,
    ),
    "stablelm": Family(serving=Serving.PER_SEQUENCE),
}

REFUSED: dict[str, str] = {
    "opt": "its learned positions are computed from the attention mask, which a stage does not have",
    "qwen3_next": "its linear attention layers keep a state that cannot be cut by transformers' own forward",
    "gemma3": "it reads images; convert its language part to a gemma3_text checkpoint",
}
"""Families that somebody may well try, with the reason. Any other that is not in the table is merely untried."""
_LEARNED_POSITIONS = frozenset({"gpt2"})


def family_of(config: Any) -> Family:
    """The table's entry for a transformers configuration.

    Raises:
        ModelError: the family is not served; the message says why and which are.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        reason = REFUSED.get(config.model_type, "it has not been shown to give the whole model's tokens when cut")
        raise ModelError(
            f"models of the family {config.model_type!r} are not served: {reason}. "
            f"Served are: {', '.join(sorted(FAMILIES))}"
        )
    return family


def serving_of(config: Any) -> Serving:
    """How models with this configuration are served.

    Raises:
        ModelError: as `family_of`.
    """
    return family_of(config).serving


def strict_context_length(config: Any) -> int | None:
    """How many tokens a sequence may have at most; None if more would merely be answered badly.

    Learned positions end. And some rotary embeddings change their frequencies once any sequence of a pass is
    longer than those the model was first trained on: what a sequence gets would depend on its chunks and its
    neighbours, so these models are served up to that length, where nothing changes yet.
    """
    trained: int | None = getattr(config, "max_position_embeddings", None)
    bounds: list[int | None] = [trained] if config.model_type in _LEARNED_POSITIONS else []
    parameters = getattr(config, "rope_parameters", None) or {}
    # one flat dictionary, or one for each type of layer
    for variant in [value for value in parameters.values() if isinstance(value, dict)] or [parameters]:
        match variant.get("rope_type"):
            case "longrope":
                bounds.append(variant.get("original_max_position_embeddings", trained))
            case "dynamic":
                bounds.append(trained)
    return min((bound for bound in bounds if bound is not None), default=None)
