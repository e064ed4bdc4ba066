"""The pure parts of the comparison with llama.cpp: what is built, and how it is started."""

import re
from pathlib import Path

import pytest

from bench.peers.llama_cpp_build import cmake_options, processor_options
from bench.peers.llama_cpp_server import Slots, server_flags

FIVE_AVX512 = "avx512f avx512cd avx512vl avx512dq avx512bw"


def flag(flags: list[str], name: str) -> str:
    return flags[flags.index(name) + 1]


def test_instruction_sets_follow_the_processor() -> None:
    options = processor_options(
        f"processor : 0\nflags\t\t: fpu sse4_2 avx avx2 {FIVE_AVX512} avx512_bf16\nbugs : none\n"
    )
    assert options["GGML_AVX2"] == options["GGML_AVX512"] == options["GGML_AVX512_BF16"] == "ON"
    assert options["GGML_FMA"] == options["GGML_AMX_BF16"] == options["GGML_AVX512_VNNI"] == "OFF"


@pytest.mark.parametrize("missing", FIVE_AVX512.split())
def test_avx512_is_built_only_where_all_of_it_is_there(missing: str) -> None:
    options = processor_options(f"flags : {FIVE_AVX512.replace(missing, '')}")
    assert options["GGML_AVX512"] == "OFF"


def test_a_processor_without_x86_flags_is_left_to_the_compiler() -> None:
    options = cmake_options("processor : 0\nFeatures : fp asimd\n")
    assert options["GGML_NATIVE"] == "ON"
    assert options["GGML_RPC"] == "ON"


def test_the_far_host_gets_the_last_half_without_the_head() -> None:
    flags = server_flags(Path("m.gguf"), 8000, "10.77.0.2:1", Slots())
    assert flag(flags, "--rpc") == "10.77.0.2:1"
    # 15 of 30 layers; the head counts as one more, and is then called back
    assert flag(flags, "--gpu-layers") == "16"
    pattern, _, place = flag(flags, "--override-tensor").partition("=")
    assert place == "CPU"
    tensors = ["token_embd.weight", "output_norm.weight", "output.weight", "blk.15.attn_output.weight"]
    assert [name for name in tensors if re.search(pattern, name)] == tensors[:3]


def test_one_pool_holds_every_stream_and_one_long_prompt() -> None:
    slots = Slots(streams=64, stream_tokens=160, unified=True)
    flags = server_flags(Path("m.gguf"), 8000, "far:1", slots)
    assert int(flag(flags, "--ctx-size")) >= 64 * 160 + 1500 + 4
    assert flag(flags, "--parallel") == "65"
    assert "--kv-unified" in flags
    assert "--batch-size" not in flags


def test_slots_apart_have_room_for_the_long_prompt_each() -> None:
    flags = server_flags(Path("m.gguf"), 8000, "far:1", Slots(streams=8, batch_tokens=512))
    each = int(flag(flags, "--ctx-size")) / int(flag(flags, "--parallel"))
    assert each >= 1600
    assert each % 256 == 0
    assert "--no-kv-unified" in flags
    assert flag(flags, "--batch-size") == "512"
