"""Plain transformers on this machine: one process, one static batch, greedy, its own cache.

Prints one JSON object. ``python -m bench.transformers_baseline --checkpoint FOLDER --batch 8 --threads 2``
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.load import chat_prompts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=getattr(torch, arguments.dtype))
    model = model.to(arguments.device)
    prompts = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for messages in chat_prompts(arguments.batch)
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(arguments.device)
    seconds = [_generate_s(model, batch, arguments.new_tokens) for _ in range(arguments.runs + 1)][1:]
    seconds.sort()
    tokens = arguments.batch * arguments.new_tokens
    print(
        json.dumps(
            {
                "batch": arguments.batch,
                "threads": arguments.threads,
                "tokens_per_s": tokens / seconds[len(seconds) // 2],
                "prompt_tokens": int(batch["attention_mask"].sum()) / arguments.batch,
            }
        )
    )


@torch.inference_mode()
def _generate_s(model: torch.nn.Module, batch: dict[str, torch.Tensor], new_tokens: int) -> float:
    """Seconds for prefill and `new_tokens` greedy steps, end-of-text ignored."""
    mask = batch["attention_mask"]
    started = time.perf_counter()
    ids, cache = batch["input_ids"], None
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(new_tokens):
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache = out.past_key_values
        ids = out.logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=-1)
        positions = positions[:, -1:] + 1
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
