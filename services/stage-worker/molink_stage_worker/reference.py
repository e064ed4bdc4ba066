"""The whole model on one machine, by plain transformers: what a pipeline's answers are compared with.

``python -m molink_stage_worker.reference --model REFERENCE --dtype float32`` reads one JSON object from
standard input, ``{"cases": [{"prompt": [ids…], "answers": [[ids…], …]}, …]}``, and prints one JSON line a
case: the whole model's greedy tokens, and for every answer the first index that differs (or null) and by how
much the whole model preferred its own token there (a difference of logits).

It shares no code with the engine, so that a mistake there cannot hide here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from molink_common.errors import ModelError
from molink_stage_worker.models import prepare


@torch.inference_mode()
def greedy(model: Any, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], list[torch.Tensor]]:
    """`num_tokens` greedy tokens after the prompt, end-of-text ignored, and the logits of each (V)."""
    ids = torch.tensor([list(prompt)], device=model.device)
    tokens: list[int] = []
    logits: list[torch.Tensor] = []
    cache = None
    for _ in range(num_tokens):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        logits.append(out.logits[0, -1].float())
        tokens.append(int(logits[-1].argmax()))
        ids = torch.tensor([[tokens[-1]]], device=model.device)
    return tokens, logits


def compare(answer: Sequence[int], tokens: Sequence[int], logits: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Where an answer leaves the whole model's, and how close the decision was."""
    for index, (ours, theirs) in enumerate(zip(answer, tokens, strict=True)):
        if ours != theirs:
            margin = float(logits[index][theirs] - logits[index][ours])
            return {"first_differing": index, "token": ours, "whole_model_token": theirs, "margin": margin}
    return {"first_differing": None}


def main(arguments: Sequence[str]) -> int:
    """See the module's description; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m molink_stage_worker.reference")
    parser.add_argument("--model", required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--dtype", required=True, choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args(arguments)
    try:
        prepared = prepare(chosen.model, cache=chosen.cache, progress=lambda *_: None)
    except ModelError as error:
        print(f"the whole model cannot be loaded: {error}", file=sys.stderr)
        return 1
    dtype = getattr(torch, chosen.dtype)
    folder = prepared.checkpoint_for(0, prepared.card.num_layers, lambda *_: None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).to(chosen.device)
    for case in json.load(sys.stdin)["cases"]:
        tokens, logits = greedy(model, case["prompt"], len(case["answers"][0]))
        compared = [compare(answer, tokens, logits) for answer in case["answers"]]
        print(json.dumps({"tokens": tokens, "answers": compared}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
