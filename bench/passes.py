"""What one pass over a model's layers costs in a decode step or for a prompt's chunk, without a network.

    python -m bench.passes            a table
    python -m bench.passes --json     the same, and one JSON object as the last line

All layers in this process, as one stage, with the memory settings of a worker. Contexts are written first in prompt
chunks; then every pass computes one token of each sequence, or with ``1x1000+32`` 32 tokens of a prompt after the
first 1,000, again and again. To compare two versions of the project, run each of them
several times by turns: the machine's own speed moves by more than most changes are worth.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from molink_common.folders import cache_folder
from molink_common.memory import begin_again_with_memory_environment
from molink_common.messages import Dtype
from molink_common.wire import Entry, Logits
from molink_stage_worker.engine.interface import Engine, StageSpec
from molink_stage_worker.engine.loading import load_engine
from molink_stage_worker.models import prepare

CASES = "1x90,4x90,8x90,21x90,8x1000,1x4000"
_BLOCK_SIZE = 16
_CHUNK = 512
_WARM_PASSES = 5


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    cases: list[Case] = arguments.cases
    engine = _load(arguments, max(case.sequences * case.blocks(arguments.passes) for case in cases))
    rows = []
    for case in cases:
        times_ms = [1e3 * time_s for time_s in _passes_s(engine, case, arguments.passes)]
        row = {"best_ms": round(min(times_ms), 2), "median_ms": round(statistics.median(times_ms), 2)}
        print(f"{case!s:>12} tokens: best {row['best_ms']:6} ms, median {row['median_ms']:6} ms", flush=True)
        rows.append({**asdict(case), **row})
    return {"dtype": arguments.dtype, "threads": arguments.threads, "passes": rows}


@dataclass(frozen=True, slots=True)
class Case:
    """What a pass computes."""

    sequences: int
    context_tokens: int
    """Of each, before the first pass."""
    chunk_tokens: int | None
    """Of each sequence in every pass. None: one, and the next one in the next pass."""

    def blocks(self, passes: int) -> int:
        """KV blocks of a sequence."""
        more = self.chunk_tokens if self.chunk_tokens is not None else _WARM_PASSES + passes
        return -(-(self.context_tokens + more) // _BLOCK_SIZE)

    def __str__(self) -> str:
        chunk = "" if self.chunk_tokens is None else f"+{self.chunk_tokens}"
        return f"{self.sequences}x{self.context_tokens}{chunk}"


def _cases(text: str) -> list[Case]:
    """Of the flag; wrong ones raise what argparse shows."""
    found = []
    for one in text.split(","):
        sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:\+([1-9]\d*))?", one)
        if sizes is None:
            raise argparse.ArgumentTypeError(f"{one!r} is no case; it is like 8x90 or 1x1000+32")
        sequences, context, chunk = sizes.groups()
        found.append(Case(int(sequences), int(context), int(chunk) if chunk else None))
    return found


def _load(arguments: argparse.Namespace, num_blocks: int) -> Engine:
    prepared = prepare(arguments.model, cache=cache_folder(), progress=lambda *_: None)
    num_layers = prepared.card.num_layers
    return load_engine(
        StageSpec(
            checkpoint=prepared.checkpoint_for(0, num_layers), first_layer=0, last_layer=num_layers,
            num_layers=num_layers, dtype=Dtype(arguments.dtype), device="cpu", num_blocks=num_blocks,
            block_size=_BLOCK_SIZE,
        )
    )  # fmt: skip


def _passes_s(engine: Engine, case: Case, passes: int) -> Sequence[float]:
    each, context = case.blocks(passes), case.context_tokens
    for sequence in range(case.sequences):
        for start in range(0, context, _CHUNK):
            blocks = tuple(range(sequence * each, (sequence + 1) * each)) if start == 0 else ()
            count = min(_CHUNK, context - start)
            entry = Entry(sequence=sequence, start=start, count=count, opens=start == 0, new_blocks=blocks)
            engine.run([entry], (), token_ids=[100 + place % 1000 for place in range(start, start + count)])
    times_s = []
    for number in range(_WARM_PASSES + passes):
        start = context if case.chunk_tokens is not None else context + number
        count = case.chunk_tokens or 1
        entries = [Entry(sequence=one, start=start, count=count, logits=Logits.LAST) for one in range(case.sequences)]
        started = time.perf_counter()
        engine.run(entries, (), token_ids=[100 + one % 1000 for one in range(case.sequences * count)])
        times_s.append(time.perf_counter() - started)
    engine.run((), range(case.sequences), token_ids=())
    return times_s[_WARM_PASSES:]


if __name__ == "__main__":
    begin_again_with_memory_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="what `molink up --model` takes")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--cases", type=_cases, default=CASES, help="sequences x tokens of context of each, + tokens of a chunk"
    )
    parser.add_argument("--passes", type=int, default=40)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    chosen = parser.parse_args()
    report = main(chosen)
    if chosen.json:
        print(json.dumps(report))
