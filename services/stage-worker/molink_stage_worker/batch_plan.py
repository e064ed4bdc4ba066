"""The values that go into and come out of the head's decisions (see `batching`)."""

from __future__ import annotations

from dataclasses import dataclass

from molink_common.wire import Entry, Extra, Opening


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """What bounds the batches."""

    num_blocks: int
    block_size: int
    step_tokens: int = 256
    """Most tokens a step."""
    max_running: int = 64
    """Most sequences that hold KV blocks."""
    max_waiting: int = 4096
    max_steps_under_way: int = 1
    opening_tokens: int = 65536
    """A step stops opening sequences once their prompts together pass this: it bounds the frame's extra part."""

    def __post_init__(self) -> None:
        if min(self.num_blocks, self.block_size, self.step_tokens, self.max_running, self.max_steps_under_way) < 1:
            raise ValueError(f"every limit of a batch is at least 1: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step of one micro-batch. Without entries it only closes sequences."""

    step: int
    entries: tuple[Entry, ...]
    token_ids: tuple[int, ...]
    """Of all entries, one after the other."""
    opens: tuple[Opening, ...]
    closes: tuple[str, ...]
    traces: dict[str, str]

    def extra(self) -> Extra:
        """The part of the frame that only some steps need."""
        return Extra.model_construct(opens=self.opens, closes=self.closes, traces=self.traces)
