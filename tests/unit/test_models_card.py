from collections.abc import Mapping
from typing import Any, NoReturn

import pytest

from molink_common.errors import ModelError
from molink_stage_worker.models.card import build_card, fingerprint_of
from molink_stage_worker.models.checkpoint import Checkpoint
from molink_stage_worker.models.config import ModelConfig, eos_token_ids
from molink_stage_worker.models.key_values import kv_scalars_per_token
from molink_stage_worker.models.safetensors_header import TensorInfo
from molink_stage_worker.models.selection import map_keys

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
}


def nobody() -> NoReturn:
    raise AssertionError("the family's defaults were asked for")


def config_of(**changes: Any) -> ModelConfig:
    return ModelConfig({**LLAMA, **changes}, nobody)


def tensor(*shape: int, dtype: str = "BF16", start: int = 0) -> TensorInfo:
    return TensorInfo(dtype=dtype, shape=shape, start=start, end=start + 2)


def checkpoint_of(tensors: Mapping[str, TensorInfo]) -> Checkpoint:
    return Checkpoint(dict.fromkeys(tensors, "model.safetensors"), {"model.safetensors": tensors})


def llama_tensors(*, tied: bool) -> dict[str, TensorInfo]:
    tensors = {"model.embed_tokens.weight": tensor(100, 8), "model.norm.weight": tensor(8)}
    for layer in range(2):
        tensors |= {
            f"model.layers.{layer}.self_attn.q_proj.weight": tensor(8, 8),
            f"model.layers.{layer}.self_attn.k_proj.weight": tensor(4, 8),
            f"model.layers.{layer}.self_attn.v_proj.weight": tensor(4, 8),
            f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": tensor(1),
        }
    return tensors if tied else {**tensors, "lm_head.weight": tensor(100, 8)}


@pytest.mark.parametrize("tied", [True, False])
def test_the_counts_of_a_card(tied: bool) -> None:
    checkpoint = checkpoint_of(llama_tensors(tied=tied))
    card = build_card(
        name="m",
        aliases=("a",),
        fingerprint="f",
        packed=True,
        config=config_of(),
        checkpoint=checkpoint,
        keys=map_keys(checkpoint.weight_map, 2),
        generation={"eos_token_id": [2, 5, 100]},
        tokenizer_limit=None,
        offers=(),
    )
    assert card.layer_parameters == (128, 128)
    assert card.embedding_parameters == 800
    assert card.output_parameters == 808
    assert card.kv_scalars_per_token == (8, 8)
    assert card.eos_token_ids == (2, 5)
    assert card.checkpoint_dtype == "bfloat16"
    assert (card.hidden_size, card.vocabulary_size, card.context_length) == (8, 100, 2048)


def test_packed_weights_are_refused() -> None:
    checkpoint = checkpoint_of({key: tensor(1, dtype="I32") for key in llama_tensors(tied=True)})
    with pytest.raises(ModelError, match="packed as I32"):
        build_card(
            name="m",
            aliases=(),
            fingerprint="f",
            packed=True,
            config=config_of(),
            checkpoint=checkpoint,
            keys=map_keys(checkpoint.weight_map, 2),
            generation={},
            tokenizer_limit=None,
            offers=(),
        )


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 2048),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 4096),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, 2048),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1]}, "original_max_position_embeddings": 512}, 512),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 512}}, 512),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}}, 8192),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}}, 2048),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256}}, 2048),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 2048),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}}, 16384),
        ({"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 2048),
        ({"max_position_embeddings": None, "n_positions": 1024}, 1024),
        ({"max_position_embeddings": None, "seq_length": 512}, 512),
    ],
)
def test_context_length(changes: dict[str, Any], length: int) -> None:
    assert config_of(**changes).context_length(None) == length


@pytest.mark.parametrize(("limit", "length"), [(1000, 1000), (int(1e30), 8192), (None, 8192), (-1, 8192)])
def test_context_length_of_a_model_without_positions(limit: object, length: int) -> None:
    assert config_of(max_position_embeddings=None).context_length(limit) == length


def test_the_generation_config_decides_what_ends_an_answer() -> None:
    config = config_of(eos_token_id=[7, 2])
    assert eos_token_ids(config, {"eos_token_id": [9, 8, 9]}) == (8, 9)
    assert eos_token_ids(config, {"eos_token_id": 9}) == (9,)
    assert eos_token_ids(config, {"eos_token_id": None}) == (2, 7)
    assert eos_token_ids(config_of(eos_token_id=None), {}) == ()


def test_keys_and_values_by_projections() -> None:
    grouped = {"l.k_proj.weight": tensor(4, 8), "l.v_proj.weight": tensor(6, 8)}
    assert kv_scalars_per_token(config_of(), grouped) == 10
    fused = {"l.qkv_proj.weight": tensor(8 + 4 + 4, 8), "l.o_proj.weight": tensor(8, 8)}
    assert kv_scalars_per_token(config_of(), fused) == 8
    transposed = {"h.attn.c_attn.weight": tensor(8, 24), "h.attn.c_proj.weight": tensor(8, 8)}
    assert kv_scalars_per_token(config_of(), transposed) == 16


def test_keys_and_values_of_other_layers() -> None:
    latent = config_of(kv_lora_rank=2, qk_nope_head_dim=6, qk_rope_head_dim=2, v_head_dim=5)
    assert kv_scalars_per_token(latent, {}) == 4 * (6 + 2 + 5)
    repeated = config_of(model_type="falcon", new_decoder_architecture=True)
    assert kv_scalars_per_token(repeated, {}) == 16
    state = config_of(model_type="mamba", intermediate_size=64, state_size=16, conv_kernel=4)
    assert kv_scalars_per_token(state, {"l.mixer.A_log": tensor(64, 16)}) == 10
    assert kv_scalars_per_token(config_of(head_dim=3), {}) == 2 * 2 * 3


def test_a_config_asks_for_its_familys_defaults_only_when_it_must() -> None:
    config = ModelConfig({"model_type": "gpt2", "n_layer": 12}, lambda: {"n_layer": 1, "n_embd": 768})
    assert config.number("layers") == 12
    assert config.number("hidden size") == 768
    with pytest.raises(ModelError, match="vocab_size"):
        config.number("vocabulary size")
    with pytest.raises(ModelError, match="model_type"):
        ModelConfig({}, nobody)


def test_a_fingerprint_sees_what_changes_the_model_and_nothing_else() -> None:
    tensors = llama_tensors(tied=True)
    plain = fingerprint_of(config_of(), checkpoint_of(tensors), {"model.safetensors": "a"})
    backwards = dict(reversed(list(tensors.items())))
    renamed = config_of(_name_or_path="/home/x", transformers_version="9")
    assert fingerprint_of(renamed, checkpoint_of(backwards), {"model.safetensors": "a"}) == plain
    others = {
        fingerprint_of(config_of(), checkpoint_of(tensors), {"model.safetensors": "b"}),
        fingerprint_of(config_of(rope_theta=5), checkpoint_of(tensors), {"model.safetensors": "a"}),
        fingerprint_of(config_of(), checkpoint_of({**tensors, "x": tensor(1)}), {"model.safetensors": "a"}),
        fingerprint_of(
            config_of(), checkpoint_of({**tensors, "model.norm.weight": tensor(9)}), {"model.safetensors": "a"}
        ),
    }
    assert len({plain, *others}) == 5
