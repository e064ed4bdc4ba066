"""The model's card: counted from config and headers, without reading a tensor. Pure."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from molink_common.errors import ModelError
from molink_common.messages import FileOffer, ModelCard
from molink_stage_worker.models.checkpoint import Checkpoint
from molink_stage_worker.models.config import ModelConfig, eos_token_ids
from molink_stage_worker.models.key_values import kv_scalars_per_token
from molink_stage_worker.models.safetensors_header import TensorInfo
from molink_stage_worker.models.selection import KeyMap

_FINGERPRINT_VERSION = 1
_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
#: Tables that old checkpoints carry along and that transformers makes itself.
_TABLES = (".masked_bias", ".inv_freq", ".attn.bias", ".attention.bias")


def build_card(
    *,
    name: str,
    aliases: tuple[str, ...],
    fingerprint: str,
    packed: bool,
    config: ModelConfig,
    checkpoint: Checkpoint,
    keys: KeyMap,
    generation: Mapping[str, Any],
    tokenizer_limit: object,
    offers: tuple[FileOffer, ...],
) -> ModelCard:
    """The card of a model.

    Raises:
        ModelError: the config lacks a number that nobody else knows, or the weights are no plain numbers.
    """
    vocabulary_size = config.number("vocabulary size")
    by_layer: list[dict[str, TensorInfo]] = [{} for _ in range(keys.num_layers)]
    for key, layer in keys.layer_of.items():
        by_layer[layer][key] = checkpoint.tensor(key)
    embeddings = _count(keys.embeddings, checkpoint)
    both = _count(keys.both, checkpoint)
    return ModelCard(
        name=name,
        aliases=aliases,
        fingerprint=fingerprint,
        family=config.family,
        packed=packed,
        num_layers=keys.num_layers,
        hidden_size=config.number("hidden size"),
        vocabulary_size=vocabulary_size,
        context_length=config.context_length(tokenizer_limit),
        checkpoint_dtype=_checkpoint_dtype(checkpoint),
        layer_parameters=tuple(_count(tensors, checkpoint) for tensors in by_layer),
        embedding_parameters=embeddings + _count(keys.head_only, checkpoint) + both,
        output_parameters=_count(keys.tail_only | keys.output_embeddings, checkpoint) + both,
        kv_scalars_per_token=tuple(kv_scalars_per_token(config, tensors) for tensors in by_layer),
        eos_token_ids=tuple(token for token in eos_token_ids(config, generation) if token < vocabulary_size),
        tokenizer_files=offers,
    )


def _count(keys: Iterable[str], checkpoint: Checkpoint) -> int:
    return sum(
        checkpoint.tensor(key).num_scalars for key in keys if not key.endswith(_TABLES) or _is_bias(key, checkpoint)
    )


def _is_bias(key: str, checkpoint: Checkpoint) -> bool:
    return key.endswith(".bias") and len(checkpoint.tensor(key).shape) == 1


def _checkpoint_dtype(checkpoint: Checkpoint) -> str:
    scalars: Counter[str] = Counter()
    for header in checkpoint.headers.values():
        for tensor in header.values():
            scalars[tensor.dtype] += tensor.num_scalars
    most = scalars.most_common(1)[0][0]
    if most not in _DTYPE_NAMES:
        raise ModelError(
            f"its weights are packed as {most}; served are plain float32, float16, bfloat16 and GGUF files"
        )
    return _DTYPE_NAMES[most]


def fingerprint_of(config: ModelConfig, checkpoint: Checkpoint, identities: Mapping[str, str]) -> str:
    """Equal for the same config and weights, wherever they lie. `identities`: file → what stands for its contents."""
    tensors = sorted(
        (key, shard, info.dtype, info.shape, info.start, info.end)
        for shard, header in checkpoint.headers.items()
        for key, info in header.items()
    )
    return _digest([config.canonical(), tensors, sorted(identities.items())])


def fingerprint_of_conversion(recipe: str, source_sha256: str) -> str:
    """For weights that this program made out of a file with that checksum.

    The same source and recipe give the same weights on every machine, while the config that is written beside
    them may differ between versions of transformers.
    """
    return _digest([recipe, source_sha256])


def _digest(facts: list[Any]) -> str:
    text = orjson.dumps([_FINGERPRINT_VERSION, *facts], option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(text).hexdigest()
