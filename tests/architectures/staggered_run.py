"""Sequences through a chain of engines the way a head runs them: staggered, ragged, chunked, in shared steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from molink_common.messages import Dtype
from molink_common.wire import Entry, Logits
from molink_stage_worker.engine.interface import Engine, StageSpec

BLOCK_SIZE = 4
NUM_BLOCKS = 64


def tiny_spec(checkpoint: Path, first_layer: int, last_layer: int, num_layers: int) -> StageSpec:
    return StageSpec(
        checkpoint=checkpoint,
        first_layer=first_layer,
        last_layer=last_layer,
        num_layers=num_layers,
        dtype=Dtype.FLOAT32,
        device="cpu",
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
    )


@dataclass(slots=True)
class Plan:
    """What one sequence wants."""

    prompt: list[int]
    new_tokens: int
    first_step: int
    """The step in which it joins."""
    chunk: int
    """Most prompt tokens a step."""
    generated: list[int] = field(default_factory=list)
    placed: int = 0
    blocks: int = 0

    @property
    def is_done(self) -> bool:
        return len(self.generated) == self.new_tokens


def run_chain(
    engines: Sequence[Engine], entries: Sequence[Entry], closes: Sequence[int], token_ids: Sequence[int]
) -> torch.Tensor:
    """One step through all stages; logits of the tail."""
    output = engines[0].run(entries, closes, token_ids=token_ids)
    for engine in engines[1:]:
        # frames arrive as read-only bytes
        output = engine.run(entries, closes, hidden=memoryview(bytes(output.hidden or b"")))
    assert output.logits_RV is not None
    return output.logits_RV


def run_staggered(engines: Sequence[Engine], plans: Sequence[Plan]) -> None:
    """Greedy decoding of all plans until each has its tokens; closes every sequence when it is done."""
    # blocks are handed out in an order in which no sequence's blocks lie side by side for long
    free = [block for offset in range(3) for block in range(offset, NUM_BLOCKS, 3)]
    closes: list[int] = []
    for step in range(1000):
        if all(plan.is_done for plan in plans):
            break
        entries: list[Entry] = []
        token_ids: list[int] = []
        samples: list[int] = []
        for index, plan in enumerate(plans):
            if step < plan.first_step or plan.is_done:
                continue
            tokens = (plan.prompt + plan.generated)[plan.placed :]
            part = tokens[: plan.chunk]
            new_blocks = -(-(plan.placed + len(part)) // BLOCK_SIZE) - plan.blocks
            is_last = len(part) == len(tokens)
            entries.append(
                Entry(
                    sequence=index,
                    start=plan.placed,
                    count=len(part),
                    opens=plan.placed == 0,
                    logits=Logits.LAST if is_last else Logits.NONE,
                    new_blocks=tuple(free.pop() for _ in range(new_blocks)),
                )
            )
            token_ids += part
            plan.placed += len(part)
            plan.blocks += new_blocks
            if is_last:
                samples.append(index)
        logits_RV = run_chain(engines, entries, closes, token_ids)
        closes = []
        for index, token in zip(samples, logits_RV.argmax(-1).tolist(), strict=True):
            plans[index].generated.append(token)
            if plans[index].is_done:
                closes.append(index)
    run_chain(engines, (), closes, ())
