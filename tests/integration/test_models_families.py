"""For every family that is served: the card's numbers are the real model's, and a stage's files are enough for it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from molink_common.errors import ModelError
from molink_common.wire import Entry, Logits
from molink_stage_worker.engine.families import FAMILIES, Serving
from molink_stage_worker.engine.loading import load_engine
from molink_stage_worker.models import PreparedModel, Progress, prepare
from molink_stage_worker.models.files import LocalFiles
from molink_stage_worker.models.reference import HubModel
from tests.architectures.staggered_run import run_chain, tiny_spec
from tests.architectures.tiny_models import NUM_LAYERS, VOCABULARY_SIZE, make_tiny_model

CUT = (0, 1, 3, 4)
PROMPT = [5, 9, 17, 3, 30]


class Mirror:
    """A far folder: files come one by one, and it is on record which."""

    def __init__(self, far: Path, near: Path) -> None:
        self._far = LocalFiles(far)
        self._near = near
        self.name = "owner/tiny"
        self.asked: list[str] = []

    local_folder = None

    def sizes(self) -> Mapping[str, int]:
        return self._far.sizes()

    def fetch(self, name: str, progress: Progress) -> Path:
        self.asked.append(name)
        progress(f"downloading {name}", 0.5)
        self._near.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(self._far.fetch(name, progress), self._near / name))

    def header(self, shard: str) -> Any:
        return self._far.header(shard)

    def identity(self, shard: str) -> str:
        return self._far.identity(shard)


def sharded(family: str, folder: Path) -> Any:
    """A tiny model in many files, with something that stands for a tokenizer."""
    model = make_tiny_model(family, folder)
    for single in folder.glob("*.safetensors"):
        single.unlink()
    model.save_pretrained(folder, max_shard_size="12KB")
    (folder / "tokenizer.json").write_text("{}")
    assert len(list(folder.glob("*.safetensors"))) > NUM_LAYERS
    return model


def prepared_far(folder: Path, tmp_path: Path) -> tuple[PreparedModel, Mirror]:
    mirror = Mirror(folder, tmp_path / "near")
    return prepare("owner/tiny", cache=tmp_path / "cache", connect=lambda _model, _downloads: mirror), mirror


def scalars_of(*modules: torch.nn.Module) -> int:
    return sum(tensor.numel() for module in modules for tensor in module.state_dict().values())


def kv_seen_by_attention(model: Any, family: str) -> list[int]:
    """Scalars of keys and values a token, as the attention function or the cache gets them."""
    seen: list[int] = []

    def recording(module: Any, query: Any, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any) -> Any:
        seen.append(key.shape[1] * key.shape[3] + value.shape[1] * value.shape[3])
        return sdpa_attention_forward(module, query, key, value, *rest, **{**more, "softcap": None})

    ids = torch.tensor([PROMPT])
    if FAMILIES[family].serving is Serving.PACKED:
        AttentionInterface.register("recording", recording)
        model.set_attn_implementation("recording")
        model(ids, use_cache=False)
        return seen
    layers = model(ids, use_cache=True).past_key_values.layers
    return [(layer.keys.numel() + layer.values.numel()) // len(PROMPT) for layer in layers]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.inference_mode()
def test_a_card_has_the_models_numbers(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    model = sharded(family, folder)
    card = prepare(str(folder), cache=tmp_path / "cache").card
    shape = FAMILIES[family]
    base = model.base_model
    at_head = [getattr(base, name) for name, _ in shape.only_at_head]
    in_head = [module for module in at_head if isinstance(module, torch.nn.Module)]
    assert card.family == family
    assert card.packed == (shape.serving is Serving.PACKED)
    assert card.layer_parameters == tuple(scalars_of(layer) for layer in getattr(base, shape.layers))
    assert card.embedding_parameters == scalars_of(getattr(base, shape.embedding), *in_head)
    assert card.output_parameters == scalars_of(getattr(base, shape.norm), model.get_output_embeddings())
    assert (card.num_layers, card.hidden_size, card.vocabulary_size) == (NUM_LAYERS, 32, VOCABULARY_SIZE)
    assert card.checkpoint_dtype == "float32"
    if family == "mamba":
        inner, state, convolution = 64, 8, 4
        assert card.kv_scalars_per_token == (inner * (state + convolution) // 128,) * NUM_LAYERS
    else:
        assert list(card.kv_scalars_per_token) == kv_seen_by_attention(model, family)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.inference_mode()
def test_a_stages_files_are_enough_for_it(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    model = sharded(family, folder)
    prepared, mirror = prepared_far(folder, tmp_path)
    assert not any(name.endswith(".safetensors") for name in mirror.asked)
    every = {path.name for path in folder.glob("*.safetensors")}
    asked: dict[tuple[int, int], set[str]] = {}
    engines = []
    for first, last in pairwise(CUT):
        mirror.asked.clear()
        place = prepared.checkpoint_for(first, last)
        asked[first, last] = set(mirror.asked)
        assert {path.name for path in place.glob("*.safetensors")} == asked[first, last] < every
        engines.append(load_engine(tiny_spec(place, first, last, NUM_LAYERS)))
    assert every == set().union(*asked.values())
    entry = Entry(sequence=7, start=0, count=len(PROMPT), opens=True, new_blocks=(0, 1), logits=Logits.ALL)
    logits_RV = run_chain(engines, [entry], [], PROMPT)
    whole_RV = model(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(logits_RV, whole_RV, rtol=1e-4, atol=1e-4)


def test_transformers_opens_a_stages_folder(tmp_path: Path) -> None:
    model = sharded("llama", tmp_path / "tiny")
    prepared, _ = prepared_far(tmp_path / "tiny", tmp_path)
    place = prepared.checkpoint_for(1, 3)
    opened = AutoModelForCausalLM.from_pretrained(place, local_files_only=True)
    for layer in (1, 2):
        for name, parameter in model.model.layers[layer].named_parameters():
            assert torch.equal(parameter, opened.model.layers[layer].get_parameter(name))


def test_a_model_is_the_same_near_and_far(tmp_path: Path) -> None:
    sharded("llama", tmp_path / "tiny")
    shutil.copytree(tmp_path / "tiny", tmp_path / "other place")
    near = prepare(str(tmp_path / "tiny"), cache=tmp_path / "cache")
    moved = prepare(str(tmp_path / "other place"), cache=tmp_path / "cache")
    far, _ = prepared_far(tmp_path / "tiny", tmp_path)
    assert near.card.fingerprint == moved.card.fingerprint == far.card.fingerprint
    assert near.checkpoint_for(0, 2) == near.folder == (tmp_path / "tiny").resolve()
    shard = sorted((tmp_path / "other place").glob("*.safetensors"))[3]
    with shard.open("rb+") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    changed = prepare(str(tmp_path / "other place"), cache=tmp_path / "cache")
    assert changed.card.fingerprint != near.card.fingerprint


def test_progress_of_a_stages_download_only_grows(tmp_path: Path) -> None:
    sharded("llama", tmp_path / "tiny")
    prepared, _ = prepared_far(tmp_path / "tiny", tmp_path)
    shares: list[float] = []
    prepared.checkpoint_for(0, 2, lambda _doing, share: shares.append(share or 0.0))
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] <= 1


def test_only_offered_files_are_handed_out(tmp_path: Path) -> None:
    sharded("llama", tmp_path / "tiny")
    prepared = prepare(str(tmp_path / "tiny"), cache=tmp_path / "cache")
    offers = {offer.name: offer for offer in prepared.card.tokenizer_files}
    assert set(offers) == {"config.json", "generation_config.json", "tokenizer.json"}
    config = (tmp_path / "tiny" / "config.json").read_bytes()
    assert prepared.read_file("config.json", 0, 1 << 19) == config
    assert prepared.read_file("config.json", 10, 5) == config[10:15]
    assert prepared.read_file("config.json", len(config), 5) == b""
    for name in ("../tiny/config.json", "/etc/passwd", "model.safetensors.index.json", "", "tokenizer.model"):
        with pytest.raises(ModelError, match="not among the files"):
            prepared.read_file(name, 0, 10)


def damage(folder: Path, what: str) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    match what:
        case "shard missing":
            shards[2].unlink()
        case "shard cut short":
            shards[2].write_bytes(shards[2].read_bytes()[:-8])
        case "no config":
            (folder / "config.json").unlink()
        case "config broken":
            (folder / "config.json").write_text("{")
        case "config of something else":
            (folder / "config.json").write_text("{}")
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
        case "no weights":
            for path in [*shards, folder / "model.safetensors.index.json"]:
                path.unlink()
        case "pickled":
            damage(folder, "no weights")
            (folder / "pytorch_model.bin").touch()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("shard missing", "not whole: model-00003"),
        ("shard cut short", "cut short"),
        ("no config", r"no config\.json"),
        ("config broken", "JSON"),
        ("config of something else", "model_type"),
        ("no tokenizer", "no tokenizer"),
        ("no weights", "no weights"),
        ("pickled", "pickled weights only"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(what: str, said: str, tmp_path: Path) -> None:
    sharded("llama", tmp_path / "tiny")
    damage(tmp_path / "tiny", what)
    with pytest.raises(ModelError, match=said):
        prepare(str(tmp_path / "tiny"), cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"model_type": "opt"}', "'opt' are not served"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', r"quantized \(gptq\)"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(config: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=said):
        prepare(str(tmp_path), cache=tmp_path / "cache")


def test_the_hub_is_asked_for_what_was_named(tmp_path: Path) -> None:
    asked: list[tuple[HubModel, Path]] = []

    def connect(model: HubModel, downloads: Path) -> Mirror:
        asked.append((model, downloads))
        raise ModelError("enough")

    with pytest.raises(ModelError, match="enough"):
        prepare("owner/name@v2", cache=tmp_path, connect=connect)
    assert asked == [(HubModel("owner/name", "v2"), tmp_path / "hub")]
