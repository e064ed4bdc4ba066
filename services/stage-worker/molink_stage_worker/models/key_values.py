"""How much a layer remembers of each token: the scalars of its keys and values, as the attention gets them. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from molink_stage_worker.models.config import ModelConfig
from molink_stage_worker.models.safetensors_header import TensorInfo

#: A state-space layer keeps one state a sequence, whatever its length; it is charged as if spread over so many tokens.
_TOKENS_TO_PAY_A_STATE = 128
_FUSED = ("qkv_proj.weight", "query_key_value.weight", "c_attn.weight", "Wqkv.weight")
_ATTENTION_OUTPUTS = ("o_proj.weight", "attention.dense.weight", "attn.c_proj.weight", "out_proj.weight")


def kv_scalars_per_token(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> int:
    """Scalars of keys and values that one token leaves in a layer with these tensors.

    Raises:
        ModelError: neither tensors nor config tell.
    """
    if any(key.endswith(".A_log") for key in tensors):
        return _state_space(config)
    if config.stated("kv_lora_rank") is not None:
        return _latent(config)
    if config.family == "falcon" and config.stated("new_decoder_architecture"):
        # its forward repeats keys and values for every query head before they are kept
        return 2 * config.number("hidden size")
    return _from_projections(config, tensors) or _from_config(config)


def _from_projections(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> int | None:
    """The rows of the projections: right for every grouping of heads, also one that differs between layers."""
    keys, values = _find(tensors, (".k_proj.weight",)), _find(tensors, (".v_proj.weight",))
    if keys is not None and values is not None:
        return keys.shape[0] + values.shape[0]
    fused, output = _find(tensors, _FUSED), _find(tensors, _ATTENTION_OUTPUTS)
    if fused is None or output is None:
        return None
    # queries, keys and values in one, whichever way round the matrix lies: what is not queries is kept
    kept, rest = divmod(fused.num_scalars - output.num_scalars, config.number("hidden size"))
    return kept if kept > 0 and rest == 0 else None


def _find(tensors: Mapping[str, TensorInfo], endings: tuple[str, ...]) -> TensorInfo | None:
    return next((info for key, info in tensors.items() if key.endswith(endings)), None)


def _latent(config: ModelConfig) -> int:
    """Latent attention keeps little, but what reaches the attention function is expanded: keys and values a head."""
    heads = config.number("attention heads")
    sizes = [config.optional(name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
    return heads * sum(size for size in sizes if isinstance(size, int))


def _state_space(config: ModelConfig) -> int:
    inner = config.optional("intermediate_size") or int(config.optional("expand") or 2) * config.number("hidden size")
    state = int(inner) * (int(config.optional("state_size") or 16) + int(config.optional("conv_kernel") or 4))
    return -(-state // _TOKENS_TO_PAY_A_STATE)


def _from_config(config: ModelConfig) -> int:
    heads = config.number("attention heads")
    kv_heads = config.optional("num_key_value_heads", "num_kv_heads") or heads
    head_size = config.optional("head_dim") or config.number("hidden size") // heads
    return 2 * int(kv_heads) * int(head_size)
