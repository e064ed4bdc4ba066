"""Who is served, who is refused, and up to which length."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, OPTConfig

from molink_common.errors import ModelError
from molink_common.messages import Dtype
from molink_stage_worker.engine.families import FAMILIES, Serving, family_of, serving_of, strict_context_length
from molink_stage_worker.engine.interface import StageSpec
from molink_stage_worker.engine.loading import load_engine


def spec(folder: Path, num_layers: int = 2) -> StageSpec:
    return StageSpec(
        checkpoint=folder,
        first_layer=0,
        last_layer=1,
        num_layers=num_layers,
        dtype=Dtype.FLOAT32,
        device="cpu",
        num_blocks=4,
        block_size=4,
    )


def test_33_families_of_which_five_run_per_sequence() -> None:
    assert len(FAMILIES) == 33
    alone = {name for name, family in FAMILIES.items() if family.serving is Serving.PER_SEQUENCE}
    assert alone == {"bloom", "falcon", "gptj", "mamba", "stablelm"}
    assert serving_of(SimpleNamespace(model_type="llama")) is Serving.PACKED


def test_a_refused_family_is_named_with_reason_and_alternatives(tmp_path: Path) -> None:
    OPTConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"'opt' are not served: its learned positions.*Served are: bloom, cohere"):
        load_engine(spec(tmp_path))


def test_an_untried_family_is_refused() -> None:
    with pytest.raises(ModelError, match="'t5' are not served: it has not been shown"):
        family_of(SimpleNamespace(model_type="t5"))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model that can be read"):
        load_engine(spec(tmp_path))


def test_a_model_that_brings_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}')
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="no model that can be read"):
        load_engine(spec(tmp_path))


def test_another_number_of_layers_is_refused(tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=3).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has 3 layers, not 2"):
        load_engine(spec(tmp_path))


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=2, quantization_config={"quant_method": "gptq", "bits": 4}).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is quantized"):
        load_engine(spec(tmp_path))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_engine(spec(tmp_path))


@pytest.mark.parametrize(
    ("family", "rope", "expected"),
    [
        ("llama", {"rope_type": "default"}, None),
        ("llama", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 25}, None),
        ("llama", {"rope_type": "dynamic", "factor": 4.0}, 100),
        ("phi3", {"rope_type": "longrope", "original_max_position_embeddings": 25}, 25),
        ("gemma3_text", {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {}}, 100),
        ("gpt2", None, 100),
    ],
)
def test_where_frequencies_would_change_or_positions_end_the_context_ends(
    family: str, rope: dict[str, object] | None, expected: int | None
) -> None:
    config = SimpleNamespace(model_type=family, rope_parameters=rope, max_position_embeddings=100)
    assert strict_context_length(config) == expected
