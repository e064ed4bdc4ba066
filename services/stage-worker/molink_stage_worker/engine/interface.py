"""What the rest of the worker asks of an engine.

Shapes: T tokens of a step, all sequences packed one after the other; H hidden size; V vocabulary; R rows of
logits that the step's entries ask for, in the order of entries and tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from molink_common.messages import Dtype
from molink_common.wire import Entry

Progress = Callable[[float], None]
"""Told the share that is done, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """Which layers to hold, from where, and how."""

    checkpoint: Path
    """A folder that transformers reads and that has at least the tensors of this stage."""
    first_layer: int
    last_layer: int
    num_layers: int
    """Of the whole model; the stage is the head if `first_layer` is 0, the tail if `last_layer` equals this."""
    dtype: Dtype
    device: str
    num_blocks: int
    block_size: int

    def __post_init__(self) -> None:
        if not 0 <= self.first_layer < self.last_layer <= self.num_layers:
            raise ValueError(f"layers [{self.first_layer}, {self.last_layer}) of {self.num_layers} are no stage")

    @property
    def is_head(self) -> bool:
        """Whether it turns token ids into hidden states."""
        return self.first_layer == 0

    @property
    def is_tail(self) -> bool:
        """Whether it turns hidden states into logits."""
        return self.last_layer == self.num_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What a step leaves: hidden states for the next stage, or logits at the tail."""

    hidden: memoryview | None = None
    """T × H scalars of the stage's dtype, one-dimensional bytes. Valid until the next call of `run`."""
    logits_RV: torch.Tensor | None = None
    """float32, on the stage's device."""


class Engine(Protocol):
    """A loaded stage. Calls come from one thread, one after the other."""

    @property
    def hidden_size(self) -> int:
        """H."""

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""

    @property
    def can_rewind(self) -> bool:
        """Whether a sequence may open in its middle, on KV blocks that it has filled before."""

    def run(
        self,
        entries: Sequence[Entry],
        closes: Sequence[int],
        *,
        token_ids: Sequence[int] | None = None,
        hidden: memoryview | None = None,
    ) -> StepOutput:
        """One step: forget `closes`, then run `entries`.

        The head takes `token_ids` (T of them), every other stage `hidden` (T × H scalars as bytes). A step
        may be empty of entries. Entries with `opens` forget what the sequence had, though with
        a `start` above 0 the blocks that they name hold its tokens before that; `new_blocks` are appended
        to its block table first; tokens go to positions ``start .. start+count``, over whatever was there.

        Raises:
            ProtocolError: the entries contradict the block tables (a peer's mistake); nothing was changed.
        """

    def reset(self, *, num_blocks: int, block_size: int) -> None:
        """Forget every sequence, give back the memory of keys and values, and have this many KV blocks from now on."""
