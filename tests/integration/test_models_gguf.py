"""GGUF files and the demo model: converted once, by one process, and the same model afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from molink_common.errors import ModelError
from molink_common.folders import cache_folder
from molink_stage_worker.models import demo, prepare
from molink_stage_worker.models.cache import MANIFEST

HIDDEN, LAYERS, HEADS = 32, 2, 4


def write_tiny_gguf(path: Path) -> None:
    """A random llama with a byte-level tokenizer of 256 bytes and one merge."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokens = ["<|end|>", *(chr(256 + number) for number in range(255)), "ĠĠ"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    random = np.random.default_rng(1)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))

    add("token_embd.weight", len(tokens), HIDDEN)
    add("output_norm.weight", HIDDEN)
    add("output.weight", len(tokens), HIDDEN)
    for layer in range(LAYERS):
        for name, rows in (
            ("attn_q", HIDDEN),
            ("attn_k", HIDDEN // 2),
            ("attn_v", HIDDEN // 2),
            ("attn_output", HIDDEN),
        ):
            add(f"blk.{layer}.{name}.weight", rows, HIDDEN)
        for name in ("ffn_gate", "ffn_up", "ffn_down"):
            add(f"blk.{layer}.{name}.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf"
    write_tiny_gguf(path)
    return path


def lines_of(output: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in output.splitlines()]


def start(reference: str, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "molink_stage_worker.models", reference, "--cache", str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_convert_once_and_give_the_same_card(tiny_gguf: Path, tmp_path: Path) -> None:
    processes = [start(str(tiny_gguf), tmp_path / "cache") for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (lines_of(out) for out, _ in outputs)
    assert first[-1] == second[-1]
    assert set(first[-1]) == {"card", "folder"}
    # the other may have come too late even to wait
    assert sum({"doing": "converting", "share": 1.0} in lines for lines in (first, second)) == 1
    converted = list((tmp_path / "cache" / "converted").iterdir())
    assert {path.suffix for path in converted} == {"", ".lock"}


def test_a_converted_model_computes_what_the_file_says(tiny_gguf: Path, tmp_path: Path) -> None:
    prepared = prepare(str(tiny_gguf), cache=tmp_path / "cache")
    card = prepared.card
    assert (card.name, card.family, card.num_layers, card.checkpoint_dtype) == ("tiny.F32", "llama", LAYERS, "bfloat16")
    assert (card.context_length, card.eos_token_ids, card.kv_scalars_per_token) == (64, (0,), (32, 32))
    assert "chat_template.jinja" in {offer.name for offer in card.tokenizer_files}
    whole = AutoModelForCausalLM.from_pretrained(
        tiny_gguf.parent, gguf_file=tiny_gguf.name, dtype=torch.float32, local_files_only=True
    )
    ours = AutoModelForCausalLM.from_pretrained(prepared.checkpoint_for(0, 2), local_files_only=True)
    for (name, tensor), (other_name, other) in zip(whole.named_parameters(), ours.named_parameters(), strict=True):
        assert name == other_name
        assert torch.equal(tensor.to(torch.bfloat16), other)
    tokenizer = AutoTokenizer.from_pretrained(prepared.folder, local_files_only=True)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_a_damaged_conversion_is_made_again(tiny_gguf: Path, tmp_path: Path) -> None:
    prepared = prepare(str(tiny_gguf), cache=tmp_path)
    weights = prepared.folder / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[: len(good) // 2])
    again = prepare(str(tiny_gguf), cache=tmp_path)
    assert again.card == prepared.card
    assert weights.read_bytes() == good


def test_the_same_file_elsewhere_is_the_same_model(tiny_gguf: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "tiny.F32.gguf"
    elsewhere.write_bytes(tiny_gguf.read_bytes())
    one = prepare(str(tiny_gguf), cache=tmp_path / "cache")
    other = prepare(str(elsewhere), cache=tmp_path / "cache")
    assert one.card == other.card
    assert one.folder == other.folder


@pytest.mark.parametrize("contents", [b"", b"GGUF", b"no gguf at all" * 100])
def test_a_file_that_is_no_gguf(contents: bytes, tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(contents)
    with pytest.raises(ModelError, match=r"broken\.gguf"):
        prepare(str(file), cache=tmp_path / "cache")
    assert not [path for path in tmp_path.glob("cache/converted/*") if path.suffix != ".lock"]


def test_one_part_of_several_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "big-00002-of-00003.gguf"
    file.touch()
    with pytest.raises(ModelError, match="one part of several"):
        prepare(str(file), cache=tmp_path)


def test_a_stop_from_outside_leaves_no_working_folder(tiny_gguf: Path, tmp_path: Path) -> None:
    process = start(str(tiny_gguf), tmp_path / "cache")
    assert process.stdout is not None
    for line in process.stdout:
        if '"converting"' in line:
            process.terminate()
            break
    process.communicate(timeout=60)
    assert process.returncode not in (0, 1)
    assert not list((tmp_path / "cache" / "converted").glob("*.work-*"))


def test_the_program_says_what_is_wrong_in_one_sentence(tmp_path: Path) -> None:
    process = start("./absent", tmp_path)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert lines_of(out) == [{"error": "there is no file or folder ./absent on this machine"}]


def test_the_demo_model() -> None:
    """In the user's own cache: the first run downloads and converts it, for this test and for all that serve it."""
    prepared = prepare("demo", cache=cache_folder())
    card = prepared.card
    assert (card.name, card.aliases) == (demo.NAME, ("demo",))
    assert (card.family, card.packed, card.num_layers) == ("llama", True, 30)
    assert (card.hidden_size, card.vocabulary_size, card.context_length) == (576, 49152, 8192)
    assert card.kv_scalars_per_token == (2 * 3 * 64,) * 30
    assert card.layer_parameters == (3_540_096,) * 30
    assert (card.embedding_parameters, card.output_parameters) == (49152 * 576, 49152 * 576 + 576)
    assert (prepared.folder / MANIFEST).is_file()
    tokenizer = AutoTokenizer.from_pretrained(prepared.folder, local_files_only=True)
    assert card.eos_token_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    assert "<|im_start|>assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )


def test_a_card_needs_no_torch() -> None:
    """The engine's package is left out: only its table of families is asked, and that is plain data."""
    program = """
import sys, types, pathlib
import molink_stage_worker
engine = types.ModuleType("molink_stage_worker.engine")
engine.__path__ = [str(pathlib.Path(molink_stage_worker.__file__).parent / "engine")]
sys.modules["molink_stage_worker.engine"] = engine
from molink_common.folders import cache_folder
from molink_stage_worker.models import prepare
prepare("demo", cache=cache_folder())
print(sorted({"torch", "transformers", "huggingface_hub"} & set(sys.modules)))
"""
    prepare("demo", cache=cache_folder())
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
