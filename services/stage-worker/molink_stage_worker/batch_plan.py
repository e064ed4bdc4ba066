"""The values that go into and come out of the head's decisions (see `batching`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from molink_common.wire import Entry, Extra, Opening, Traffic

BACKLOG_CYCLES = 2
"""Prompts that would take longer to get on with decode steps than so many cycles are a backlog."""


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
    opening_tokens: int = 65536
    """A step stops opening sequences once their prompts together pass this: it bounds the frame's extra part."""
    prefix_secret: bytes | None = field(default=None, repr=False)
    """Keys what is known of texts (see `prefix_cache`). None: no sequence begins with the KV blocks of another."""

    def __post_init__(self) -> None:
        if min(self.num_blocks, self.block_size, self.step_tokens, self.max_running) < 1:
            raise ValueError(f"every limit of a batch is at least 1: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """How the head forms steps for now. Changes as measurements move."""

    micro_batches: int
    """Decode steps to keep under way; with `separate_prefill` False, steps of any kind."""
    chunk_tokens: int
    """Most prompt tokens a step."""
    chunks_under_way: int
    """With `separate_prefill`: prompt steps to keep under way beside the decode steps."""
    separate_prefill: bool
    """Whether prompt chunks go in steps of their own, of class bulk, or share steps with decode tokens."""
    along_tokens: int = 0
    """With `separate_prefill`: prompt tokens that the head may compute in one pass with a decode step, as a step of
    their own. They cost little there, since the pass reads the weights anyway."""
    only_along: bool = False
    """With `along_tokens`: prompts have time, and get no other steps of their own while there are decode steps."""
    riding_tokens: int = 0
    """With `separate_prefill`: most tokens of short prompts that go in a decode step itself."""
    draft_price: float | None = None
    """What one guess more for every sequence that decodes adds to a cycle, as a share of it. None: nobody guesses."""

    def __post_init__(self) -> None:
        if min(self.micro_batches, self.chunk_tokens, self.chunks_under_way) < 1:
            raise ValueError(f"every number of a plan is at least 1: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step of one micro-batch. Without entries it only closes sequences."""

    step: int
    traffic: Traffic
    entries: tuple[Entry, ...]
    token_ids: tuple[int, ...]
    """Of all entries, one after the other; none with `rebuild`."""
    opens: tuple[Opening, ...]
    closes: dict[str, int]
    """By sequence, the step that opened the life that ends."""
    traces: dict[str, str]
    drafts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """By sequence, the guesses among `token_ids`: the last ones of its entry."""
    rebuild: int | None = None
    """The one stage that computes these tokens."""

    def extra(self) -> Extra:
        """The part of the frame that only some steps need."""
        return Extra.model_construct(
            opens=self.opens,
            closes=self.closes,
            traces=self.traces,
            rebuild=self.rebuild,
            refused=(),
            drafts=self.drafts,
        )
