"""Every family that is served, cut everywhere, gives the whole model's tokens."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from molink_common.wire import Entry, Logits
from molink_stage_worker.engine.families import FAMILIES
from molink_stage_worker.engine.interface import Engine
from molink_stage_worker.engine.loading import load_engine
from tests.architectures.staggered_run import Plan, run_chain, run_staggered, tiny_spec
from tests.architectures.tiny_models import CONFIGS, NUM_LAYERS, VOCABULARY_SIZE, make_tiny_model

CUTS = ((0, 1, 4), (0, 2, 4), (0, 3, 4), (0, 1, 2, 3, 4))
NEW_TOKENS = 9


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY_SIZE, (size,), generator=generator).tolist() for size in (5, 14, 3)]


def staggered(of_prompts: list[list[int]]) -> list[Plan]:
    """The second prompt is prefilled in chunks while the others decode."""
    joins, chunks = (0, 1, 3), (64, 4, 64)
    return [
        Plan(prompt=prompt, new_tokens=NEW_TOKENS, first_step=join, chunk=chunk)
        for prompt, join, chunk in zip(of_prompts, joins, chunks, strict=True)
    ]


@torch.inference_mode()
def whole_model_tokens(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def chain(folder: Path, cut: tuple[int, ...], loaded: dict[tuple[int, int], Engine]) -> list[Engine]:
    for first, last in pairwise(cut):
        if (first, last) not in loaded:
            loaded[first, last] = load_engine(tiny_spec(folder, first, last, NUM_LAYERS))
    return [loaded[layers] for layers in pairwise(cut)]


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied llama": ("llama", {"tie_word_embeddings": True}),
    "untied gemma2": ("gemma2", {"tie_word_embeddings": False}),
    "llama with yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama with dynamic rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "phi3 with longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [2.0, 3.0, 4.0, 5.0],
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "falcon with alibi": ("falcon", {"alibi": True, "new_decoder_architecture": False, "multi_query": True}),
    "qwen2 with one window from the third layer on": (
        "qwen2",
        {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2},
    ),
}


def test_the_matrix_covers_the_table() -> None:
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("name", [*sorted(CONFIGS), *VARIANTS])
def test_every_cut_gives_the_whole_models_tokens(name: str, tmp_path: Path) -> None:
    family, changes = VARIANTS.get(name, (name, {}))
    model = make_tiny_model(family, tmp_path, **changes)
    expected = [whole_model_tokens(model, prompt) for prompt in prompts()]
    assert len({tuple(tokens) for tokens in expected}) > 1
    loaded: dict[tuple[int, int], Engine] = {}
    for cut in CUTS:
        plans = staggered(prompts())
        run_staggered(chain(tmp_path, cut, loaded), plans)
        assert [plan.generated for plan in plans] == expected, f"cut at {cut}"

    engines = chain(tmp_path, (0, 2, 4), loaded)
    prompt = prompts()[1]
    entry = Entry(sequence=9, start=0, count=len(prompt), opens=True, logits=Logits.ALL, new_blocks=(7, 3, 5, 20))
    logits_TV = run_chain(engines, [entry], (), prompt)
    with torch.inference_mode():
        torch.testing.assert_close(logits_TV, model(torch.tensor([prompt])).logits[0], atol=1e-4, rtol=1e-4)
