import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molink_common.errors import ModelError
from molink_stage_worker.models.checkpoint import parse_index
from molink_stage_worker.models.selection import KeyMap, map_keys, shards_for

NUM_LAYERS = 6
NAMINGS = {
    "llama": ("model.layers", ["model.embed_tokens.weight"], ["model.norm.weight", "lm_head.weight"]),
    "llama, tied": ("model.layers", ["model.embed_tokens.weight"], ["model.norm.weight"]),
    "gpt2 without first word": ("h", ["wte.weight", "wpe.weight"], ["ln_f.weight", "ln_f.bias"]),
    "gptj": (
        "transformer.h",
        ["transformer.wte.weight"],
        ["transformer.ln_f.weight", "lm_head.weight", "lm_head.bias"],
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        ["gpt_neox.embed_in.weight"],
        ["gpt_neox.final_layer_norm.weight", "embed_out.weight"],
    ),
    "bloom": (
        "transformer.h",
        ["transformer.word_embeddings.weight", "transformer.word_embeddings_layernorm.weight"],
        ["transformer.ln_f.weight"],
    ),
    "mamba": ("backbone.layers", ["backbone.embeddings.weight"], ["backbone.norm_f.weight"]),
    "phi": ("model.layers", ["model.embed_tokens.weight"], ["model.final_layernorm.weight", "lm_head.weight"]),
}


def weight_map_of(naming: str, tensors_a_shard: int = 5) -> dict[str, str]:
    """As a hub index looks: embeddings, layers in order, the rest, cut into files wherever they are full."""
    prefix, before, after = NAMINGS[naming]
    inside = ["self_attn.q_proj.weight", "mlp.experts.0.up_proj.weight", "input_layernorm.weight"]
    keys = before + [f"{prefix}.{layer}.{part}" for layer in range(NUM_LAYERS) for part in inside] + after
    count = -(-len(keys) // tensors_a_shard)
    return {
        key: f"model-{number // tensors_a_shard + 1:05}-of-{count:05}.safetensors" for number, key in enumerate(keys)
    }


def cuts_of(num_layers: int) -> st.SearchStrategy[list[int]]:
    inner = st.sets(st.integers(1, num_layers - 1))
    return inner.map(lambda cuts: [0, *sorted(cuts), num_layers])


@pytest.mark.parametrize("naming", NAMINGS)
@given(cuts=cuts_of(NUM_LAYERS))
def test_every_key_has_a_stage_and_no_layer_has_two(naming: str, cuts: list[int]) -> None:
    weight_map = weight_map_of(naming)
    key_map = map_keys(weight_map, NUM_LAYERS)
    stages = [key_map.keys_for(first, last) for first, last in pairwise(cuts)]
    assert frozenset().union(*stages) == set(weight_map)
    for key in key_map.layer_of:
        assert sum(key in stage for stage in stages) == 1
    prefix, before, after = NAMINGS[naming]
    assert set(before) <= stages[0]
    assert set(after) <= stages[-1]
    assert all(key.startswith(f"{prefix}.") for stage in stages[1:-1] for key in stage)


def test_the_tail_takes_the_embeddings_only_when_there_is_no_output_head() -> None:
    untied = map_keys(weight_map_of("llama"), NUM_LAYERS)
    tied = map_keys(weight_map_of("llama, tied"), NUM_LAYERS)
    assert "model.embed_tokens.weight" not in untied.keys_for(5, 6)
    assert "model.embed_tokens.weight" in tied.keys_for(5, 6)
    gpt2 = map_keys(weight_map_of("gpt2 without first word"), NUM_LAYERS)
    assert "wte.weight" in gpt2.keys_for(5, 6)
    assert "wpe.weight" not in gpt2.keys_for(5, 6)


def test_a_stage_needs_the_files_of_its_layers_only(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map_of("llama")}))
    weight_map = parse_index(json.loads(index.read_text()))
    assert len(set(weight_map.values())) == 5
    key_map = map_keys(weight_map, NUM_LAYERS)
    # three tensors a layer behind one embedding, five a file: layers 2 and 3 are tensors 7 to 12
    middle = shards_for(key_map.keys_for(2, 4), weight_map)
    assert middle == ("model-00002-of-00005.safetensors", "model-00003-of-00005.safetensors")
    assert len(shards_for(key_map.keys_for(0, 6), weight_map)) == 5


def test_an_unclear_key_goes_to_both_ends() -> None:
    key_map = map_keys([*weight_map_of("llama"), "model.something_new"], NUM_LAYERS)
    assert "model.something_new" in key_map.keys_for(0, 3)
    assert "model.something_new" in key_map.keys_for(3, 6)
    assert "model.something_new" not in key_map.keys_for(2, 3)


def test_layers_that_guess_further_tokens_belong_to_nobody() -> None:
    extra = f"model.layers.{NUM_LAYERS}.eh_proj.weight"
    key_map = map_keys([*weight_map_of("llama"), extra], NUM_LAYERS)
    assert extra not in key_map.keys_for(0, NUM_LAYERS)


def test_layers_of_a_part_beside_the_language_model_are_not_taken_for_its_own() -> None:
    beside = [f"vision.encoder.layers.{layer}.w" for layer in range(3)]
    key_map = map_keys([*weight_map_of("llama"), *beside], NUM_LAYERS)
    assert set(key_map.layer_of.values()) == set(range(NUM_LAYERS))
    assert not any(key in key_map.layer_of for key in beside)


def test_a_layer_without_tensors_is_refused() -> None:
    with pytest.raises(ModelError, match="no tensors for layer 6 of 7"):
        map_keys(weight_map_of("llama"), NUM_LAYERS + 1)
    with pytest.raises(ModelError, match="layer 0 of 1"):
        map_keys([], 1)


@pytest.mark.parametrize("stage", [(0, 0), (3, 2), (-1, 2), (0, 7)])
def test_a_range_that_is_no_stage(stage: tuple[int, int]) -> None:
    key_map: KeyMap = map_keys(weight_map_of("llama"), NUM_LAYERS)
    with pytest.raises(ValueError, match="no stage"):
        key_map.keys_for(*stage)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "a/b.safetensors", "/etc/x.safetensors", "x.bin", "", 7, "c:x.safetensors"]
)
def test_an_index_that_points_elsewhere_is_refused(name: object) -> None:
    with pytest.raises(ModelError, match="no safetensors file beside it"):
        parse_index({"weight_map": {"key": name}})


@pytest.mark.parametrize("body", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_an_index_without_a_map_is_refused(body: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="weight_map"):
        parse_index(body)
