"""The most tokens a second that any number of micro-batches could give. Pure: physics, no word about our scheduler.

N running sequences are cut into M micro-batches of N/M. Nobody's next token can be computed before the present one
has been sampled (there is no speculation), so each sequence gets one token a cycle, and a cycle takes at least

    the work of the busiest stage     M · c_k(N/M)                 c_k: measured time of a step at stage k
    the bytes on the busiest link     N · bytes a token ÷ rate
    once round the ring               Σ c_k(N/M) + Σ (one way + bytes ÷ rate) + the way back of the sampled tokens

The bound is the largest N ÷ (longest of the three) over all M from 1 to N. The rule is the MoLink paper's
(arXiv 2507.05043), taken as an upper bound: a real system also waits, copies and schedules.

Every part is a lower bound of the time, so that the quotient is an upper bound of the throughput:
- N/M is not rounded. c_k is convex (a sum of linear terms, or a roofline), so uneven micro-batches take longer.
- Prompts ride along in the decode steps, where they share the reading of the weights: steps of their own would cost
  more. They count for stages and links, but not for the ring, where they could be elsewhere.
- All stages compute at the same time, each on processors of its own. Where one machine plays all hosts that may be
  false: `with_processors` adds what its processors allow.
- The tokens that come back, frame headers and acknowledgements take no time on a link.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

StepCost = Callable[[float, float, float], float]
"""Seconds of a step, from its tokens, its sequences and the tokens of context behind them. Convex, growing."""

_MOST_ROUNDS = 200
_EXACT = 1e-9
_HEADERS_BYTES = 52
"""IPv4 and TCP with timestamps."""


class Limit(StrEnum):
    """What a bound comes from."""

    STAGE = "stage"
    LINK = "link"
    RING = "ring"
    PROCESSORS = "processors"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCost:
    """A stage's cost as the estimator reports it."""

    fixed_s: float
    per_token_s: float
    per_sequence_s: float
    per_context_token_s: float

    def __call__(self, tokens: float, sequences: float, context_tokens: float) -> float:
        """Seconds of a step. A noisy fit may give a term below 0; time below 0 there is none."""
        linear = self.per_token_s * tokens + self.per_sequence_s * sequences + self.per_context_token_s * context_tokens
        return max(self.fixed_s + linear, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkBound:
    """A link from a stage to the next. Rates count the bytes of the tensors; see `payload_bytes_per_s`."""

    rate_bytes_per_s: float | None
    """None: as many as anybody likes."""
    one_way_s: float

    def __post_init__(self) -> None:
        if self.one_way_s < 0 or (self.rate_bytes_per_s is not None and self.rate_bytes_per_s <= 0):
            raise ValueError(f"no link is like this: {self}")

    def transmit_s(self, size_bytes: float) -> float:
        """How long the transmitter needs."""
        return 0.0 if self.rate_bytes_per_s is None else size_bytes / self.rate_bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineBound:
    """A pipeline as physics sees it."""

    stages: tuple[StepCost, ...]
    """Head first."""
    links: tuple[LinkBound, ...]
    """From each stage to the next: one fewer than stages."""
    return_s: float
    """One way from the tail back to the head."""
    bytes_a_token: float

    def __post_init__(self) -> None:
        if not self.stages or len(self.links) != len(self.stages) - 1:
            raise ValueError(f"{len(self.stages)} stages are not joined by {len(self.links)} links")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the pipeline has to carry."""

    sequences: int
    """N: streams that decode at the same time."""
    context_tokens: float = 0.0
    """Mean tokens behind each of them."""
    prompt_share: float = 0.0
    """Tokens of prompts to prefill for each token decoded; a prompt's last token counts as decoded."""
    prompt_tokens_per_s: float = 0.0
    """Of prompts that come by the clock, however fast the others decode."""

    def __post_init__(self) -> None:
        if self.sequences < 1 or min(self.context_tokens, self.prompt_share, self.prompt_tokens_per_s) < 0:
            raise ValueError(f"no load is like this: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The best that can be."""

    tokens_per_s: float
    micro_batches: int
    """The fewest that give it."""
    limit: Limit


def payload_bytes_per_s(bit_per_s: float | None, mtu_bytes: int = 1500) -> float | None:
    """What a link that carries `bit_per_s` of IP packets leaves for the bytes inside TCP."""
    return None if bit_per_s is None else bit_per_s / 8 * (mtu_bytes - _HEADERS_BYTES) / mtu_bytes


def with_processors(bound: Bound, *, tokens_per_s: float, busy_share: float) -> Bound:
    """The bound where stages, brokers, services, emulator and clients share the processors of one machine.

    What was reached with `busy_share` of all processors' time cannot become more than it would be with all of it.
    """
    if not 0 < busy_share <= 1:
        raise ValueError(f"processors that are busy for {busy_share:.0%} of the time")
    most_per_s = tokens_per_s / busy_share
    if most_per_s >= bound.tokens_per_s:
        return bound
    return Bound(tokens_per_s=most_per_s, micro_batches=bound.micro_batches, limit=Limit.PROCESSORS)


def best(pipeline: PipelineBound, load: Load) -> Bound:
    """The bound over every number of micro-batches.

    Raises:
        ValueError: nothing in it takes any time, so there is no bound.
    """
    bounds = [with_micro_batches(pipeline, load, count) for count in range(1, load.sequences + 1)]
    return max(bounds, key=lambda bound: (bound.tokens_per_s, -bound.micro_batches))


def with_micro_batches(pipeline: PipelineBound, load: Load, count: int) -> Bound:
    """The bound with `count` micro-batches under way.

    Raises:
        ValueError: there are more of them than sequences, or nothing takes any time.
    """
    if not 1 <= count <= load.sequences:
        raise ValueError(f"{count} micro-batches of {load.sequences} sequences")
    times = {
        Limit.STAGE: max(_stage_s(cost, load, count) for cost in pipeline.stages),
        Limit.LINK: _busiest_link_s(pipeline, load),
        Limit.RING: ring_s(pipeline, load, count),
    }
    limit = max(times, key=lambda one: times[one])
    if times[limit] <= 0:
        raise ValueError("nothing here takes any time")
    return Bound(tokens_per_s=load.sequences / times[limit], micro_batches=count, limit=limit)


def ring_s(pipeline: PipelineBound, load: Load, count: int) -> float:
    """R: how long a micro-batch of decode tokens, one of `count`, takes once round when it never waits."""
    sequences = load.sequences / count
    size_bytes = sequences * pipeline.bytes_a_token
    on_links_s = sum(link.one_way_s + link.transmit_s(size_bytes) for link in pipeline.links)
    computing_s = sum(cost(sequences, sequences, sequences * load.context_tokens) for cost in pipeline.stages)
    return computing_s + on_links_s + pipeline.return_s


def _stage_s(cost: StepCost, load: Load, count: int) -> float:
    """The least cycle in which a stage can do a cycle's work; infinite if prompts come faster than it computes them.

    A longer cycle brings more of the prompts that come by the clock. From below, the times approach the cycle in
    which both are equal, and none of them is longer than it.
    """
    sequences = load.sequences / count
    cycle_s = 0.0
    for _ in range(_MOST_ROUNDS):
        tokens = sequences * (1 + load.prompt_share) + load.prompt_tokens_per_s * cycle_s / count
        longer_s = count * cost(tokens, sequences, sequences * load.context_tokens)
        if longer_s <= cycle_s * (1 + _EXACT):
            return longer_s
        cycle_s = longer_s
    return math.inf


def _busiest_link_s(pipeline: PipelineBound, load: Load) -> float:
    """The least cycle in which every link can carry a cycle's bytes; infinite if prompts alone fill one."""
    cycle_bytes = load.sequences * (1 + load.prompt_share) * pipeline.bytes_a_token
    times_s = [0.0]
    for link in pipeline.links:
        left = 1.0 - link.transmit_s(load.prompt_tokens_per_s * pipeline.bytes_a_token)
        times_s.append(link.transmit_s(cycle_bytes) / left if left > 0 else math.inf)
    return max(times_s)
