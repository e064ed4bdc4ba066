"""What the planner is told, and what it says about itself."""

from __future__ import annotations

from dataclasses import dataclass

from molink_common.messages import StageCostReport
from molink_common.wire import Traffic
from molink_stage_worker.planning.step_load import StepLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class StepObservation:
    """A step that came back to the head."""

    traffic: Traffic
    tokens: int
    sequences: int
    context_tokens: int
    """Sum over the step's entries of start + count."""
    decode_tokens: int
    """Of entries that decode, guesses included; the other tokens are prompt tokens."""
    guesses: int = 0
    """Of the tokens that decode, those that are guesses at what comes next."""
    payload_bytes: int
    """Hidden-state bytes that crossed each link."""
    compute_s: tuple[float, ...]
    """By stage, head first."""
    waited_s: tuple[float, ...]
    """By stage, head first: from the frame's arrival (at the head: from the plan) until its computation began."""
    ring_s: float
    """From the plan until the tokens were back, by the head's clock."""
    passes: tuple[StepLoad | None, ...] | None = None
    """By stage, everything computed in the same pass over its layers, this step included; None: another step of the
    pass tells. None for all: each stage computed the step alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What there is to do."""

    decoding: int
    """Sequences that are in decode."""
    context_tokens: int
    """Mean context of a sequence."""
    prompt_tokens_waiting: int
    """Prompt tokens that no step was planned for yet."""
    prompts_waiting: int = 0
    """Sequences that they belong to, and those that a replaced stage still lacks."""
    admitted_prompt_tokens: int = 0
    """Of the prompt tokens, those of sequences that hold KV blocks."""
    longest_prompt_tokens: int = 0
    """Of these sequences, the whole length of the longest."""
    window: float = 1.0
    """Tokens of a sequence in a decode step, on average: the newest one, and guesses behind it."""

    def __post_init__(self) -> None:
        if min(self.decoding, self.context_tokens, self.prompt_tokens_waiting, self.prompts_waiting) < 0:
            raise ValueError(f"no number of a demand is negative: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerReport:
    """What the planner believes."""

    cycle_s: float | None
    """Predicted time between two tokens of a stream. None: not enough is measured."""
    bottleneck: str
    """What makes a cycle as long as it is, in words."""
    costs: tuple[StageCostReport, ...]
    """By stage, head first. Empty until every stage has been measured."""
    link_latency_s: float | None
    """Of all links together, there and back to the head, without the part that grows with the payload."""
    link_s_per_byte: float | None
    """Of all links together."""
