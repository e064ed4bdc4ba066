"""How much there is to compute in a step, and whether two steps had better be computed as one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from molink_common.wire import Entry, Logits
from molink_stage_worker.planning.stage_cost import StageCurve


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """What a step's time depends on."""

    tokens: int
    prompt_tokens: int
    """Of them; the others decode, or are guesses at what will be decoded."""
    sequences: int
    context_tokens: int
    """Over all sequences: positions that the last token looks back on, itself included."""

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> StepLoad:
        """Of a step with these entries."""
        tokens = prompt_tokens = sequences = context_tokens = 0
        for entry in entries:
            tokens += entry.count
            is_decode = entry.logits is Logits.DRAFTS or (entry.count == 1 and not entry.opens)
            prompt_tokens += 0 if is_decode else entry.count
            sequences += 1
            context_tokens += entry.start + entry.count
        return cls(tokens=tokens, prompt_tokens=prompt_tokens, sequences=sequences, context_tokens=context_tokens)

    @classmethod
    def together(cls, loads: Iterable[StepLoad]) -> StepLoad:
        """Of steps that are computed in one pass."""
        return sum(loads, start=cls(tokens=0, prompt_tokens=0, sequences=0, context_tokens=0))

    def __add__(self, other: StepLoad) -> StepLoad:
        return StepLoad(
            tokens=self.tokens + other.tokens,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            sequences=self.sequences + other.sequences,
            context_tokens=self.context_tokens + other.context_tokens,
        )


def pays_together(curve: StageCurve | None, first: StepLoad, other: StepLoad) -> bool:
    """Whether a step whose turn it is should take another that waits along.

    Together they cost less than one after the other: a stage reads its weights once. But the first is later by what
    the other adds. It pays if that is no more than what is saved, which is when the other adds at most half of what
    it costs alone.
    """
    if curve is None:
        return False
    alone_s = curve.compute_s(other.tokens, other.sequences, other.context_tokens)
    first_s = curve.compute_s(first.tokens, first.sequences, first.context_tokens)
    both = first + other
    return curve.compute_s(both.tokens, both.sequences, both.context_tokens) - first_s <= alone_s / 2
