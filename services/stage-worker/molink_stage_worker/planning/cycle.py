"""How long a cycle takes with so many micro-batches under way: one token for every sequence that decodes.

    cycle(M) = max( the slowest stage's time for all M micro-batches, over the share that prompt chunks leave it,
                    the slowest link's time for all tokens,
                    the way round of one micro-batch )

The first grows with M (every step has a fixed cost), the last falls with M (smaller steps go round faster); the
second does not care. Where two of the bounds are close, times that scatter make the cycle longer than either: a
stage now and then waits for the other's slow step. The norm ‖x‖ₚ stands for the maximum then; p is chosen so that two
equal bounds give what the larger of two normal times gives on average (1 + 0.56 × scatter). Pure functions of curves
and numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import log, log1p, pow

from molink_stage_worker.planning.ring import Links
from molink_stage_worker.planning.stage_cost import StageCurve

MOST_MICRO_BATCHES = 64
_MAXIMUM_OF_TWO = 0.56
"""The mean of the larger of two standard normal numbers: 1/√π."""
_LEAST_SCATTER = 0.05
_MOST_SCATTER = 0.3


class Bottleneck(Enum):
    """What makes a cycle as long as it is."""

    STAGE = "stage"
    LINK = "link"
    RING = "ring"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is known of a pipeline at one moment."""

    stages: tuple[StageCurve, ...]
    prompt_shares: tuple[float, ...]
    """By stage: the share of its time that prompt chunks take."""
    riding: float
    """Tokens of short prompts that go in decode steps themselves, for each token decoded there."""
    token_bytes: int
    links: Links
    scatter: float
    """Of the stages' times, as a share of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cycle:
    """A prediction."""

    micro_batches: int
    size: int
    """Sequences of the largest micro-batch."""
    stages_s: tuple[float, ...]
    """By stage: its decode work in one cycle, without waiting."""
    stage_s: float
    link_s: float
    ring_s: float
    cycle_s: float
    """Time between two tokens of a sequence."""

    @property
    def bottleneck(self) -> Bottleneck:
        """Which of the three bounds holds."""
        if self.stage_s >= max(self.link_s, self.ring_s):
            return Bottleneck.STAGE
        return Bottleneck.LINK if self.link_s >= self.ring_s else Bottleneck.RING

    @property
    def slowest_stage(self) -> int:
        """The stage with the most decode work."""
        return max(range(len(self.stages_s)), key=lambda index: self.stages_s[index])


def predict(
    machine: Machine,
    *,
    decoding: int,
    context_tokens: int,
    micro_batches: int,
    chunk_tokens: int,
    window: float = 1.0,
) -> Cycle:
    """The cycle with `micro_batches` under way, chunks of `chunk_tokens` in between.

    Each sequence has `window` tokens in a step, guesses included.
    """
    size = -(-decoding // micro_batches)
    full, rest = divmod(decoding, size)
    stages_s = []
    stage_s = ring_s = 0.0
    width = window + machine.riding
    for curve, share in zip(machine.stages, machine.prompt_shares, strict=True):
        step_s = curve.compute_s(size * width, size, size * context_tokens)
        work_s = full * step_s + (curve.compute_s(rest * width, rest, rest * context_tokens) if rest else 0.0)
        stages_s.append(work_s)
        stage_s = max(stage_s, work_s / (1.0 - share))
        ring_s += step_s
        if share:
            ring_s += share * curve.compute_s(chunk_tokens, 1, context_tokens) / 2.0
    rate = machine.links.rate_bytes_per_s
    link_s = 0.0 if rate is None else decoding * window * machine.token_bytes / rate
    ring_s += machine.links.time_s(size * window * machine.token_bytes)
    bounds_s = (stage_s, link_s, ring_s)
    return Cycle(
        micro_batches=full + (1 if rest else 0),
        size=size,
        stages_s=tuple(stages_s),
        stage_s=stage_s,
        link_s=link_s,
        ring_s=ring_s,
        # one micro-batch waits for nothing but its own way round
        cycle_s=max(bounds_s) if full == 1 and not rest else _scattered_maximum(bounds_s, machine.scatter),
    )


def _scattered_maximum(bounds_s: tuple[float, ...], scatter: float) -> float:
    largest_s = max(bounds_s)
    power = log(2.0) / log1p(_MAXIMUM_OF_TWO * min(max(scatter, _LEAST_SCATTER), _MOST_SCATTER))
    return largest_s * pow(sum(pow(bound_s / largest_s, power) for bound_s in bounds_s), 1.0 / power)


def distinct_counts(decoding: int) -> list[int]:
    """Every count of micro-batches that differs in its largest micro-batch from all smaller counts."""
    most = min(decoding, MOST_MICRO_BATCHES)
    return [count for count in range(1, most + 1) if count == -(-decoding // -(-decoding // count))]


def best(cycles: list[Cycle], *, tie: float) -> Cycle:
    """The shortest; of those within `tie` of it the one with the fewest micro-batches.

    Fewer, larger steps do the same work in less of the stages' time: the rest is there for prompt chunks.
    """
    shortest_s = min(cycle.cycle_s for cycle in cycles)
    good = [cycle for cycle in cycles if cycle.cycle_s <= (1.0 + tie) * shortest_s]
    return min(good, key=lambda cycle: cycle.micro_batches)
