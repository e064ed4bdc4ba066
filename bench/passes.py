"""What one pass over a model's layers costs in a decode step, without a network.

    python -m bench.passes            a table
    python -m bench.passes --json     the same, and one JSON object as the last line

All layers in this process, as one stage, with the memory settings of a worker. Contexts are written first in prompt
chunks; then every pass computes one token of each sequence. To compare two versions of the project, run each of them
several times by turns: the machine's own speed moves by more than most changes are worth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
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
    cases = [tuple(map(int, case.split("x"))) for case in arguments.cases.split(",")]
    engine = _load(arguments, max(sequences * _blocks(context, arguments.passes) for sequences, context in cases))
    rows = []
    for sequences, context in cases:
        times_ms = [1e3 * time_s for time_s in _passes_s(engine, sequences, context, arguments.passes)]
        row = {"best_ms": round(min(times_ms), 2), "median_ms": round(statistics.median(times_ms), 2)}
        print(
            f"{sequences:3} x {context:5} tokens: best {row['best_ms']:6} ms, median {row['median_ms']:6} ms",
            flush=True,
        )
        rows.append({"sequences": sequences, "context_tokens": context, **row})
    return {"dtype": arguments.dtype, "threads": arguments.threads, "passes": rows}


def _blocks(context: int, passes: int) -> int:
    return -(-(context + _WARM_PASSES + passes) // _BLOCK_SIZE)


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


def _passes_s(engine: Engine, sequences: int, context: int, passes: int) -> Sequence[float]:
    each = _blocks(context, passes)
    for sequence in range(sequences):
        for start in range(0, context, _CHUNK):
            blocks = tuple(range(sequence * each, (sequence + 1) * each)) if start == 0 else ()
            count = min(_CHUNK, context - start)
            entry = Entry(sequence=sequence, start=start, count=count, opens=start == 0, new_blocks=blocks)
            engine.run([entry], (), token_ids=[100 + place % 1000 for place in range(start, start + count)])
    times_s = []
    for place in range(context, context + _WARM_PASSES + passes):
        entries = [Entry(sequence=number, start=place, count=1, logits=Logits.LAST) for number in range(sequences)]
        started = time.perf_counter()
        engine.run(entries, (), token_ids=[100 + number for number in range(sequences)])
        times_s.append(time.perf_counter() - started)
    engine.run((), range(sequences), token_ids=())
    return times_s[_WARM_PASSES:]


if __name__ == "__main__":
    begin_again_with_memory_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="what `molink up --model` takes")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", default=CASES, help="sequences x tokens of context of each")
    parser.add_argument("--passes", type=int, default=40)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    chosen = parser.parse_args()
    report = main(chosen)
    if chosen.json:
        print(json.dumps(report))
