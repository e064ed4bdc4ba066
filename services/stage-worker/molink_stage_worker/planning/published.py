"""The micro-batch rule of published MoLink, as a baseline: an assumed link instead of a measured one.

Source: *MoLink: Distributed and Efficient Serving Framework for Large Models* (arXiv 2507.05043) calls it dynamic
micro-batch scheduling; the authors' public repository (github.com/oldcpple/MoLink, ``molink/engine``) has the rule.
In our words: as many micro-batches as stages keep the stages busy if sending costs nothing. What sending costs is a
bubble, and each further micro-batch fills a step's computing time of it. So take the first count above the number of
stages whose further micro-batches compute at least as long as one transmission for each stage takes, and ten at
most. Computing time is what the head's profile says for one micro-batch plus a constant overhead; transmission is
the micro-batch's bytes at an assumed bandwidth plus an assumed latency. None of the constants is measured there
(1,000 Mbit/s, 5 ms of latency, 5 ms of overhead); here the bandwidth is a setting of the baseline. One sequence has
one micro-batch, and up to as many sequences as stages have one micro-batch for each stage.

We take the head's measured curve for their profile, which they run once at the start.
"""

from __future__ import annotations

from molink_stage_worker.planning.stage_cost import StageCurve

MOST_MICRO_BATCHES = 10
ASSUMED_LATENCY_S = 0.005
ASSUMED_OVERHEAD_S = 0.005


def published_micro_batches(
    head: StageCurve | None,
    *,
    sequences: int,
    context_tokens: int,
    num_stages: int,
    token_bytes: int,
    assumed_bytes_per_s: float,
) -> int:
    """How many micro-batches the published rule keeps under way. `head` None: no profile yet."""
    if sequences <= 1:
        return 1
    if sequences <= num_stages or head is None:
        return num_stages
    for count in range(num_stages + 1, MOST_MICRO_BATCHES + 1):
        size = max(sequences // count, 1)
        compute_s = head.compute_s(size, size, size * context_tokens) + ASSUMED_OVERHEAD_S
        transmission_s = size * token_bytes / assumed_bytes_per_s + ASSUMED_LATENCY_S
        if (count - num_stages) * compute_s >= num_stages * transmission_s:
            return count
    return max(MOST_MICRO_BATCHES, num_stages)
