"""One tiny random model for each family that is served: four layers, windows and caps small enough to matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

NUM_LAYERS = 4
VOCABULARY_SIZE = 128

_COMMON: dict[str, Any] = {
    "num_hidden_layers": NUM_LAYERS,
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS = {"head_dim": 8}
_WINDOW = {"sliding_window": 6}
_MIXED_LAYERS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_GPT = {
    "n_layer": NUM_LAYERS,
    "n_embd": 32,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": VOCABULARY_SIZE,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 2,
    "n_group": 2,
    "topk_group": 1,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "bloom": _GPT | {"hidden_size": 32},
    "cohere": _COMMON | {"logit_scale": 0.5, "use_qk_norm": True},
    "cohere2": _COMMON | _HEADS | _WINDOW | _MIXED_LAYERS | {"logit_scale": 0.5},
    "deepseek_v2": _COMMON | _LATENT,
    "deepseek_v3": _COMMON | _LATENT | {"q_lora_rank": 16},
    "exaone4": _COMMON | _WINDOW | _MIXED_LAYERS,
    "falcon": _COMMON | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "gemma": _COMMON | _HEADS,
    "gemma2": _COMMON | _HEADS | _WINDOW | _MIXED_LAYERS | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "gemma3_text": _COMMON | _HEADS | _WINDOW | _MIXED_LAYERS | {"query_pre_attn_scalar": 8},
    "glm": _COMMON | _HEADS,
    "glm4": _COMMON | _HEADS,
    "gpt2": _GPT,
    "gpt_neox": _COMMON,
    "gpt_oss": _COMMON | _HEADS | _WINDOW | _MIXED_LAYERS | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": _GPT | {"rotary_dim": 4},
    "granite": _COMMON
    | {"embedding_multiplier": 6.0, "residual_multiplier": 0.7, "logits_scaling": 2.0, "attention_multiplier": 0.4},
    "llama": _COMMON,
    "mamba": {"state_size": 8, "num_hidden_layers": NUM_LAYERS, "hidden_size": 32, "vocab_size": VOCABULARY_SIZE},
    "ministral3": _COMMON | _HEADS | _WINDOW,
    "mistral": _COMMON | _WINDOW,
    "mixtral": _COMMON | _WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": _COMMON,
    "olmo3": _COMMON | _WINDOW | _MIXED_LAYERS,
    "phi": _COMMON,
    "phi3": _COMMON | _WINDOW,
    "qwen2": _COMMON | _WINDOW | _MIXED_LAYERS | {"use_sliding_window": True},
    "qwen2_moe": _COMMON
    | _WINDOW
    | _MIXED_LAYERS
    | _MOE
    | {"use_sliding_window": True, "shared_expert_intermediate_size": 24},
    "qwen3": _COMMON | _HEADS | _WINDOW | _MIXED_LAYERS | {"use_sliding_window": True},
    "qwen3_moe": _COMMON | _HEADS | _MOE | _WINDOW | {"use_sliding_window": True},
    "smollm3": _COMMON | _WINDOW | _MIXED_LAYERS | {"use_sliding_window": True, "no_rope_layers": [1, 0, 1, 1]},
    "stablelm": _COMMON,
    "starcoder2": _COMMON | _WINDOW,
}


def make_tiny_model(family: str, folder: Path, **changes: Any) -> Any:
    """Save a seeded random fp32 model into `folder` and give it, ready to be the reference."""
    config = AutoConfig.for_model(family, **(CONFIGS.get(family, _COMMON) | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # weights large enough that position, window and order of the tokens decide the output
            if parameter.dim() > 1:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.2 * noise + (0.0 if name.endswith("bias") else 0.8))
    model.eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return model
